"""Several callbacks as one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, overload

from agent_sessions.items import Item
from agent_sessions.windows.base import Window
from agent_sessions.windows.links import find_calls

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
        calls = find_calls([*history, *fixed])
        return [
            item
            for index, item in enumerate(history)
            if calls.get(index, index) is not None
        ]


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
