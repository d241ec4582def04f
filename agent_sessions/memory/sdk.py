"""What is private in the SDK, and used: all of it, and only here. A test pins each name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

from django.views.decorators.debug import sensitive_variables


def handoff_target(handoff: Any) -> Any:
    """Return the agent that a handoff leads to; None where that can't be told."""
    reference = getattr(handoff, "_agent_ref", None)
    return None if reference is None else reference()


# -- Django's error reports ------------------------------------------------------------

# An error of a store comes to a view through the SDK's Runner, whose variables are the
# conversation. These frames are still running, so that only Django's own mark hides them,
# where DEBUG is off. It is a note that Django keeps beside the coroutine function: none
# of them is changed.

_SDK = "agents"


def mark_sdk() -> None:
    """Mark the coroutine functions of the SDK's modules, as far as they are imported."""
    mark = sensitive_variables()
    for code in {code for function in _functions() for code in _codes(function)}:
        cells = tuple(CellType() for _ in code.co_freevars)
        # Of a function, Django notes its file and its first line.
        mark(FunctionType(code, {}, code.co_name, None, cells))


def _functions() -> Iterator[FunctionType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != _SDK:
            continue
        for found in list(vars(module).values()):
            # Where it is defined, not where others import it.
            if getattr(found, "__module__", None) == name:
                yield from _functions_of(found)


def _functions_of(found: Any) -> Iterator[FunctionType]:
    members = vars(found).values() if inspect.isclass(found) else [found]
    for member in list(members):
        function = inspect.unwrap(getattr(member, "__func__", member))
        if inspect.isfunction(function):
            yield function


def _codes(function: FunctionType) -> Iterator[CodeType]:
    """Return the code of a function and of those inside it, if it is a coroutine's."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]
        if code.co_flags & inspect.CO_COROUTINE:
            yield code
