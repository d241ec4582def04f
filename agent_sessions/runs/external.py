"""Runs that are started with the SDK's own Runner, recorded on a session."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from agents import Agent, AgentsException, RunHooks, __version__, get_current_trace
from django.db.models import F
from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.database.lineage import Lineages
from agent_sessions.backends.database.usage import opening
from agent_sessions.backends.reading import find_newest, find_newest_sync
from agent_sessions.backends.remote.erasure import enroll
from agent_sessions.backends.run_rows import Runs, Status, runs_of
from agent_sessions.concurrency.connections import transact
from agent_sessions.concurrency.settle import settle
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import opens_turn
from agent_sessions.models import AgentRun, Branch
from agent_sessions.reports import guard_public_methods
from agent_sessions.runs.failures import failure_code
from agent_sessions.usage import Spent, model_of, remember, since, snapshot, trace_of

if TYPE_CHECKING:
    from agents import (
        AgentHookContext,
        ModelResponse,
        RunContextWrapper,
        Usage,
    )
    from agents.memory import Session

    from agent_sessions.memory import BackendSession


PREFIX = "plain-"


class ExternalRun:
    """One such run: a row, written again after each response of the model.

    Only this object writes the row, so it knows what is counted already.
    """

    def __init__(self, backend: BaseSessionBackend, key: SessionKey) -> None:
        self.backend = backend
        self.directory = backend.directory
        self.key = key
        # Else the caller says which item of the store is the newest.
        self.is_in_rows = backend.in_database is not None
        self.run_id = f"{PREFIX}{uuid.uuid4().hex}"
        self.agent_name = ""
        self.status: str = Status.RUNNING
        self.error_code = ""
        self._runs: Runs = AgentRun._base_manager.none()
        self._branch: int | None = None
        self._head: int | None = 0
        self._resumed = False
        self._counted = Spent()

    def begin(
        self,
        agent_name: str,
        *,
        resumed: bool,
        newest: StoredItem | None = None,
        **columns: str,
    ) -> None:
        """Open the row. Raises SessionDoesNotExist for someone else's session."""
        using = self.directory.using
        self.agent_name, self._resumed = agent_name, resumed

        def open_row() -> None:
            enroll(self.backend, self.key)
            rows = self.directory.rows(self.key)
            # The session's row first, as every other writer takes it.
            rows.update(agent_name=agent_name[:255])
            session = rows.values_list("pk", flat=True).get()
            runs = runs_of(using, session)
            # A run without a last word: nothing tells when such a run breaks off.
            lost = runs.filter(status=Status.RUNNING, run_id__startswith=PREFIX)
            run_rows.end(lost, Status.INTERRUPTED, "interrupted")
            branch = self.directory.branches(self.key).first()
            if not self.is_in_rows:
                self._head = _before(newest, resumed=resumed)
            elif branch is not None:
                self._branch, self._head = branch.pk, branch.head
            run = run_rows.create(
                using,
                session,
                self.run_id,
                branch=branch,
                agent_name=agent_name,
                **columns,
            )
            self._runs = runs.filter(pk=run.pk)

        transact(using, open_row)

    def write(self, spent: Spent, newest: StoredItem | None = None) -> None:
        """Update the row and the session's counters."""
        counted = self._counted.counters()
        more = {name: n - counted[name] for name, n in spent.counters().items()}
        using = self.directory.using

        def update() -> None:
            self.directory.rows(self.key).update(
                agent_name=self.agent_name[:255],
                **{name: F(name) + used for name, used in more.items() if used},
            )
            run_rows.write(
                self._runs,
                status=self.status,
                agent_name=self.agent_name,
                error_code=self.error_code,
                finished_at=None if self.status == Status.RUNNING else timezone.now(),
                **self._place(using, newest),
                **spent.columns(),
            )

        transact(using, update)
        self._counted = spent

    def _place(self, using: str, newest: StoredItem | None) -> dict[str, Any]:
        """Return where the run's items lie, and which turn it is about."""
        if not self.is_in_rows:
            if newest is None or self._head is None or newest.position <= self._head:
                return {}
            return {
                "first_position": self._head + 1,
                "last_position": newest.position,
                "turn": newest.turn,
            }
        heads = Branch._base_manager.using(using).filter(pk=self._branch)
        head = heads.values_list("head", flat=True).first()
        if self._branch is None or not head:
            return {}
        opened = opening(using, Lineages(using), self._branch)
        first = (self._head or 0) + 1
        if opened is not None and not self._resumed:
            # Runner.run stores the user's message before its first hook.
            first = min(first, opened.position)
        wrote = first <= head
        return {
            "first_position": first if wrote else None,
            "last_position": head if wrote else None,
            "turn": opened.turn if opened and wrote else 0,
            "turn_item": opened.item if opened and wrote else None,
        }


