"""Hold a session's lease around runs of the SDK's own Runner."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agents import Agent, AgentsException, RunHooks, get_current_trace
from agents.usage import Usage
from django.db import Error

from agent_sessions.backends.reading import find_head, find_newest_sync
from agent_sessions.backends.run_rows import Status
from agent_sessions.concurrency.connections import own_connection, without_caller
from agent_sessions.concurrency.settle import settle, settle_or_undo
from agent_sessions.exceptions import AgentSessionError, LeaseLost, SessionBusy
from agent_sessions.memory import BackendSession
from agent_sessions.runs import heartbeat, records
from agent_sessions.runs.failures import failure_code
from agent_sessions.runs.heartbeat import Pulse, beating
from agent_sessions.runs.setup import Conversation, RunLimits
from agent_sessions.times import pauses
from agent_sessions.usage import Spent, model_of, remember, since, snapshot, trace_of

if TYPE_CHECKING:
    from agents import AgentHookContext, ModelResponse, RunContextWrapper


class HeldRun:
    """The run that holds a session: what `Runner.run()` gets, and what it used."""

    def __init__(
        self, session: BackendSession, conversation: Conversation, lease: records.Lease
    ) -> None:
        self.conversation = conversation
        self.lease = lease
        self.run_id = lease.run.run_id
        # The agent that spoke last in the session, for find_agent().
        self.agent_name = lease.agent_name
        # It writes only as long as the lease is held; else it raises LeaseLost.
        self.session = session.fenced(lease.fence)
        self.hooks: RunHooks[Any] = _Counting(self)
        self.is_lost = False
        self._base = lease.base
        if lease.base is None:
            with contextlib.suppress(AgentSessionError):
                self._base = find_head(session.backend, session.key)
        self._used: dict[int, tuple[Usage, Usage]] = {}
        self._agent: Agent[Any] | None = None
        self._trace_id = ""
        # None before the first agent.
        self._has_answered: bool | None = None

    def lose(self) -> None:
        """Note that the database has given the lease to another run."""
        self.is_lost = True

    def hear(self, usage: Usage, before: Usage, agent: Agent[Any]) -> None:
        """Note that an agent is at work, and count from `before` on."""
        self._used.setdefault(id(usage), (usage, before))
        self._agent, self._has_answered = agent, False
        self._trace_id = self._trace_id or trace_of(get_current_trace())

    def counts(self, usage: Usage) -> bool:
        """Return whether a run's usage is counted already."""
        return id(usage) in self._used

    def answered(self) -> None:
        """Note that an agent has given its answer."""
        self._has_answered = True

    def outcome(self, exc: BaseException | None) -> records.Outcome:
        """Return how the block has ended, for the run's row."""
        conversation, lease, agent = self.conversation, self.lease, self._agent
        status, code = self._status(exc)
        spent = Usage()
        for usage, before in self._used.values():
            spent.add(since(usage, before))
        head = None
        if lease.base is None:
            newest = find_newest_sync(conversation.backend, conversation.key)
            head = None if newest is None else newest.position
        return records.Outcome(
            status,
            Spent.of(spent) if self._used else Spent(),
            agent_name="" if agent is None else agent.name,
            error_code=code,
            trace_id=self._trace_id,
            model="" if agent is None else model_of(agent),
            base=self._base,
            head=head,
        )

    def _status(self, exc: BaseException | None) -> tuple[str, str]:
        if self.is_lost or isinstance(exc, LeaseLost):
            return Status.INTERRUPTED, "interrupted"
        if self._has_answered and not isinstance(exc, AgentsException):
            # What fails after the answer is not the run's.
            return Status.COMPLETED, ""
        if exc is None and self._has_answered is None:
            return Status.COMPLETED, ""
        if exc is None or not isinstance(exc, Exception):
            return Status.CANCELLED, ""
        return Status.FAILED, failure_code(exc)


