"""One run: a task of its own that drives the SDK and tells what happens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Literal

from django.db import InterfaceError, OperationalError
from django.utils import timezone

from agent_sessions.agui import EventMapper, RunRequest, interrupts, user_items
from agent_sessions.approvals import Paused, Pending
from agent_sessions.backends.reading import afind_head, find_newest
from agent_sessions.backends.wrapping import innermost
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import AgentRun
from agent_sessions.reports import guarded
from agent_sessions.runs import records
from agent_sessions.runs.failures import (
    failure_code,
    log_failure,
    message_for,
    question_for,
    report_failure,
)
from agent_sessions.runs.heartbeat import Pulse, heart
from agent_sessions.runs.log import Event, EventLog, Frame, Joining
from agent_sessions.runs.naming import find_ids
from agent_sessions.runs.opening import opened
from agent_sessions.runs.resuming import dump_state, refusals
from agent_sessions.runs.setup import (
    Conversation,
    RunSetup,
    find_agent,
    open_session,
    runner_options,
)
from agent_sessions.runs.sync import read_page, restated, shown
from agent_sessions.runs.turns import (
    Words,
    checks_answers,
    clear_blocked,
    newest_turn,
    take_up,
)
from agent_sessions.times import aware
from agent_sessions.usage import Spent, remember, since, snapshot, trace_of

if TYPE_CHECKING:
    from agents import RunResultStreaming, RunState
    from agents.memory import Session
    from agents.usage import Usage

logger = logging.getLogger("agent_sessions.runs")

Status = AgentRun.Status
# Seconds between the attempts to write a run's end while the database is away.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 5.0


class ActiveRun:
    """A run that is going on, or has just ended: its task and its event log."""

    def __init__(
        self,
        conversation: Conversation,
        request: RunRequest,
        setup: RunSetup,
        lease: records.Lease,
        emit: Callable[[ActiveRun, Frame], None],
    ) -> None:
        self.conversation = conversation
        self.request = request
        self.setup = setup
        self.lease = lease
        self.ended = False
        # The paused run that it goes on from, or whose calls it refuses.
        self.waiting: Pending | None = None
        # Whether its messages are stored already, by a run that failed.
        self.goes_on = False
        self.task: asyncio.Task[None] | None = None
        self.log = EventLog(
            request.run_id,
            max_events=setup.limits.log_events,
            max_bytes=setup.limits.log_bytes,
        )
        self._emit = emit
        self._mapper = EventMapper(
            thread_id=conversation.session_id,
            run_id=request.run_id,
            options=setup.options,
        )
        self._base: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if lease.base is not None:
            self._base.set_result(lease.base)
        self._session: Session | None = None
        self._result: RunResultStreaming | None = None
        self._before: Usage | None = None
        self._abort_mode: Literal["immediate", "after_turn"] | None = None
        self._lost = False
        # How the run ended, as long as its row doesn't say so.
        self._unwritten: tuple[str, str, Paused | None] | None = None
        self._is_written = False
        limits = setup.limits
        self._joining = Joining(self._say, limits.merge_interval, limits.merge_size)
        self._words = Words()

    @property
    def run_id(self) -> str:
        """The run's id, as its client chose it."""
        return self.request.run_id

    @property
    def _asked(self) -> int:
        """How many messages of the user it answers, also after an approval."""
        if self.waiting is not None:
            return self.waiting.paused.asked
        return len(self.request.user_messages)

    async def base(self) -> int:
        """Return the last position before the run, where a replay's snapshot ends."""
        return await asyncio.shield(self._base)

    def abort(self, mode: Literal["immediate", "after_turn"] = "immediate") -> None:
        """Ask the run to stop at once or after its turn."""
        self._abort_mode = mode
        if self._result is not None and not self.ended:
            self._result.cancel(mode=mode)

    @guarded
    async def run(self, state: RunState[Any] | None = None) -> None:
        """Run to the end, whatever it is; `state` resumes a paused run."""
        self._publish([self._mapper.started(self.request.user_messages)])
        limit = asyncio.timeout(self.setup.limits.run_timeout)
        failure: Exception | None = None
        with self._kept_lease():
            try:
                async with limit, opened(self, state) as rebuilt:
                    await self._stream(rebuilt)
            except asyncio.CancelledError:
                # The loop is shutting down.
                await self._conclude(self._end_cancelled())
                raise
            except LeaseLost:
                await self._conclude(self._end_failed("interrupted"))
            except Exception as exc:
                code = "timeout" if limit.expired() else failure_code(exc)
                failure = exc
                log_failure(self.run_id, code, exc)
                await self._conclude(self._end_failed(code))
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
            again = await take_up(session, items, stopped=stopped)
        if again:
            self.goes_on, items = True, []
            # Its message is shown with the id that it is stored under, and once.
            self._publish([await self._restated()])
        if self.waiting is not None and state is None:
            _, turn = await newest_turn(session)
            closing: list[Any] = refusals(self.waiting, self.request, turn)
            await session.add_items(closing)
            self._publish([await self._restated()])
        if not self._base.done():
            # Its positions may be given again, so not before what was dropped.
            self._base.set_result(await afind_head(store, key))
        options = runner_options(setup, session, self.conversation.session_id, again)
        if state is not None:
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

    @contextlib.contextmanager
    def _kept_lease(self) -> Iterator[None]:
        """Beat for the run while it goes on."""
        threads = self.conversation.backend.threads
        pulse = Pulse(
            lambda: threads.run(records.beat, self.conversation, self.lease),
            self._lose,
            self.setup.limits.heartbeat,
        )
        # A caller's own connection serves no other thread.
        task = None if threads.serves_caller() else asyncio.create_task(pulse.run())
        if task is None:
            heart.start(pulse)
        try:
            yield
        finally:
            heart.stop(pulse)
            if task is not None:
                task.cancel()
            if not self._base.done():
                self._base.set_result(0)
            self._joining.flush()
            self.ended = True

    def _lose(self) -> None:
        self._lost = True
        if self._result is not None:
            self._result.cancel()

    # -- ending --------------------------------------------------------------------

    async def _conclude(self, end: Coroutine[Any, Any, None]) -> None:
        """End the run; clients are told in any case, also if that can't be written."""
        try:
            await end
        except Exception as exc:
            log_failure(self.run_id, "internal", exc)
            self._fail("internal")
            if self._unwritten is None and not self._is_written:
                self._unwritten = (Status.FAILED, "internal", None)
            elif not isinstance(exc, OperationalError | InterfaceError):
                # It would fail again: the lease ends by its age.
                self._unwritten = None

    async def _end(self) -> None:
        result = self._result
        if result is None:
            raise RuntimeError("a run can't end well before it began")
        if self._lost:
            await self._end_failed("interrupted")
        elif self._abort_mode is not None and result.final_output is None:
            await self._end_cancelled()
        elif result.interruptions:
            await self._pause(result)
        else:
            self._joining.flush()
            await self._finish(Status.COMPLETED)
            self._publish(self._mapper.finished(self._usage(), outcome="success"))

    async def _end_cancelled(self) -> None:
        self._joining.flush()
        await self._keep_words()
        await self._finish(Status.CANCELLED)
        self._publish(self._mapper.finished(self._usage(), outcome="cancelled"))

    async def _end_failed(self, code: str) -> None:
        self._joining.flush()
        session = self._session
        if code != "guardrail":
            await self._keep_words()
        elif session is not None:
            items, action = user_items(self.request), self.setup.blocked_messages
            await clear_blocked(session, self._asked, items, action)
        status = Status.INTERRUPTED if code == "interrupted" else Status.FAILED
        await self._finish(status, code)
        # What was refused has streamed already: it is taken back.
        last_words = [await self._restated()] if code == "guardrail" else []
        self._fail(code, *last_words)

    def _fail(self, code: str, *last_words: Event) -> None:
        words = message_for(code), self._usage()
        self._publish(self._mapper.error(code, *words, *last_words))

    async def _finish(
        self, status: str, code: str = "", paused: Paused | None = None
    ) -> None:
        """Close the row before clients hear of the end: then they may write on."""
        self._unwritten = (status, code, paused)
        outcome = await self._outcome(status, code)
        await self._in_thread(
            records.finish, self.conversation, self.lease, outcome, paused
        )
        self._unwritten, self._is_written = None, True

    async def _write_late(self) -> None:
        """Write the end as soon as the database is back, so that the lease ends."""
        pause = FIRST_PAUSE
        while self._unwritten is not None:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            await self._conclude(self._finish(*self._unwritten))

    async def _pause(self, result: RunResultStreaming) -> None:
        self._joining.flush()
        expires_at = timezone.now() + self.setup.limits.approval_timeout
        state = dump_state(result.to_state())
        asked = interrupts(result.interruptions, expires_at, message=question_for)
        paused = Paused(state, asked, aware(expires_at).timestamp(), self._asked)
        await self._finish(Status.WAITING, paused=paused)
        page = await read_page(self.conversation)
        messages, before = shown(page, self.setup.options)
        self._publish(
            self._mapper.interrupted(
                asked,
                messages=messages,
                before=before,
                usage=self._usage(),
            )
        )

    async def _keep_words(self) -> None:
        """Store what was said, unless guardrails were still to see it."""
        session, result, setup = self._session, self._result, self.setup
        if self._lost or session is None:
            return
        marked = innermost(self.conversation.backend).keeps_marks
        try:
            # Through what wraps the session, if anything does: it may change items.
            if result and not checks_answers(result.current_agent, setup.run_config):
                await self._words.keep(session, marked=marked)
        except Exception as exc:
            # The run has ended all the same, and its row is to say so.
            logger.info(
                "Run %r: the words of its answer were not kept (%s)",
                self.run_id,
                type(exc).__name__,
            )

    async def _outcome(self, status: str, code: str) -> records.Outcome:
        result, used = self._result, self._usage()
        base, head = await self._place()
        asked = [] if self.goes_on else self.request.user_messages
        start = self._base.result() if self._base.done() and not self._lost else None
        ids = await find_ids(self.conversation, start, asked, self._words.told)
        known: dict[str, Any] = {}
        if result is not None and used is not None:
            known = {
                "agent_name": result.current_agent.name,
                "trace_id": trace_of(result.trace),
            }
        return records.Outcome(
            status,
            Spent() if used is None else Spent.of(used),
            error_code=code,
            base=base,
            head=head,
            message_ids=ids,
            **known,
        )

    async def _place(self) -> tuple[int | None, int | None]:
        """Find the positions of the run's items, in a store of their own.

        Reading there also brings the session's row up to date.
        """
        if self.lease.base is not None or not self._base.done():
            return None, None
        conversation = self.conversation
        newest = await find_newest(conversation.backend, conversation.key)
        return self._base.result(), None if newest is None else newest.position

    def _usage(self) -> Usage | None:
        if self._result is None:
            return None
        return since(self._result.context_wrapper.usage, self._before)

    async def _in_thread(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        threads = self.conversation.backend.threads
        return await settle(threads.run(function, *args, **kwargs))

    # -- telling -------------------------------------------------------------------

    async def _restated(self) -> Event:
        """Return what replaces all that clients were shown by what is stored."""
        return restated(await read_page(self.conversation), self.setup.options)

    def _publish(self, events: list[Event]) -> None:
        """Number events and hand them on.

        Never awaits a listener: the SDK waits for the stream's consumer at the end of
        each turn, so a slow tab would slow down the model.
        """
        for event in events:
            self._words.follow(event)
            self._joining.put(event)

    def _say(self, event: Event) -> None:
        self._emit(self, self.log.append(event))
