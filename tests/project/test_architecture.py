"""The page about the rooms names all of them, in the order that the contract holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()


def test_each_room_has_its_task() -> None:
    package = ROOT / "agent_sessions"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in package.glob("*.py")}
    assert rooms - {"__init__", "migrations"} == {
        room for row in _rows() for room in row
    }


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = (
        contract["layers"]
        for contract in contracts["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    assert [set(re.findall(r"\w+", layer)) for layer in layers] == list(
        map(set, _rows())
    )


def _rows() -> list[list[str]]:
    table = PAGE.split("## Rooms")[1].split("## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return [re.findall(r"`(\w+)`", cell) for cell in cells]
