"""What a run opens for itself, and closes when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from django.utils.module_loading import import_string

from agent_sessions import handler
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.options import did_you_mean
from agent_sessions.exceptions import InvalidBackend, InvalidConsumer, UnreadableState
from agent_sessions.reports import leave
from agent_sessions.runs.failures import HOOK_SECONDS, logs_tracebacks
from agent_sessions.runs.resuming import refuses_all, restore
from agent_sessions.runs.setup import RunSetup

if TYPE_CHECKING:
    from agents import RunState
    from agents.memory import Session

    from agent_sessions.runs.active import ActiveRun

logger = logging.getLogger("agent_sessions.runs")

# What open_run() may give in place of what the get_…() have chosen.
FIELDS = ("agent", "context", "run_config", "hooks", "error_handlers", "max_turns")


@asynccontextmanager
async def opened(
    run: ActiveRun, state: RunState[Any] | None
) -> AsyncIterator[RunState[Any] | None]:
    """Open what a run's setup says, and close it when the run has ended.

    A paused run's state is rebuilt with the agent that was opened.
    """
    if run.setup.open_run is None:
        yield state or await _rebuilt(run)
        return
    async with _closed_at_last(run.setup.open_run(run.request), run) as given:
        if given is not None:
            run.setup = changed(run.setup, given)
        yield await _rebuilt(run)


async def _rebuilt(run: ActiveRun) -> RunState[Any] | None:
    """Return the state of a paused run; None if there is none, or all is refused."""
    if run.waiting is None:
        return None
    try:
        return await restore(run.waiting, run.request, run.setup)
    except UnreadableState:
        if refuses_all(run.request):
            return None
        raise


def changed(setup: RunSetup, given: Any) -> RunSetup:
    """Return a setup with what open_run() has given. Raise InvalidConsumer."""
    if not isinstance(given, Mapping):
        raise InvalidConsumer(
            f"open_run() yields a dict or None, not a {type(given).__name__}."
        )
    if unknown := sorted(map(str, given.keys() - set(FIELDS))):
        raise InvalidConsumer(
            f"open_run() gave {', '.join(unknown)}. "
            f"{did_you_mean(unknown, FIELDS)}It may give: {', '.join(FIELDS)}."
        )
    return replace(setup, **given)


@asynccontextmanager
async def _closed_at_last(context: Any, run: ActiveRun) -> AsyncIterator[Any]:
    """Enter and leave a project's context; what fails at its end is logged alone."""
    if not isinstance(context, AbstractAsyncContextManager):
        raise InvalidConsumer(
            "open_run() is an async context manager: an async generator below "
            f"@contextlib.asynccontextmanager. It gave a {type(context).__name__}."
        )
    given = await context.__aenter__()
    try:
        yield given
    except BaseException as exc:
        await _close(context, run, exc)
        raise
    else:
        await _close(context, run, None)


async def _close(
    context: AbstractAsyncContextManager[Any],
    run: ActiveRun,
    exc: BaseException | None,
) -> None:
    told = (None, None, None) if exc is None else (type(exc), exc, exc.__traceback__)
    try:
        async with asyncio.timeout(HOOK_SECONDS):
            await context.__aexit__(*told)
    except (Exception, BaseExceptionGroup) as error:
        if error is exc:
            return
        leave(error, before=exc)
        logger.error(
            "open_run() of run %r could not close (%s)",
            run.run_id,
            type(error).__name__,
            exc_info=error if logs_tracebacks() else None,
            extra={"run_id": run.run_id, "error_type": type(error).__name__},
        )


# -- the session -----------------------------------------------------------------------

_METHODS = ("get_items", "add_items", "pop_item", "clear_session")


async def open_session(
    setup: RunSetup, store: BaseSessionBackend, key: SessionKey
) -> Session:
    """Open the session that the Runner gets: the store's, or what wraps it.

    First that of the alias, then the consumer's. Raises TypeError where that is no
    session, and InvalidBackend.
    """
    session: Any = handler.open_session(store, key)
    for name, wrap in (
        ("The option run_session", _option(store)),
        ("get_session()", setup.wrap_session),
    ):
        if wrap is not None:
            session = wrap(session)
            session = await session if isawaitable(session) else session
            _check_session(name, session)
    return session  # type: ignore[no-any-return]


def _option(store: BaseSessionBackend) -> Callable[[Any], Any] | None:
    wrap = store.options["run_session"]
    if not isinstance(wrap, str):
        return wrap  # type: ignore[no-any-return]
    try:
        return import_string(wrap)  # type: ignore[no-any-return]
    except ImportError as exc:
        raise InvalidBackend(
            f"AGENT_SESSIONS[{store.alias!r}]: can't import run_session {wrap!r}.",
            hint="It is the dotted path of a function that gets a session.",
            id="agent_sessions.E008",
        ) from exc


def _check_session(name: str, session: Any) -> None:
    if any(kind.__name__ == "EncryptedSession" for kind in type(session).__mro__):
        # Ours, or the SDK's. The events of the run would lie beside it unencrypted.
        raise InvalidConsumer(
            f"{name} gave an EncryptedSession, but only the alias knows how to encrypt "
            "what is told of a run. Use EncryptedBackend as the alias."
        )
    missing = [
        method for method in _METHODS if not callable(getattr(session, method, None))
    ]
    if missing:
        raise TypeError(
            f"{name} gave a {type(session).__name__}, which is no session: it lacks "
            f"{', '.join(missing)}. Return the session that it gets, or one around it."
        )
