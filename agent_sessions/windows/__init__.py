"""Windows on a history: ready `session_input_callback`s for the SDK's RunConfig.

They choose what a model sees and change nothing that is stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from itertools import takewhile
from typing import Any, overload

from agent_sessions.items import Item
from agent_sessions.items.kinds import KINDS, tool_name, type_and_role
from agent_sessions.windows.links import find_calls, is_instruction, lay_out
from agent_sessions.windows.tokens import (
    TokenCounter,
    count_tokens,
    estimate_tokens,
    tiktoken_counter,
)

__all__ = [
    "MARKER",
    "SessionInputCallback",
    "TokenCounter",
    "Window",
    "chain",
    "count_tokens",
    "drop_old_tool_outputs",
    "estimate_tokens",
    "keep_system_prefix",
    "last_turns",
    "tiktoken_counter",
    "token_budget",
    "whole_turns",
]

# What stays of a history beside items that stay in any case.
Cut = Callable[[Sequence[Item], Sequence[Item]], list[Item]]
# As the SDK's own; naming that one would import the SDK.
SessionInputCallback = Callable[[list[Any], list[Any]], Any]

MARKER = "[older tool output left out]"


@dataclass(frozen=True, slots=True)
class Window:
    """A `session_input_callback` that chooses which items of the history are sent.

    What it returns is made of the very objects that it was given, in their order, and
    ends with all of the new input: so the SDK stores the new input and nothing else.
    """

    name: str
    cut: Cut

    def __call__(self, history: list[Any], new: list[Any]) -> list[Any]:
        """Return the input of a run, as the SDK asks its session_input_callback for it."""
        return [*self.cut(history, new), *new]

    def __repr__(self) -> str:
        return self.name


@overload
def chain(*callbacks: Window) -> Window: ...
@overload
def chain(*callbacks: SessionInputCallback) -> SessionInputCallback: ...
def chain(*callbacks: SessionInputCallback) -> SessionInputCallback:
    """Apply several callbacks, each to what the one before it left.

    Callbacks of your own may be among them, plain or async. What one adds is new input
    to those after it, and is stored as the SDK stores it.
    """
    for callback in callbacks:
        if isinstance(callback, type) or not callable(callback):
            raise TypeError(f"chain() takes callbacks, not {callback!r}.")
    windows = [callback for callback in callbacks if isinstance(callback, Window)]
    if len(windows) == len(callbacks):
        return _join(windows)

    # Async, because any of the callbacks may be.
    async def apply(history: list[Any], new: list[Any]) -> list[Any]:
        # An item is told by its identity, as the SDK does it: equal ones may be both
        # in the history and in the new input. The lists keep the objects alive.
        old = {id(item) for item in [*history]}
        given = [*history, *new]
        for callback in callbacks:
            past = [item for item in given if id(item) in old]
            rest = [item for item in given if id(item) not in old]
            if isinstance(callback, Window):
                # What an earlier callback put between stays where it is.
                kept = {id(item) for item in callback.cut(past, rest)}
                given = [i for i in given if id(i) in kept or id(i) not in old]
            else:
                given = await _settle(callback(past, rest))
        return given

    return apply


def _join(windows: Sequence[Window]) -> Window:
    """Chain windows into a window; none is one that sends the whole history."""
    if len(windows) == 1:
        return windows[0]

    def cut(history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        for window in windows:
            history = window.cut(history, fixed)
        return list(history)

    name = f"chain({', '.join(map(repr, windows))})"
    return Window(name, cut if windows else _since(0))


def _since(first: int) -> Cut:
    """Return a cut before a turn."""
    return lambda history, fixed: lay_out(history, fixed).since(first)


async def _settle(value: Awaitable[list[Any]] | list[Any]) -> list[Any]:
    result = await value if isawaitable(value) else value
    if not isinstance(result, list):
        raise TypeError(
            f"A session_input_callback returned {type(result).__name__}; it must "
            "return the list of items to send."
        )
    return result


def _check_count(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number from {least} up.")


def last_turns(count: int) -> Window:
    """Send the newest `count` turns of the history, and the new input.

    A turn begins at a user's message; what stands before the first is one too.
    """
    _check_count("count", count, 1)

    def cut(history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        layout = lay_out(history, fixed)
        return layout.since(layout.last - count + 1)

    return Window(f"last_turns({count})", cut)


def whole_turns() -> Window:
    """Begin with the first user's message, where a session's limit cut through a turn."""
    return Window("whole_turns()", _since(1))


def token_budget(
    max_tokens: int, *, counter: TokenCounter | None = None, at_least: int = 1
) -> Window:
    """Send as many of the newest turns as fit into `max_tokens` with the new input.

    `counter` gives the tokens of one item; None is `count_tokens`. The newest
    `at_least` turns of the history are sent even where they don't fit; with 0 nothing
    but the new input may go beyond the budget. The agent's instructions and tools are
    not part of the history and not counted.
    """
    _check_count("max_tokens", max_tokens, 1)
    _check_count("at_least", at_least, 0)
    if counter is not None and not callable(counter):
        raise TypeError(f"counter is a function of an item, not {counter!r}.")
    count = counter or count_tokens

    def cut(history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        layout = lay_out(history, fixed)
        turns: dict[int, list[Item]] = {}
        for item, turn in zip(history, layout.turns, strict=True):
            if turn is not None:
                turns.setdefault(turn, []).append(item)
        # What can't be parted from the new input goes with it.
        bound = turns.pop(layout.last + 1, [])
        spent = sum(map(count, [*fixed, *bound]))
        first = layout.last + 1
        for number, turn in enumerate(sorted(turns, reverse=True)):
            spent += sum(map(count, turns[turn]))
            if spent > max_tokens and number >= at_least:
                break
            first = turn
        return layout.since(first)

    counted = f", counter={counter!r}" if counter else ""
    return Window(f"token_budget({max_tokens:_}{counted})", cut)


def keep_system_prefix(*windows: Window) -> Window:
    """Keep the system and developer messages that the history begins with.

    The windows cut only what follows. A token budget counts the kept messages.
    """
    for window in windows:
        if not isinstance(window, Window):
            raise TypeError(
                f"keep_system_prefix() takes windows, not {window!r}. Put callbacks of "
                "your own beside it: chain(mine, keep_system_prefix(...))."
            )
    inner = _join(windows)

    def cut(history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        prefix = list(takewhile(is_instruction, history))
        rest = history[len(prefix) :]
        return [*prefix, *inner.cut(rest, [*prefix, *fixed])]

    return Window(f"keep_system_prefix({inner!r})", cut)


def drop_old_tool_outputs(
    keep_turns: int = 1,
    *,
    keep_characters: int = 0,
    keep_tools: Collection[str] = (),
    marker: str = MARKER,
) -> Window:
    """Send a short marker instead of what tools gave in older turns.

    The newest `keep_turns` turns of the history stay whole, and so does what the tools
    named in `keep_tools` gave. `keep_characters` leaves the beginning of each output.
    Calls stay with their arguments, and an output is replaced only by a shorter one.
    """
    _check_count("keep_turns", keep_turns, 0)
    _check_count("keep_characters", keep_characters, 0)
    if isinstance(keep_tools, str):
        raise TypeError(f"keep_tools is {keep_tools!r}; give a list of tools' names.")
    outputs = _OldOutputs(keep_characters, frozenset(keep_tools), marker)

    def cut(history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        layout = lay_out(history, fixed)
        calls = find_calls(history)
        kept = []
        for index, (item, turn) in enumerate(zip(history, layout.turns, strict=True)):
            if turn is None:
                continue
            kept.append(item)
            call = calls.get(index)
            source = item if call is None else history[call]
            if turn <= layout.last - keep_turns and not outputs.keeps(source):
                outputs.shorten(item)
        return kept

    return Window(f"drop_old_tool_outputs({keep_turns})", cut)


@dataclass(frozen=True, slots=True)
class _OldOutputs:
    keep_characters: int
    keep_tools: frozenset[str]
    marker: str

    def keeps(self, call: Item) -> bool:
        names = tool_name(call, type_and_role(call)[0]), call.get("name")
        return any(isinstance(n, str) and n in self.keep_tools for n in names)

    def shorten(self, item: Item) -> None:
        # In place: the SDK knows the history by its objects. A changed copy would be
        # new to it, and stored again in every run.
        kind = KINDS.get(type_and_role(item)[0])
        if kind is None or not kind.gave:
            return
        field = kind.gave
        value = item.get(field)
        if kind.texts:
            if isinstance(value, list):
                item[field] = [self._shorten_parts(part, kind.texts) for part in value]
        elif isinstance(value, str):
            item[field] = self._short(value)
        elif isinstance(value, list):
            item[field] = self._short_list(value)

    def _shorten_parts(self, result: Any, names: tuple[str, ...]) -> Any:
        if not isinstance(result, dict):
            return result
        changed = {
            name: self._short(result[name])
            for name in names
            if isinstance(result.get(name), str)
        }
        return result | changed

    def _short_list(self, content: list[Any]) -> Any:
        """Shorten an output of several parts; images and files go as a whole."""
        texts = [
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        text = "\n".join(texts)
        short = self._cut(text)
        only_text = len(texts) == len(content)
        return content if only_text and len(short) >= len(text) else short

    def _short(self, text: str) -> str:
        short = self._cut(text)
        return short if len(short) < len(text) else text

    def _cut(self, text: str) -> str:
        if not self.keep_characters:
            return self.marker
        return f"{text[: self.keep_characters]}\n{self.marker}"
