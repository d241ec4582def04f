"""Find what belongs together in a history: calls, their outputs and the reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_sessions.items import Item

# An output that has lost its call is refused by every model, so it is never sent.
CALL_OF = {
    "function_call_output": "function_call",
    "custom_tool_call_output": "custom_tool_call",
    "shell_call_output": "shell_call",
    "local_shell_call_output": "local_shell_call",
    "apply_patch_call_output": "apply_patch_call",
    "computer_call_output": "computer_call",
    "tool_search_output": "tool_search_call",
    "program_output": "program",
    "mcp_approval_response": "mcp_approval_request",
}
# What a model's response consists of, besides "…_call"s and its messages. A hosted
# tool's output may stand in the middle of one. That of the app's own shell joins two
# responses, which harms nothing: no user's message is between them.
_IN_RESPONSES = frozenset(
    {
        "reasoning",
        "program",
        "program_output",
        "tool_search_output",
        "shell_call_output",
        "apply_patch_call_output",
        "additional_tools",
        "mcp_list_tools",
        "mcp_approval_request",
        "compaction",
    }
)

Key = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each item of a history belongs.

    `turns` has the turn that an item goes with: the newest of any item that it can't
    be parted from. None stands for an output without its call. The newest compaction
    goes with the newest turn. `last` is the newest turn of the history; `last + 1` is
    what can't be parted from the new input.
    """

    turns: list[int | None]
    last: int


def lay_out(history: Sequence[Item], fixed: Sequence[Item]) -> Layout:
    """Return the turn of each item of `history`; `fixed` stays in any case."""
    items = [*history, *fixed]
    calls = find_calls(items)
    families = _Families(len(items))
    for index in range(1, len(history)):
        if _in_response(history[index - 1]) and _in_response(history[index]):
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
    return Layout(turns, last)


def _newest_compaction(history: Sequence[Item]) -> int | None:
    """Find all that the model remembers of what was compacted."""
    for index in reversed(range(len(history))):
        if kind_of(history[index]) == "compaction":
            return index
    return None


def _count_turns(history: Sequence[Item], summary: int | None) -> tuple[list[int], int]:
    """Return the turn in which each item stands, and the last of them.

    Where no user's message begins one, the newest compaction does: it must be sent.
    """
    asked = any(begins_turn(item) for item in history)
    turn = 0
    turns = []
    for index, item in enumerate(history):
        turn += begins_turn(item) if asked else index == summary
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
        if kind_of(item) in CALL_OF:
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
            if kind_of(items[index]) not in CALL_OF:
                first[own_key(items[index])] = index
    for index, key in early:
        if key in first or key[1] is not None:
            calls[index] = first.get(key)
    return calls


def kind_of(item: Item) -> str:
    """Return an item's type; the SDK leaves it out of easy messages."""
    role = _text(item.get("role"))
    return _text(item.get("type")) or ("message" if role else "")


def begins_turn(item: Item) -> bool:
    """Return whether an item is a user's message."""
    return kind_of(item) == "message" and item.get("role") == "user"


def is_instruction(item: Item) -> bool:
    """Return whether an item is a system or developer message."""
    # A tuple, since a stored role may be what has no hash.
    return kind_of(item) == "message" and item.get("role") in ("system", "developer")


def _in_response(item: Item) -> bool:
    kind = kind_of(item)
    if kind == "message":
        return item.get("role") == "assistant"
    return kind.endswith("_call") or kind in _IN_RESPONSES


def _owners(items: Sequence[Item]) -> list[tuple[int, int | None]]:
    """Return what else can't be parted: a program's calls, and what was approved."""
    programs: dict[Key, int] = {}
    pairs: list[tuple[int, int | None]] = []
    for index, item in enumerate(items):
        kind = kind_of(item)
        if kind in {"program", "mcp_approval_request"}:
            programs[own_key(item)] = index
        caller = item.get("caller")
        if isinstance(caller, dict) and caller.get("type") == "program":
            key = "program", _text(caller.get("caller_id"))
            pairs.append((index, programs.get(key)))
        if kind == "mcp_call" and item.get("approval_request_id"):
            key = "mcp_approval_request", _text(item["approval_request_id"])
            pairs.append((index, programs.get(key)))
    return pairs


def own_key(item: Item) -> Key:
    """Return the key by which an output names this item."""
    kind = kind_of(item)
    return kind, _text(item.get("id" if kind == "mcp_approval_request" else "call_id"))


def call_key(output: Item) -> Key:
    """Return the key of the call that an output answers."""
    kind = kind_of(output)
    if kind == "mcp_approval_response":
        return CALL_OF[kind], _text(output.get("approval_request_id"))
    # The API's own local shell output has the call's id as its `id`.
    call_id = _text(output.get("call_id"))
    if call_id is None and kind == "local_shell_call_output":
        call_id = _text(output.get("id"))
    return CALL_OF[kind], call_id


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


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
