"""Questions about the turns of a history, answered from the extracted columns."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any
from unicodedata import normalize

from agent_sessions.backends.database.branches import Branches
from agent_sessions.exceptions import InvalidBranch
from agent_sessions.items import decode
from agent_sessions.items.kinds import CALLS, OPENING
from agent_sessions.times import iso

PREVIEW = 100

# As AdvancedSQLiteSession counts them.
_COUNTED = CALLS - {"program"} | {"tool_call", "mcp_approval_request"}


def conversation_turns(
    branches: Branches, branch_id: str | None, *, after: int, limit: int | None
) -> list[dict[str, Any]]:
    """List the user turns over number `after`, oldest first, up to `limit`."""
    turns = _user_rows(branches, branch_id, after)
    return [
        turn | {"content": preview(turn["content"], PREVIEW)}
        for _, turn in islice(turns, limit)
    ]


def find_turns(
    branches: Branches,
    search_term: str,
    branch_id: str | None,
    *,
    after: int,
    limit: int | None,
) -> list[dict[str, Any]]:
    """List the user turns whose text holds a term, ASCII letters in any case.

    Their `content` is not cut, as AdvancedSQLiteSession's isn't.
    """
    wanted = re.escape(normalize("NFC", search_term))
    pattern = re.compile(wanted, re.IGNORECASE | re.ASCII)
    matches = (
        (texts, turn)
        for texts, turn in _user_rows(branches, branch_id, after)
        if any(pattern.search(normalize("NFC", text)) for text in texts)
    )
    return [turn for _, turn in islice(matches, limit)]


def first_match(branches: Branches, search_term: str) -> int:
    """Return the first turn that holds a term. Raises InvalidBranch."""
    matches = find_turns(branches, search_term, None, after=0, limit=1)
    if not matches:
        raise InvalidBranch(
            f"No user turns found containing {search_term!r}. Try another word of the "
            "turn: letters of ASCII count in any case, others as they are."
        )
    turn: int = matches[0]["turn"]
    return turn


def conversation_by_turns(
    branches: Branches, branch_id: str | None
) -> dict[int, list[dict[str, str | None]]]:
    turns: dict[int, list[dict[str, str | None]]] = {}
    for turn, kind, role, tool in _columns(branches, branch_id):
        entry = {"type": _kind(kind, role), "tool_name": tool or None}
        turns.setdefault(turn, []).append(entry)
    return turns


def tool_usage(
    branches: Branches, branch_id: str | None
) -> list[tuple[str | None, int, int]]:
    calls: Counter[tuple[int, str | None]] = Counter()
    found: Counter[tuple[int, str | None]] = Counter()
    for turn, kind, _, tool in _columns(branches, branch_id):
        if kind in _COUNTED:
            calls[turn, tool or None] += 1
        elif kind == "tool_search_output":
            found[turn, tool or None] += 1
    # A hosted search may leave its output alone.
    calls.update({place: n for place, n in found.items() if place not in calls})
    ordered = sorted(calls.items(), key=lambda entry: (entry[0][0], entry[0][1] or ""))
    return [(tool, count, turn) for (turn, tool), count in ordered]


def preview(content: Any, length: int | None = None) -> str:
    """Return a message's content as one text, cut to a length: a list's is its JSON."""
    is_text = isinstance(content, str)
    text: str = content if is_text else json.dumps(content, ensure_ascii=False)
    return text if length is None or len(text) <= length else text[:length] + "..."


def _user_rows(
    branches: Branches, branch_id: str | None, after: int
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    # Here, not with the first row: nobody may ask for one.
    branch = branches.named(branch_id)
    if branch is None:
        return iter(())
    rows = branches.items(branch).filter(**OPENING, turn__gt=after).order_by("position")
    return _turns(rows.values_list("turn", "data", "created_at").iterator(500))


def _turns(rows: Iterator[Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    for turn, data, created_at in rows:
        item = decode(data)
        if item is None:
            continue
        content = item.get("content", "")
        yield (
            _texts(content),
            {
                "turn": turn,
                "content": preview(content),
                "full_content": content,
                "timestamp": iso(created_at, " "),
                "can_branch": True,
            },
        )


def _columns(
    branches: Branches, branch_id: str | None
) -> Iterator[tuple[int, str, str, str]]:
    branch = branches.named(branch_id)
    if branch is None:
        return
    rows = branches.items(branch).order_by("position")
    yield from rows.values_list("turn", "type", "role", "tool_name").iterator(
        chunk_size=2_000
    )


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    return [
        part["text"]
        for part in content
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]


def _kind(kind: str, role: str) -> str:
    return role if role in {"user", "assistant"} else kind or "other"
