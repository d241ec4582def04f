"""Runs that are started with the SDK's own Runner, recorded on a session."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from agents import Agent, AgentsException, RunHooks, __version__, get_current_trace

from agent_sessions.backends.base import BaseSessionBackend
from agent_sessions.backends.places import find_newest, find_newest_sync
from agent_sessions.backends.plain import PlainRun, Status
from agent_sessions.concurrency.settle import settle
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


@dataclass(frozen=True, slots=True)
class _Watched:
    """A run, the SDK's count for it, and what that said when the run began."""

    row: PlainRun
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
        row = PlainRun(session.backend, session.key)
        newest = None
        if not row.is_in_rows:
            newest = await find_newest(session.backend, session.key)
        await settle(
            session.backend.threads.run(
                row.begin,
                agent.name,
                resumed=resumed,
                newest=newest,
                model=model_of(agent)[:255],
                trace_id=trace_of(get_current_trace()),
                sdk_version=__version__[:32],
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
