"""What a run is made of: its conversation, its agent, its limits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, Literal

from django.db import connections
from django.db.models import Func, TextField

from agent_sessions.agui import RunRequest, StreamOptions
from agent_sessions.backends.base import BaseSessionBackend, SessionKey, make_key
from agent_sessions.backends.leases import RUN_SILENCE
from agent_sessions.backends.remote.erasure import enroll
from agent_sessions.backends.run_rows import Runs, runs_of
from agent_sessions.concurrency.connections import transact
from agent_sessions.exceptions import (
    InvalidConsumer,
    SessionDoesNotExist,
)
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.items.kinds import is_in_response, opens_turn
from agent_sessions.models import AgentSession
from agent_sessions.windows import (
    SessionInputCallback,
    chain,
    last_turns,
    token_budget,
    whole_turns,
)

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser


@dataclass(frozen=True, slots=True)
class Conversation:
    """An existing, owned session: its directory row's key and its backend."""

    pk: int
    backend: BaseSessionBackend
    key: SessionKey
    # The alias of the database in which find() has found the row.
    found_in: str | None = None
    # Tells the tables of tenants apart, which may have rows of the same keys.
    table: str = ""

    @property
    def session_id(self) -> str:
        """The id by which its owner knows the session."""
        return self.key.session_id

    @classmethod
    async def find(
        cls,
        session_id: str,
        *,
        user: AbstractBaseUser | None,
        backend: str = DEFAULT_ALIAS,
    ) -> Conversation:
        """Find a user's own session. Raises SessionDoesNotExist for any other."""
        store = sessions[backend]
        key = make_key(session_id, user)

        def find() -> tuple[tuple[int, str] | None, str]:
            using = store.directory.using
            return _place(store.directory.rows(key), using).first(), using

        found, using = await store.threads.run(find)
        if found is None:
            raise SessionDoesNotExist(session_id)
        pk, table = found
        return cls(pk, store, key, using, table)

    @classmethod
    def ensure(cls, backend: BaseSessionBackend, key: SessionKey) -> Conversation:
        """Find a session by its key, or make its row; it blocks.

        Raises SessionDoesNotExist for someone else's.
        """
        directory = backend.directory

        using = directory.using

        def find() -> tuple[int, str]:
            if not directory.rows(key).exists():
                enroll(backend, key)
            found: tuple[int, str] = _place(directory.rows(key), using).get()
            return found

        pk, table = transact(using, find)
        return cls(pk, backend, key, using, table)

    @property
    def using(self) -> str:
        """The alias of the database that has the session's row."""
        return self.found_in or self.backend.directory.using

    def runs(self) -> Runs:
        """Return the session's runs as a query set."""
        return runs_of(self.using, self.pk)

    def rows(self) -> Any:
        """Return the directory's row as a query set."""
        return self.backend.directory.rows(self.key).filter(pk=self.pk)

    def exists(self) -> bool:
        """Return whether the session is still there and its owner's."""
        found: bool = self.rows().exists()
        return found


def _place(rows: Any, using: str) -> Any:
    """Return the keys of sessions' rows, and the table that a connection has them in.

    Tenants may have a schema or a database each behind one alias.
    """
    column = {"postgresql": "tableoid::text", "mysql": "DATABASE()"}
    table = column.get(connections[using].vendor, "''")
    return rows.values_list("pk", Func(template=table, output_field=TextField()))


def create_conversation(
    user: AbstractBaseUser, *, backend: str = DEFAULT_ALIAS
) -> AgentSession:
    """Make an empty session with an id that can't be guessed."""
    store = sessions[backend]
    key = make_key(AgentSession.new_id(), user)
    transact(store.directory.using, partial(store.directory.create, key))
    return store.directory.rows(key).get()


if TYPE_CHECKING:
    from agents import Agent, RunConfig, RunErrorHandlers, RunHooks
    from agents.memory import Session

    from agent_sessions.runs.active import ActiveRun


@dataclass(frozen=True, slots=True)
class RunLimits:
    """How long a run may take, wait and be kept; durations in seconds."""

    # None leaves it to the SDK's default.
    max_turns: int | None = None
    # None is for ever.
    run_timeout: float | None = 600
    # A run that nobody listens to is cancelled after its turn; None lets it go on.
    detach_timeout: float | None = 60
    # How long a run may go on with its turn when its process is told to end.
    grace: float = 5
    heartbeat: float = 5
    stale_after: float = 15
    # How long an ended run's events are kept for replays.
    keep_log: float = 120
    # Text deltas are joined for so long, or up to so many characters.
    merge_interval: float = 0.05
    merge_size: int = 1024
    # A timedelta, or seconds as well.
    approval_timeout: timedelta = timedelta(days=1)
    # Whether open approvals must be answered before a person writes on. Otherwise a new
    # message closes them: the model is told that they were not approved.
    must_answer: bool = False

    def __post_init__(self) -> None:
        """Refuse what would fail, or let others take a run over, while runs go on.

        Raises InvalidConsumer.
        """
        timeout: Any = self.approval_timeout
        if _is_number(timeout):
            object.__setattr__(self, "approval_timeout", timedelta(seconds=timeout))
        elif not isinstance(timeout, timedelta):
            raise _wrong("approval_timeout", timeout, "a timedelta, or seconds")
        for name in ("run_timeout", "heartbeat", "stale_after"):
            value: Any = getattr(self, name)
            if value is None and name == "run_timeout":
                continue
            if not _is_number(value) or not value > 0:
                raise _wrong(name, value, "seconds, more than 0")
        for name in ("detach_timeout", "grace", "keep_log", "merge_interval"):
            value = getattr(self, name)
            if value is None and name == "detach_timeout":
                continue
            if not _is_number(value) or not value >= 0:
                raise _wrong(name, value, "seconds")
        for name in ("max_turns", "merge_size"):
            value = getattr(self, name)
            if not (value is None and name == "max_turns") and (
                type(value) is not int or value < 1
            ):
                raise _wrong(name, value, "a whole number of 1 or more")
        # Whoever else looks at the session, such as the doctor, waits for so long.
        most = min(self.stale_after, RUN_SILENCE.total_seconds())
        if self.heartbeat >= most:
            raise _wrong("heartbeat", self.heartbeat, f"less than {most:g} seconds")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(name: str, value: Any, wanted: str) -> InvalidConsumer:
    return InvalidConsumer(f"RunLimits: {name} is {value!r}. Give {wanted}.")


