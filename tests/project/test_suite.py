"""The command behind `make test`: every call runs, and any failure fails it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.suite import Suite

ROOT = Path(__file__).parents[2]


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.suite", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_choice_that_some_calls_lack_is_no_failure() -> None:
    done = suite("-q", "-k", "nosuchtest", "tests/project/test_suite.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("deselected") == 5


def test_what_fails_is_named_and_so_is_a_database_that_cannot_be_had(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = {"mariadb": "there is none."}
    suite = Suite(["--no-such-option"], tmp_path, missing)
    assert suite.run() == 1
    assert sorted(suite.failed) == ["browser", "contract", "postgres", "sqlite"]
    line = "!!! NOT RUN on mariadb: what touches a database, because there is none.\n"
    told = capfd.readouterr()
    assert f"=== mariadb\n{line}" in told.out
    assert line in told.out.partition("=== browser\n")[2]
    for name in suite.failed:
        assert f"=== {name}\n" in told.out
        assert name in told.err.splitlines()[-1]
    assert (tmp_path / "not-run").read_text() == line
