"""What a run is made of, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from django.utils.module_loading import import_string

from agent_sessions import handler
from agent_sessions.agui import StreamOptions
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.exceptions import InvalidBackend

if TYPE_CHECKING:
    from agents import Agent, RunConfig, RunErrorHandlers, RunHooks
    from agents.memory import Session

    from agent_sessions.runs.active import ActiveRun


@dataclass(frozen=True, slots=True)
class RunLimits:
    """How long a run may take, wait and be kept; durations in seconds."""

    # None leaves it to the SDK's default.
    max_turns: int | None = None
    run_timeout: float = 600
    # A run that nobody listens to is cancelled after its turn.
    detach_timeout: float = 60
    heartbeat: float = 20
    stale_after: float = 60
    # How long an ended run's events are kept for replays.
    keep_log: float = 120
    log_events: int = 2_000
    log_bytes: int = 1_000_000
    # Text deltas are joined for so long, or up to so many characters.
    merge_interval: float = 0.05
    merge_size: int = 1024
    approval_timeout: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class RunSetup:
    """The agent and everything else that one run gets."""

    agent: Agent[Any]
    context: Any = None
    run_config: RunConfig | None = None
    options: StreamOptions = field(default_factory=StreamOptions)
    limits: RunLimits = field(default_factory=RunLimits)
    hooks: RunHooks[Any] | None = None
    error_handlers: RunErrorHandlers[Any] | None = None
    # None leaves it to the limits.
    max_turns: int | None = None
    # Gets the store's session, gives the Runner's; plain or async.
    wrap_session: Callable[[Any], Any] | None = None
    # Called with the run and its error once it has failed, plain or async.
    on_error: Callable[[ActiveRun, Exception], Any] | None = None


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


def runner_options(
    setup: RunSetup, session: Session, session_id: str
) -> dict[str, Any]:
    """Return the arguments that the Runner gets beside agent, input and context."""
    options: dict[str, Any] = {
        "session": session,
        "run_config": _in_group(setup.run_config, session_id),
        "hooks": setup.hooks,
        "error_handlers": setup.error_handlers,
    }
    # Left out, not None: that would be no limit at all.
    max_turns = setup.limits.max_turns if setup.max_turns is None else setup.max_turns
    if max_turns is not None:
        options["max_turns"] = max_turns
    return options


_METHODS = ("get_items", "add_items", "pop_item", "clear_session")


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
    missing = [
        method for method in _METHODS if not callable(getattr(session, method, None))
    ]
    if missing:
        raise TypeError(
            f"{name} gave a {type(session).__name__}, which is no session: it lacks "
            f"{', '.join(missing)}. Return the session that it gets, or one around it."
        )


def _in_group(config: Any, session_id: str) -> Any:
    """Name the session as the traces' group, unless the app names another."""
    from agents import RunConfig

    if config is None:
        return RunConfig(group_id=session_id)
    if isinstance(config, dict):
        # The Runner takes one too.
        return {**config, "group_id": config.get("group_id") or session_id}
    return config if config.group_id else replace(config, group_id=session_id)


def find_agent(root: Agent[Any], name: str) -> Agent[Any]:
    """Return the agent of that name among `root` and those it can hand off to.

    Return `root` if none has the name, so that a renamed agent starts afresh.
    """
    pending, seen = [root], set()
    while pending:
        agent = pending.pop(0)
        if agent.name == name:
            return agent
        if id(agent) in seen:
            continue
        seen.add(id(agent))
        for target in agent.handoffs:
            reference = getattr(target, "_agent_ref", None)
            found: Any = target if reference is None else reference()
            if hasattr(found, "handoffs"):
                pending.append(found)
    return root
