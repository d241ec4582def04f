"""Windows that leave out what is old: by turns, by tokens, at a turn's beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from agent_sessions.items import Item
from agent_sessions.windows.base import Window, check_count
from agent_sessions.windows.chain import join
from agent_sessions.windows.links import is_instruction, lay_out
from agent_sessions.windows.tokens import TokenCounter, count_tokens


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
        first = layout.last - self.count + 1
        return [
            item
            for item, turn in zip(history, layout.turns, strict=True)
            if turn is not None and turn >= first
        ]


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
        return [
            item
            for item, turn in zip(history, layout.turns, strict=True)
            if turn is not None and turn >= first
        ]

    def _cost(self, items: Sequence[Item]) -> int:
        return sum(self.counter(item) for item in items)


@dataclass(frozen=True, slots=True)
class WholeTurns(Window):
    """See whole_turns()."""

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        layout = lay_out(history, fixed)
        return [
            item
            for item, turn in zip(history, layout.turns, strict=True)
            if turn is not None and turn > 0
        ]


@dataclass(frozen=True, slots=True)
class SystemPrefix(Window):
    """See keep_system_prefix()."""

    window: Window

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        prefix = list(takewhile(is_instruction, history))
        rest = history[len(prefix) :]
        return [*prefix, *self.window.cut(rest, [*prefix, *fixed])]
