"""Read the docs' pages, and follow them in a new project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    """Return a page's text, by its path from the project's folder."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def files(text: str) -> dict[str, str]:
    """Return the Python blocks that begin with a file's name, by that name."""
    found = {}
    for block in blocks(text, "python"):
        if name := re.match(r"# ([\w/]+\.py)\b", block):
            found[name[1]] = block
    return found


def section(text: str, title: str) -> str:
    """Return what stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no section {title!r}"
    return found[1]


def column(text: str, heading: str) -> set[str]:
    """Return the first column of the table that begins with a heading."""
    table = re.search(
        rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.MULTILINE
    )
    assert table, f"no table {heading!r}"
    cells = (line.split("|")[1] for line in table[1].splitlines())
    return {word for cell in cells for word in re.findall(r"[\w.]+", cell)}


def append(directory: Path, blocks: dict[str, str]) -> None:
    """Add blocks to the end of the files that they name."""
    for name, block in blocks.items():
        path = directory / name
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}\n{block}")


def environment() -> dict[str, str]:
    """Return the environment of a project that is not this one."""
    kept = {key: v for key, v in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    return kept | {"PYTHONPATH": str(ROOT), "OPENAI_AGENTS_DISABLE_TRACING": "1"}


def run(directory: Path, *arguments: str) -> str:
    """Run Python in a directory and return what it printed; fail where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return done.stdout + done.stderr