# So many items of a history are read where a window chooses among them.
WINDOW_ITEMS = 500
DEFAULT_WINDOW = chain(last_turns(50), token_budget(64_000))
# As it is, by a note in its place, or not at all.
Blocked = Literal["keep", "redact", "remove"]


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
    # What of a long history a model sees, as a session_input_callback; None is all.
    window: SessionInputCallback | None = None
    # What becomes of a message whose turn a guardrail has blocked.
    blocked_messages: Blocked = "keep"
    # Called with the run and its error once it has failed, plain or async.
    on_error: Callable[[ActiveRun, Exception], Any] | None = None
    # Gets the request, gives an async context manager that the run is in.
    open_run: Callable[[RunRequest], AbstractAsyncContextManager[Any]] | None = None


def runner_options(
    setup: RunSetup, session: Session, names: tuple[str, str], again: int = 0
) -> dict[str, Any]:
    """Return the arguments that the Runner gets beside agent, input and context.

    `names` are the ids of session and run, for traces. The newest `again` items of the
    history are those of a turn that a retry goes on with: a window gets them as new.
    """
    traced = _traced(setup.run_config, *names)
    options: dict[str, Any] = {
        "session": session,
        "run_config": _with_window(traced, setup.window, session, again),
        "hooks": setup.hooks,
        "error_handlers": setup.error_handlers,
    }
    # Left out, not None: that would be no limit at all.
    max_turns = setup.limits.max_turns if setup.max_turns is None else setup.max_turns
    if max_turns is not None:
        options["max_turns"] = max_turns
    return options


def _traced(config: Any, session_id: str, run_id: str) -> Any:
    """Name the session and the run in traces, unless the app names others."""
    from agents import RunConfig

    changes = {
        "group_id": _of(config, "group_id") or session_id,
        "trace_metadata": {
            "agent_sessions_run_id": run_id,
            **(_of(config, "trace_metadata") or {}),
        },
    }
    if isinstance(config, dict):
        # The Runner takes one too.
        return config | changes
    return replace(config or RunConfig(), **changes)


def _with_window(
    config: Any, window: SessionInputCallback | None, session: Session, again: int
) -> Any:
    """Read and send the newest of a history, unless the app has its own window."""
    from agents.memory import SessionSettings

    own = _of(config, "session_input_callback")
    changes: dict[str, Any] = {}
    if own is not None and again:
        changes = {"session_input_callback": _anew(own, again)}
    elif own is None and window is not None:
        settings = _of(config, "session_settings") or getattr(
            session, "session_settings", None
        )
        limit = _of(settings, "limit")
        if limit is None:
            limit = WINDOW_ITEMS
            changes = {"session_settings": SessionSettings(limit=limit)}
        changes["session_input_callback"] = _whole(window, limit, again)
    if isinstance(config, dict):
        return config | changes
    return replace(config, **changes)


def _anew(window: SessionInputCallback, again: int) -> SessionInputCallback:
    """Call a window with the newest items of a history as new ones."""

    def choose(history: list[Any], new: list[Any]) -> Any:
        first = max(len(history) - again, 0)
        return window(history[:first], [*history[first:], *new])

    return choose


def _whole(
    window: SessionInputCallback, limit: int, again: int
) -> SessionInputCallback:
    """Begin with a user's message where a history was not read to its start.

    Where a turn is longer than what was read, begin after a whole response.
    """

    def choose(history: list[Any], new: list[Any]) -> Any:
        chosen = window
        if len(history) >= limit and any(map(opens_turn, history)):
            chosen = chain(whole_turns(), window)
        elif len(history) >= limit:
            # A call that has lost its reasoning is refused by the API.
            history = list(dropwhile(is_in_response, history))
        return _anew(chosen, again)(history, new)

    return choose


def _of(settings: Any, name: str) -> Any:
    if isinstance(settings, dict):
        return settings.get(name)
    return getattr(settings, name, None)


def find_agent(root: Agent[Any], name: str) -> Agent[Any]:
    """Return the agent of that name among `root` and those it can hand off to.

    Return `root` if none has the name, so that a renamed agent starts afresh.
    """
    # Late: it imports the SDK, which views are imported without.
    from agent_sessions.memory.sdk import handoff_target

    pending, seen = [root], set()
    while pending:
        agent = pending.pop(0)
        if agent.name == name:
            return agent
        if id(agent) in seen:
            continue
        seen.add(id(agent))
        for target in agent.handoffs:
            reached: Any = handoff_target(target) or target
            if hasattr(reached, "handoffs"):
                pending.append(reached)
    return root