def _before(newest: StoredItem | None, *, resumed: bool) -> int:
    """Return the last position before a run, whose message may be stored already."""
    if newest is None:
        return 0
    asked = newest.item is not None and opens_turn(newest.item)
    return newest.position - (asked and not resumed)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A run, the SDK's count for it, and what that said when the run began."""

    row: ExternalRun
    usage: Usage
    before: Usage

    def spent(self) -> Spent:
        return Spent.of(since(self.usage, self.before))


@guard_public_methods
class SessionHooks(RunHooks[Any]):
    """Record the runs of `Runner.run(..., session=session, hooks=hooks)`.

    Each run has one AgentRun row, written when it starts, after each response of the
    model and when it answers, so a run that breaks off keeps what it used until then.
    The SDK has no hook for a failure: as a context manager, sync or async, around the
    run, it also records how the run ended.

    Hooks of your own go into a subclass that calls these too.
    """

    def __init__(self, session: Session) -> None:
        """Take the session that runs use: ours, or one around it."""
        self.session = _find_own(session)
        self._open: dict[int, _Watched] = {}
        self._entered = False

    async def on_agent_start(
        self, context: AgentHookContext[Any], agent: Agent[Any]
    ) -> None:
        """Begin the row of a run, or note another agent."""
        run = self._open.get(id(context.usage))
        if run is None:
            await self._begin(context.usage, snapshot(context.usage), agent)
        else:
            await self._speaks(run, agent)

    async def on_llm_end(
        self,
        context: RunContextWrapper[Any],
        agent: Agent[Any],
        response: ModelResponse,
    ) -> None:
        """Count what a response used."""
        run = self._open.get(id(context.usage))
        if run is None:
            # A restored run goes on without a start, and counts on.
            before = since(context.usage, response.usage)
            run = await self._begin(context.usage, before, agent, resumed=True)
        remember(context, run.row.run_id)
        run.row.status = Status.RUNNING
        run.row.agent_name = agent.name
        await self._write(run)

    async def on_handoff(
        self,
        context: RunContextWrapper[Any],
        from_agent: Agent[Any],
        to_agent: Agent[Any],
    ) -> None:
        """Note the agent that goes on."""
        run = self._open.get(id(context.usage))
        if run is not None:
            await self._speaks(run, to_agent)

    async def on_agent_end(
        self, context: AgentHookContext[Any], agent: Agent[Any], output: Any
    ) -> None:
        """Note that an agent has given its answer."""
        run = self._open.get(id(context.usage))
        if run is None:
            return
        run.row.status = Status.COMPLETED
        await self._write(run)
        if not self._entered:
            del self._open[id(context.usage)]

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for run in self._end(exc):
            await self._write(run)

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for run in self._end(exc):
            session = self.session
            newest = None
            if not run.row.is_in_rows:
                newest = find_newest_sync(session.backend, session.key)
            run.row.write(run.spent(), newest)

    def _end(self, exc: BaseException | None) -> list[_Watched]:
        """End every open run, and return what was ended."""
        runs, self._open, self._entered = list(self._open.values()), {}, False
        for run in runs:
            answered = run.row.status == Status.COMPLETED
            if answered and not isinstance(exc, AgentsException):
                continue
            if exc is None or isinstance(exc, asyncio.CancelledError):
                run.row.status = Status.CANCELLED
            else:
                run.row.status = Status.FAILED
                run.row.error_code = failure_code(exc)
        return runs

    async def _begin(
        self, usage: Usage, before: Usage, agent: Agent[Any], *, resumed: bool = False
    ) -> _Watched:
        session = self.session
        row = ExternalRun(session.backend, session.key)
        newest = None
        if not row.is_in_rows:
            newest = await find_newest(session.backend, session.key)
        await settle(
            session.backend.threads.run(
                row.begin,
                agent.name,
                resumed=resumed,
                newest=newest,
                model=model_of(agent),
                trace_id=trace_of(get_current_trace()),
                sdk_version=__version__,
            )
        )
        run = self._open[id(usage)] = _Watched(row, usage, before)
        return run

    async def _speaks(self, run: _Watched, agent: Agent[Any]) -> None:
        if run.row.agent_name != agent.name:
            run.row.agent_name = agent.name
            await self._write(run)

    async def _write(self, run: _Watched) -> None:
        session, newest = self.session, None
        if not run.row.is_in_rows and run.row.status != Status.RUNNING:
            newest = await find_newest(session.backend, session.key)
        threads = session.backend.threads
        await settle(threads.run(run.row.write, run.spent(), newest))


def _find_own(session: Any) -> BackendSession:
    """Return the session of ours that others, such as one that compacts, are around."""
    found = session
    while not isinstance(getattr(found, "backend", None), BaseSessionBackend):
        found = getattr(found, "underlying_session", None)
        if found is None:
            kind = session if isinstance(session, type) else type(session)
            raise TypeError(
                f"SessionHooks can't record runs on a {kind.__name__}. Give a session "
                "of agent_sessions, such as get_session() returns."
            )
    return cast("BackendSession", found)