class _Counting(RunHooks[Any]):
    """Hooks that tell a held run what the SDK does."""

    def __init__(self, run: HeldRun) -> None:
        self.run = run

    async def on_agent_start(
        self, context: AgentHookContext[Any], agent: Agent[Any]
    ) -> None:
        self.run.hear(context.usage, snapshot(context.usage), agent)

    async def on_llm_end(
        self,
        context: RunContextWrapper[Any],
        agent: Agent[Any],
        response: ModelResponse,
    ) -> None:
        remember(context, self.run.run_id)
        before = context.usage
        if not self.run.counts(context.usage):
            # A restored run goes on without a start, and counts on.
            before = since(context.usage, response.usage)
        self.run.hear(context.usage, before, agent)

    async def on_agent_end(
        self, context: AgentHookContext[Any], agent: Agent[Any], output: Any
    ) -> None:
        self.run.answered()


class Hold:
    """A block in which one run holds a session; see hold()."""

    def __init__(
        self, session: BackendSession, wait: float | None, limits: RunLimits
    ) -> None:
        if not isinstance(session, BackendSession):
            raise TypeError(
                f"hold() takes a session of agent_sessions, not a "
                f"{type(session).__name__}. Put what wraps it around run.session."
            )
        self._session = session
        self._limits = limits
        self._wait = wait
        self._exits = contextlib.ExitStack()

    # -- asynchronous --------------------------------------------------------------

    async def __aenter__(self) -> HeldRun:
        async def give_back(run: HeldRun) -> None:
            await self._threads.run(self._finish, asyncio.CancelledError())

        for pause in pauses(self._wait):
            try:
                begun = self._threads.run(self._begin)
                await settle_or_undo(begun, give_back)
                break
            except SessionBusy:
                if pause is None:
                    raise
            await asyncio.sleep(pause)
        in_thread = self._threads.serves_caller()
        self._exits.enter_context(beating(self._pulse(), in_thread=in_thread))
        return self.run

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.close()
        await settle(self._threads.run(self._finish, exc))

    # -- synchronous ---------------------------------------------------------------

    def __enter__(self) -> HeldRun:
        for pause in pauses(self._wait):
            try:
                self._begin()
                break
            except SessionBusy:
                if pause is None:
                    raise
            time.sleep(pause)
        # Others see nothing of a transaction that is open, and so no lease either.
        if not own_connection(self.run.conversation.using).in_atomic_block:
            pulse = self._pulse(loop=None, context=without_caller())
            self._exits.enter_context(beating(pulse, in_thread=True))
        return self.run

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.close()
        self._finish(exc)

    # -- inside --------------------------------------------------------------------

    @property
    def _threads(self) -> Any:
        return self._session.backend.threads

    def _begin(self) -> HeldRun:
        session = self._session
        conversation = Conversation.ensure(session.backend, session.key)
        taken: list[records.Lease] = []
        try:
            lease = records.begin(
                conversation,
                uuid.uuid4().hex,
                model="",
                # Nobody would close the calls in the history.
                limits=replace(self._limits, must_answer=True),
                taken=taken,
            )
        except Error:
            for lease in taken:
                # The commit may be done, though its answer was lost.
                with contextlib.suppress(Error):
                    records.give_back(conversation, lease)
            raise
        if lease is None:
            raise RuntimeError("a random id was used before")
        self.run = HeldRun(session, conversation, lease)
        return self.run

    def _finish(self, exc: BaseException | None) -> None:
        run = self.run
        records.finish(run.conversation, run.lease, run.outcome(exc))

    def _pulse(self, **options: Any) -> Pulse:
        run, threads, using = self.run, self._threads, self.run.conversation.using
        return Pulse(
            lambda held: threads.run(heartbeat.beat, using, held),
            run.lose,
            self._limits.heartbeat,
            lease=(run.conversation, run.lease),
            group=(id(threads), using),
            **options,
        )


def hold(
    session: BackendSession,
    *,
    wait: float | None = None,
    limits: RunLimits | None = None,
) -> Hold:
    """Hold a session for runs of your own, in an `async with` or a `with` block.

    `async with hold(session) as run: await Runner.run(agent, "Hello",
    session=run.session, hooks=run.hooks)`. The block is one run with its row and its
    lease. Entering it raises SessionBusy if another run goes on, after up to `wait`
    seconds, InterruptsPending and SessionDoesNotExist.
    """
    return Hold(session, wait, limits or RunLimits())
