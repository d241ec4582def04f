"""Exports as one value a session, with its items in it."""

from __future__ import annotations

import json
from typing import Any


def as_export(*sessions: dict[str, Any]) -> str:
    """Return the lines of sessions that have their items under "items"."""
    lines: list[Any] = []
    for session in sessions:
        items = session["items"]
        head = {name: value for name, value in session.items() if name != "items"}
        lines += [head, *items, {"items": len(items)}]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def read_export(text: str) -> list[dict[str, Any]]:
    """Return the sessions of an export, each with its items under "items"."""
    found: list[dict[str, Any]] = []
    for line in map(json.loads, text.splitlines()):
        if "format" in line:
            found.append({**line, "items": []})
        elif "items" in line:
            assert line == {"items": len(found[-1]["items"])}
        else:
            found[-1]["items"].append(line)
    return found
