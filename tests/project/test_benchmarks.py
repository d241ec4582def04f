"""`make bench` at sizes whose figures say nothing: every workload works."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.bars import Bar, bars
from benchmarks.plans import PLANS
from benchmarks.report import promises, table
from benchmarks.results import Results
from benchmarks.stores import left_out

pytestmark = pytest.mark.one_database

ROOT = Path(__file__).parents[2]
REFERENCES = {"postgresql": "SQLAlchemySession, asyncpg", "sqlite": "SQLiteSession"}


@pytest.mark.parametrize(
    ("database", "others"),
    [("postgresql", ["redis", "alone"]), ("sqlite", ["advanced", "async"])],
)
def test_every_workload_measures_ours_and_its_peers(
    database: str, others: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "table.md"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--size", "tiny"),
            *("--databases", database, "--markdown", str(file), "--stores", *others),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text in done.stdout
    # A path or a host would tell about the machine of whoever ran it.
    assert str(tmp_path.parent.parent) not in text
    header = next(line for line in text.splitlines() if line.startswith("| |"))
    assert header.startswith(f"| | DjangoSession | {REFERENCES[database]} |")
    for word in others:
        assert word in header.lower()
    rows = re.findall(r"^\| ([^|*]+) \| \*\*([\d.]+)\*\*", text, re.MULTILINE)
    measured = {name: float(value) for name, value in rows}
    for workload in (
        *("turn at 10 items", "turn at 60 items, CPU"),
        "turn at 60 items, a new object each",
        *("3 sessions at once, turns/s", "read of 20 items", "import of 50 items"),
        *("bytes to read 50 of 60 items", "fork of 60 items, ms"),
        *("read of 50 items, 2 forks deep, ms", "clear of 60 items"),
    ):
        assert measured[workload] > 0, workload
    assert ("3 sessions at once, turns/s, 2 ms of network" in measured) == (
        database == "postgresql"
    )
    # Every promise has a row, so none goes unmeasured.
    promised = text[text.index("| promised |") :].splitlines()[2:]
    results = Results(
        "", REFERENCES[database], stores=dict.fromkeys(_stores(header), "")
    )
    assert len(promised) == len(bars(results, PLANS["tiny"]))


def _stores(header: str) -> list[str]:
    return [cell.strip() for cell in header.strip("| ").split("|")]


def test_a_peer_that_cannot_be_measured_is_named() -> None:
    lines = left_out()
    assert bool(lines) == (not find_spec("openai_django_sessions"))
    assert all(line.startswith("openai-django-sessions is left out") for line in lines)


def measured() -> Results:
    """Return what two rounds found."""
    results = Results("PostgreSQL", "SQLAlchemySession, asyncpg")
    results.stores = {"DjangoSession": "a", "SQLAlchemySession, asyncpg": "b"}
    for mine, theirs in ((2.0, 4.0), (9.0, 10.0), (3.0, 10.0)):
        results.add("turn at 10 items", "DjangoSession", mine)
        results.add("turn at 10 items", "SQLAlchemySession, asyncpg", theirs)
        results.rate("16 sessions at once, turns/s", "DjangoSession", mine)
        results.rate(
            "16 sessions at once, turns/s", "SQLAlchemySession, asyncpg", theirs
        )
    return results


def test_ratios_are_of_the_same_round() -> None:
    pair = ("DjangoSession", "SQLAlchemySession, asyncpg")
    results = measured()
    assert results.ratio("turn at 10 items", *pair) == 0.5
    assert results.best_ratio("turn at 10 items", *pair) == 0.5
    # The best rounds are those with most turns.
    assert results.best_ratio("16 sessions at once, turns/s", *pair) == 0.9
    assert results.ratio("read of 5 items", *pair) is None


def test_a_promise_that_is_not_kept_is_told() -> None:
    (row,) = (
        line
        for line in promises(measured(), PLANS["full"])
        if line.startswith("| turn at 10 items")
    )
    assert row.endswith("| ≤ 0.42 x | 0.50 x | 0.50 x | **missed** |")
    assert "| turn at 10 items | **0.50** | 1.00 |" in list(table(measured()))


@pytest.mark.parametrize(
    ("at_least", "value", "reached"),
    [(False, 1.5, True), (False, 1.6, False), (True, 1.5, True), (True, 1.4, False)],
)
def test_bars_are_upper_or_lower(at_least: bool, value: float, reached: bool) -> None:
    bar = Bar("", 1.5, lambda results: (None, None), at_least=at_least)
    assert bar.reached(value) is reached
    assert not bar.reached(None)


def test_the_benchmark_of_the_admin_times_every_page() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.admin"),
            *("--database", "sqlite", "--scale", "0.002", "--rounds", "1"),
            *("--max-queries", "14"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "transcript, newest" in done.stdout
    assert "overview, 30 days" in done.stdout


def test_the_benchmark_of_sockets_loses_no_word() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.sockets"),
            *("--runs", "2", "--sockets", "4", "--words", "5"),
            *("--items", "20", "--rounds", "1", "--ramp", "0"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ours: 20 of 20 words" in done.stdout
    assert "first word on 20 items" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["crashes", "--rounds", "1", "--stages", "tool"],
        ["reloads", "--rounds", "2", "--conversations", "1", "--max-stop", "60"],
    ],
    ids=["crashes", "reloads"],
)
def test_runs_outlive_processes_and_tabs(command: list[str]) -> None:
    script, *options = command
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"benchmarks.live.{script}", *options),
            *("--database", "sqlite"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
