"""The base of every window: a callback that keeps a part of the history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from agent_sessions.items import Item


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
