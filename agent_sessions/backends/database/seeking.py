"""Where a turn begins, without reading what lies before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent_sessions.backends.database.lineage import Segment, visible

# So few rows are read through rather than searched.
_NEAR = 64


def first_of_turn(using: str, segments: tuple[Segment, ...], turn: int) -> int | None:
    """Find the position of the user message that begins a turn.

    Turns grow with positions, so each look halves what is left, or does better: most
    turns have about as many items as their neighbours. No index over turns is needed,
    which every append would pay for.
    """
    for segment in reversed(segments):
        last = _rows(using, segment).order_by("-position").first()
        if last is None or last[1] < turn:
            continue
        before = _before(using, segment, turn, last)
        near = _rows(using, replace(segment, after=before))
        wanted = near.filter(turn=turn, type="message", role="user")
        found = wanted.order_by("position").first()
        if found is not None:
            return int(found[0])
    return None


def _rows(using: str, segment: Segment) -> Any:
    return visible(using, (segment,)).values_list("position", "turn")


def _before(using: str, segment: Segment, turn: int, last: tuple[int, int]) -> int:
    """Give a position near a turn's beginning, all of which lies behind it."""
    low, low_turn = _rows(using, segment).order_by("position").first()
    if low_turn >= turn:
        return int(low) - 1
    high, high_turn = last
    halve = False
    while high - low > _NEAR:
        share = 0.5 if halve else (turn - low_turn - 0.5) / (high_turn - low_turn)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        # One lower bound: of two, SQLite may take the one that leaves more to read.
        rest = _rows(using, replace(segment, after=middle - 1))
        found, found_turn = rest.order_by("position").first()
        # Where turns are of very different lengths, guesses creep: halve in between.
        halve = not halve
        if found_turn < turn:
            low, low_turn = found, found_turn
        else:
            high, high_turn = middle, found_turn
    return int(low)
