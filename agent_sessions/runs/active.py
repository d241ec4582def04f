"""One run: a task of its own that drives the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from agent_sessions.agui import user_items
from agent_sessions.backends.reading import afind_head
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import AgentRun
from agent_sessions.reports import guarded
from agent_sessions.runs import heartbeat, records
from agent_sessions.runs.failures import (
    failure_code,
    log_failure,
    report_failure,
)
from agent_sessions.runs.heartbeat import Pulse, beating
from agent_sessions.runs.opening import open_session, opened
from agent_sessions.runs.resuming import before_tools, refusals
from agent_sessions.runs.setup import find_agent, runner_options
from agent_sessions.runs.telling import ToldRun
from agent_sessions.runs.turns import (
    NOT_APPROVED,
    UNKNOWN_RESULT,
    close_calls,
    newest_turn,
    take_up,
)
from agent_sessions.usage import remember, snapshot

if TYPE_CHECKING:
    from agents import RunState

logger = logging.getLogger("agent_sessions.runs")

Status = AgentRun.Status


class ActiveRun(ToldRun):
    """A run that is going on, or has just ended: the task that drives the SDK."""

    task: asyncio.Task[None] | None = None
    _is_spent = False

    @cached_property
    def _spending(self) -> asyncio.Lock:
        return asyncio.Lock()

    @property
    def final_output(self) -> Any:
        """What the last agent has answered."""
        return self._result and self._result.final_output

    def abort(self, mode: Literal["immediate", "after_turn"] = "immediate") -> None:
        """Ask the run to stop at once or after its turn."""
        self._abort_mode = mode
        if self._result is not None and not self.ended:
            self._result.cancel(mode=mode)

    async def interrupt(self) -> None:
        """Stop after the turn, or at once when the grace for that is over.

        The process ends: whoever asked has not stopped the run, and may ask again.
        """
        self._process_ends = True
        self.abort("after_turn")
        if self.task is not None:
            await asyncio.wait({self.task}, timeout=self.setup.limits.grace)
            self.task.cancel()
            await asyncio.wait({self.task})

    @guarded
    async def run(self, state: RunState[Any] | None = None) -> None:
        """Run to the end, whatever it is; `state` resumes a paused run."""
        if not self.rows.number:
            # The start of one that was queued is told already.
            self._publish([self._mapper.started(self.request.user_messages)])
        limit = asyncio.timeout(self.setup.limits.run_timeout)
        failure: Exception | None = None
        with self._kept_lease():
            try:
                async with limit, opened(self, state) as rebuilt:
                    await self._stream(rebuilt)
            except asyncio.CancelledError:
                # The loop is shutting down.
                await self._conclude(self._end_failed("interrupted"))
                raise
            except LeaseLost:
                await self._conclude(self._end_failed("interrupted"), "interrupted")
            except Exception as exc:
                code = "timeout" if limit.expired() else failure_code(exc)
                failure = exc
                log_failure(self.run_id, code, exc)
                await self._conclude(self._end_failed(code), code)
            else:
                await self._conclude(self._end())
        if failure is not None:
            # Clients have heard of the end by now, and wait for nothing here.
            await report_failure(self, failure)
        await self._write_late()

    # -- running -------------------------------------------------------------------

    async def _stream(self, state: RunState[Any] | None) -> None:
        from agents import Runner

        setup, store = self.setup, self.conversation.backend
        key = self.conversation.key.fenced(self.lease.fence)
        session = self._session = await open_session(setup, store, key)
        items, again = user_items(self.request), 0
        if items and self.lease.is_retry:
            stopped = self.lease.last_status == Status.CANCELLED
            closed = await close_calls(
                session, NOT_APPROVED if stopped else UNKNOWN_RESULT
            )
            if closed:
                self._publish([await self._restated()])
            if not (closed and stopped):
                again = await take_up(session, items, stopped=stopped)
        if again:
            self.goes_on, items = True, []
            # Its message is shown with the id that it is stored under, and once.
            self._publish([await self._restated()])
        elif self.request.forks:
            # All tabs see the branch that begins here, and what is asked on it.
            asked = self.request.user_messages
            self._publish([await self._restated(asked=asked)])
        if self.waiting is not None and state is None:
            _, turn = await newest_turn(session)
            closing: list[Any] = refusals(self.waiting, self.request, turn)
            await session.add_items(closing)
            self._publish([await self._restated()])
        if not self._base.done():
            # Its positions may be given again, so not before what was dropped.
            self._base.set_result(await afind_head(store, key))
        names = self.conversation.session_id, self.run_id
        options = runner_options(setup, session, names, again)
        if state is not None:
            options["hooks"] = before_tools(self._spend, setup.hooks)
            result = Runner.run_streamed(setup.agent, state, **options)
        else:
            options |= {"input": items, "context": setup.context}
            agent = find_agent(setup.agent, self.lease.agent_name)
            result = Runner.run_streamed(agent, **options)
        self._result = result
        self._before = snapshot(result.context_wrapper.usage)
        remember(result.context_wrapper, self.run_id)
        if self._abort_mode is not None:
            result.cancel(mode=self._abort_mode)
        async for event in result.stream_events():
            self._words.hear(event)
            self._publish(self._mapper.map(event))

    async def _spend(self) -> None:
        """Note once that what was approved begins."""
        async with self._spending:
            if not self._is_spent:
                threads = self.conversation.backend.threads
                await settle(threads.run(records.spend, self.conversation, self.lease))
            self._is_spent = True

    @contextlib.contextmanager
    def _kept_lease(self) -> Iterator[None]:
        """Beat for the run while it goes on."""
        threads, using = self.conversation.backend.threads, self.conversation.using
        pulse = Pulse(
            lambda held: threads.run(heartbeat.beat, using, held),
            self._lose,
            self.setup.limits.heartbeat,
            lease=(self.conversation, self.lease),
            group=(id(threads), using),
        )
        try:
            with beating(pulse, in_thread=threads.serves_caller()):
                yield
        finally:
            if not self._base.done():
                self._base.set_result(0)
            self._joining.flush()
            self.ended = True

    def _lose(self) -> None:
        self._lost = True
        if self._result is not None:
            self._result.cancel()
