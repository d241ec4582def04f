"""Find the items of a history that belong together: calls, outputs and reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_sessions.items import Item
from agent_sessions.items.kinds import (
    CALL_OF,
    INSTRUCTIONS,
    Key,
    call_key,
    causes,
    is_in_response,
    opens_turn,
    own_key,
    type_and_role,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each item of a history belongs.

    `turns` has the turn that an item goes with: the newest of any item that it can't
    be parted from. None stands for an output without its call. The newest compaction
    goes with the newest turn. `last` is the newest turn of the history; `last + 1` is
    what can't be parted from the new input.
    """

    history: Sequence[Item]
    turns: list[int | None]
    last: int

    def since(self, first: int) -> list[Item]:
        """Return the items of this turn and those after it."""
        return [
            item
            for item, turn in zip(self.history, self.turns, strict=True)
            if turn is not None and turn >= first
        ]


def lay_out(history: Sequence[Item], fixed: Sequence[Item]) -> Layout:
    """Return the turn of each item of `history`; `fixed` stays in any case."""
    items = [*history, *fixed]
    calls = find_calls(items)
    families = _Families(len(items))
    for index in range(1, len(history)):
        if is_in_response(history[index - 1]) and is_in_response(history[index]):
            families.join(index - 1, index)
    for output, call in [*calls.items(), *_owners(items)]:
        if call is not None:
            families.join(output, call)
    summary = _newest_compaction(history)
    own, last = _count_turns(history, summary)
    own += [last + 1] * len(fixed)
    newest: dict[int, int] = {}
    for index, number in enumerate(own):
        root = families.root(index)
        newest[root] = max(newest.get(root, 0), number)
    turns = [
        None if calls.get(index, index) is None else newest[families.root(index)]
        for index in range(len(history))
    ]
    if summary is not None:
        # It stands for what was before it, and so can be sent without its response.
        turns[summary] = max(last, newest[families.root(summary)])
    return Layout(history, turns, last)


def _newest_compaction(history: Sequence[Item]) -> int | None:
    """Return the index of the newest compaction, or None."""
    for index in reversed(range(len(history))):
        if type_and_role(history[index])[0] == "compaction":
            return index
    return None


def _count_turns(history: Sequence[Item], summary: int | None) -> tuple[list[int], int]:
    """Return the turn in which each item stands, and the last of them.

    Where no user's message begins one, the newest compaction does: it must be sent.
    """
    asked = any(opens_turn(item) for item in history)
    turn = 0
    turns = []
    for index, item in enumerate(history):
        turn += opens_turn(item) if asked else index == summary
        turns.append(turn)
    return turns, turn


def find_calls(items: Sequence[Item]) -> dict[int, int | None]:
    """Return the index of the call for that of each output; None where there is none.

    Some models count their ids anew in every response, so an output belongs to the
    nearest call before it; one that was stored before its call, to the first after.
    An output that names no call, such as a hosted tool search's, is left out where
    none fits: the SDK doesn't take it for an orphan, and sends it.
    """
    latest: dict[Key, int] = {}
    calls: dict[int, int | None] = {}
    early: list[tuple[int, Key]] = []
    for index, item in enumerate(items):
        if type_and_role(item)[0] in CALL_OF:
            key = call_key(item)
            if key in latest:
                calls[index] = latest[key]
            else:
                early.append((index, key))
        else:
            latest[own_key(item)] = index
    first: dict[Key, int] = {}
    if early:
        for index in reversed(range(len(items))):
            if type_and_role(items[index])[0] not in CALL_OF:
                first[own_key(items[index])] = index
    for index, key in early:
        if key in first or key[1] is not None:
            calls[index] = first.get(key)
    return calls


def is_instruction(item: Item) -> bool:
    """Return whether an item is a system or developer message."""
    kind, role = type_and_role(item)
    return kind == "message" and role in INSTRUCTIONS


def _owners(items: Sequence[Item]) -> list[tuple[int, int | None]]:
    """Return other pairs to keep together: calls of programs, and approved calls."""
    found: dict[Key, int] = {}
    pairs: list[tuple[int, int | None]] = []
    for index, item in enumerate(items):
        found[own_key(item)] = index
        pairs += [(index, found.get(key)) for key in causes(item)]
    return pairs


class _Families:
    """Sets that grow together (union-find)."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def root(self, index: int) -> int:
        parents = self._parents
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(self, one: int, other: int) -> None:
        self._parents[self.root(other)] = self.root(one)
