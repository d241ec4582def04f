"""Windows that leave out what is old: turns, tokens or tool outputs; several as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from itertools import takewhile
from typing import Any, overload

from agent_sessions.items import Item
from agent_sessions.items.kinds import KINDS, tool_name, type_and_role
from agent_sessions.windows.links import find_calls, is_instruction, lay_out
from agent_sessions.windows.tokens import TokenCounter, count_tokens


class Window(ABC):
    """A `session_input_callback` that chooses which items of the history are sent.

    What it returns is made of the very objects that it was given, in their order, and
    ends with all of the new input: so the SDK stores the new input and nothing else.
    """

    __slots__ = ()

    def __call__(self, history: list[Any], new: list[Any]) -> list[Any]:
        """Return the input of a run, as the SDK asks its session_input_callback for it."""
        return [*self.cut(history, new), *new]

    @abstractmethod
    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history` beside `fixed`, which stays in any case."""


def check_count(name: str, value: int, least: int) -> None:
    """Refuse a number that can't be meant."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number from {least} up.")


# As the SDK's own; naming that one would import the SDK.
SessionInputCallback = Callable[[list[Any], list[Any]], Any]


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
    return join(windows) if len(windows) == len(callbacks) else Callbacks(callbacks)


def join(windows: Sequence[Window]) -> Window:
    """Chain windows into a window."""
    return Windows(tuple(windows)) if windows else Everything()


@dataclass(frozen=True, slots=True)
class Everything(Window):
    """Send the whole history, but for outputs without their calls."""

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        return lay_out(history, fixed).since(0)


@dataclass(frozen=True, slots=True)
class Windows(Window):
    """See chain()."""

    windows: tuple[Window, ...]

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        for window in self.windows:
            history = window.cut(history, fixed)
        return list(history)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """See chain(); async, because any of the callbacks may be."""

    callbacks: tuple[SessionInputCallback, ...]

    async def __call__(self, history: list[Any], new: list[Any]) -> list[Any]:
        """Return the input of a run: what all callbacks leave, in their order."""
        # An item is told by its identity, as the SDK does it: equal ones may be both
        # in the history and in the new input. The lists keep the objects alive.
        old = {id(item) for item in [*history]}
        given = [*history, *new]
        for callback in self.callbacks:
            past = [item for item in given if id(item) in old]
            rest = [item for item in given if id(item) not in old]
            if isinstance(callback, Window):
                # What an earlier callback put between stays where it is.
                kept = {id(item) for item in callback.cut(past, rest)}
                given = [i for i in given if id(i) in kept or id(i) not in old]
            else:
                given = await _settle(callback(past, rest))
        return given


async def _settle(value: Awaitable[list[Any]] | list[Any]) -> list[Any]:
    result = await value if isawaitable(value) else value
    if not isinstance(result, list):
        raise TypeError(
            f"A session_input_callback returned {type(result).__name__}; it must "
            "return the list of items to send."
        )
    return result


def last_turns(count: int) -> Window:
    """Send the newest `count` turns of the history, and the new input.

    A turn begins at a user's message; what stands before the first is one too.
    """
    check_count("count", count, 1)
    return LastTurns(count)


def token_budget(
    max_tokens: int, *, counter: TokenCounter | None = None, at_least: int = 1
) -> Window:
    """Send as many of the newest turns as fit into `max_tokens` with the new input.

    `counter` gives the tokens of one item; None is `count_tokens`. The newest
    `at_least` turns of the history are sent even where they don't fit; with 0 nothing
    but the new input may go beyond the budget. The agent's instructions and tools are
    not part of the history and not counted.
    """
    check_count("max_tokens", max_tokens, 1)
    check_count("at_least", at_least, 0)
    if counter is not None and not callable(counter):
        raise TypeError(f"counter is a function of an item, not {counter!r}.")
    return TokenBudget(max_tokens, counter or count_tokens, at_least)


def whole_turns() -> Window:
    """Begin with the first user's message, where a session's limit cut through a turn."""
    return WholeTurns()


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
    return SystemPrefix(windows[0] if len(windows) == 1 else join(windows))


@dataclass(frozen=True, slots=True)
class LastTurns(Window):
    """See last_turns()."""

    count: int

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        layout = lay_out(history, fixed)
        return layout.since(layout.last - self.count + 1)


@dataclass(frozen=True, slots=True)
class TokenBudget(Window):
    """See token_budget()."""

    max_tokens: int
    counter: TokenCounter
    at_least: int = 1

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        layout = lay_out(history, fixed)
        turns: dict[int, list[Item]] = {}
        for item, turn in zip(history, layout.turns, strict=True):
            if turn is not None:
                turns.setdefault(turn, []).append(item)
        # What can't be parted from the new input goes with it.
        bound = turns.pop(layout.last + 1, [])
        spent = self._cost(fixed) + self._cost(bound)
        first = layout.last + 1
        for number, turn in enumerate(sorted(turns, reverse=True)):
            spent += self._cost(turns[turn])
            if spent > self.max_tokens and number >= self.at_least:
                break
            first = turn
        return layout.since(first)

    def _cost(self, items: Sequence[Item]) -> int:
        return sum(self.counter(item) for item in items)


@dataclass(frozen=True, slots=True)
class WholeTurns(Window):
    """See whole_turns()."""

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        return lay_out(history, fixed).since(1)


@dataclass(frozen=True, slots=True)
class SystemPrefix(Window):
    """See keep_system_prefix()."""

    window: Window

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        prefix = list(takewhile(is_instruction, history))
        rest = history[len(prefix) :]
        return [*prefix, *self.window.cut(rest, [*prefix, *fixed])]


# -- the text of old tool outputs ------------------------------------------------------

MARKER = "[older tool output left out]"


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
    check_count("keep_turns", keep_turns, 0)
    check_count("keep_characters", keep_characters, 0)
    if isinstance(keep_tools, str):
        raise TypeError(f"keep_tools is {keep_tools!r}; give a list of tools' names.")
    return OldToolOutputs(keep_turns, keep_characters, frozenset(keep_tools), marker)


@dataclass(frozen=True, slots=True)
class OldToolOutputs(Window):
    """See drop_old_tool_outputs()."""

    keep_turns: int
    keep_characters: int
    keep_tools: frozenset[str]
    marker: str

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        layout = lay_out(history, fixed)
        calls = find_calls(history)
        kept = []
        for index, (item, turn) in enumerate(zip(history, layout.turns, strict=True)):
            if turn is None:
                continue
            kept.append(item)
            call = calls.get(index)
            source = item if call is None else history[call]
            if turn <= layout.last - self.keep_turns and not self._keeps(source):
                self._shorten(item)
        return kept

    def _keeps(self, call: Item) -> bool:
        names = tool_name(call, type_and_role(call)[0]), call.get("name")
        return any(isinstance(n, str) and n in self.keep_tools for n in names)

    def _shorten(self, item: Item) -> None:
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
