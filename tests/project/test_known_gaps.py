"""A known gap names a case of the contract: one with a wrong name excuses nothing."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_database

ROOT = Path(__file__).parents[2]


def test_each_known_gap_names_a_case() -> None:
    files = sorted(map(str, ROOT.glob("tests/**/test_*contract*.py")))
    files.append(str(ROOT / "tests/backends/encrypted/test_encrypted_stores.py"))
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    cases = defaultdict(set)
    for line in listed.splitlines():
        path, _, name = line.partition("::")
        if path.endswith(".py") and "::" in name:
            cases[path, name.partition("::")[0]].add(name.partition("::")[2])
    gaps = {
        (path, owner, name)
        for path, owner in cases
        for name in getattr(_module(path), owner).__dict__.get("known_gaps", {})
    }
    assert len(gaps) > 20
    assert [gap for gap in gaps if gap[2] not in cases[gap[0], gap[1]]] == []


def _module(path: str) -> object:
    return import_module(path.removesuffix(".py").replace("/", "."))
