"""What a run tells, to those who listen and to its rows, up to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from django.db import InterfaceError, OperationalError
from django.utils import timezone

from agent_sessions.agui import (
    LAST,
    EventMapper,
    RunRequest,
    interrupts,
    run_error,
    user_items,
)
from agent_sessions.approvals import Paused, Pending
from agent_sessions.backends.reading import find_newest
from agent_sessions.backends.wrapping import innermost
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import StoreBusy, StoreUnavailable
from agent_sessions.models import AgentRun
from agent_sessions.runs import records
from agent_sessions.runs.event_rows import About
from agent_sessions.runs.failures import (
    log_failure,
    message_for,
    question_for,
)
from agent_sessions.runs.log import Event, Frame, Joining
from agent_sessions.runs.naming import find_ids
from agent_sessions.runs.pages import read_page, restated, shown
from agent_sessions.runs.resuming import dump_state
from agent_sessions.runs.setup import (
    Conversation,
    RunSetup,
)
from agent_sessions.runs.turns import (
    UNKNOWN_RESULT,
    Block,
    Words,
    changes_items,
    checks_answers,
    close_calls,
)
from agent_sessions.runs.writing import RunLog
from agent_sessions.times import aware
from agent_sessions.usage import Spent, since, trace_of

if TYPE_CHECKING:
    from agents import RunResultStreaming
    from agents.memory import Session
    from agents.usage import Usage

logger = logging.getLogger("agent_sessions.runs")

Status = AgentRun.Status
# What a database or another store raises that is away for a while.
AWAY = (InterfaceError, OperationalError, StoreUnavailable, StoreBusy)
# Seconds between the attempts to write a run's end while the database is away.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 5.0
_AT_END = LAST | {"MESSAGES_SNAPSHOT"}


class ToldRun:
    """What a run tells its listeners and its rows, and how it ends for both."""

    def __init__(
        self,
        conversation: Conversation,
        request: RunRequest,
        setup: RunSetup,
        lease: records.Lease,
        emit: Callable[[Any, Frame], None],
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
        self.rows = RunLog(conversation, lease, self._about)
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
        self._process_ends = False
        # How the run ended, as long as its row doesn't say so.
        self._unwritten: tuple[str, str, Paused | None] | None = None
        self._is_written = False
        # The last events, as long as clients haven't heard them.
        self._last: list[Event] | None = None
        self._is_told = False
        # Whether clients were told of an end before it was written.
        self.told_early = False
        self.last_event: Event = {}
        limits = setup.limits
        self._joining = Joining(self._say, limits.merge_interval, limits.merge_size)
        self._words = Words()
        self._block = Block(user_items(request), setup.blocked_messages)

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

    # -- ending --------------------------------------------------------------------

    async def _conclude(
        self, end: Coroutine[Any, Any, None], code: str = "internal"
    ) -> None:
        """End the run; clients are told in any case, also if that can't be written."""
        try:
            await end
        except Exception as exc:
            log_failure(self.run_id, code, exc)
            self._fail(code)
            if self._unwritten is None and not self._is_written:
                self._unwritten = (Status.FAILED, code, None)
            elif not isinstance(exc, AWAY):
                # It would fail again: the lease ends by its age.
                self._unwritten = None

    async def _end(self) -> None:
        result = self._result
        if result is None:
            raise RuntimeError("a run can't end well before it began")
        is_stopped = self._abort_mode is not None and result.final_output is None
        if self._lost or (is_stopped and self._process_ends):
            await self._end_failed("interrupted")
        elif is_stopped:
            await self._end_cancelled()
        elif result.interruptions:
            await self._pause(result)
        else:
            await self._finish(Status.COMPLETED)

    async def _end_cancelled(self) -> None:
        await self._finish(Status.CANCELLED)

    async def _end_failed(self, code: str) -> None:
        status = Status.INTERRUPTED if code == "interrupted" else Status.FAILED
        await self._finish(status, code)

    def _fail(self, code: str) -> None:
        """Send an end to clients of a run whose end can't be written."""
        if self._is_told:
            return
        self.told_early = True
        failed = self._mapper.error(code, message_for(code), self._usage())
        if self._last is not None:
            # What was open has been closed for an end that isn't told.
            end = run_error(code, message_for(code), run_id=self.run_id)
            closing = [event for event in self._last if event["type"] not in _AT_END]
            failed = [*closing, end]
        self._is_told = True
        self._publish(failed)

    async def _finish(
        self, status: str, code: str = "", paused: Paused | None = None
    ) -> None:
        """Close the row before clients hear of the end: then they may write on.

        The last events are written with it.
        """
        self._joining.flush()
        self._unwritten = (status, code, paused)
        if status not in {Status.COMPLETED, Status.WAITING}:
            await self._end_turn(code)
        outcome = await self._outcome(status, code)
        if self._last is None:
            self._last = await self._last_events(outcome, paused)
        async with self.rows.lock:
            # Where that failed before, clients have heard of another end.
            events = [] if self._is_told else self._last
            frames = self.rows.number_next(events)
            told = self.rows.unwritten(*frames)
            finish = partial(
                records.finish, self.conversation, self.lease, outcome, paused, told
            )
            await settle(self.conversation.backend.threads.run(finish))
            self.rows.settled(told)
        self._unwritten, self._is_written, self._is_told = None, True, True
        for event in events:
            self._say(event)

    async def _last_events(
        self, outcome: records.Outcome, paused: Paused | None
    ) -> list[Event]:
        """Return what ends the run for its listeners."""
        mapper, usage, code = self._mapper, self._usage(), outcome.error_code
        if paused is not None:
            page = await read_page(self.conversation, ids=outcome.message_ids)
            messages, about = shown(page, self.setup.options)
            return mapper.interrupted(
                paused.interrupts, messages=messages, metadata=about, usage=usage
            )
        if outcome.status == Status.COMPLETED:
            return mapper.finished(usage, outcome="success")
        if outcome.status == Status.CANCELLED:
            return mapper.finished(usage, outcome="cancelled")
        last_words = []
        if code == "guardrail":
            # What was refused has streamed already: it is taken back.
            last_words = [await self._restated(ids=outcome.message_ids)]
        return mapper.error(code, message_for(code), usage, *last_words)

    async def _write_late(self) -> None:
        """Write the end as soon as the database is back, so that the lease ends."""
        pause = FIRST_PAUSE
        while self._unwritten is not None:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            await self._conclude(self._finish(*self._unwritten))

    async def _pause(self, result: RunResultStreaming) -> None:
        expires_at = timezone.now() + self.setup.limits.approval_timeout
        state = dump_state(result.to_state())
        asked = interrupts(result.interruptions, expires_at, message=question_for)
        paused = Paused(state, asked, aware(expires_at).timestamp(), self._asked)
        await self._finish(Status.WAITING, paused=paused)

    async def _end_turn(self, code: str) -> None:
        """Store what was said, unless guardrails refused it or were still to see it.

        While the database is away that is tried again; to take out what was refused,
        also while another store is.
        """
        session, result, setup = self._session, self._result, self.setup
        if self._lost or session is None:
            return
        store = innermost(self.conversation.backend)
        try:
            # Through what wraps the session, if anything does: it may change items.
            if self.waiting is not None and code != "guardrail":
                await close_calls(session, UNKNOWN_RESULT)
            if code == "guardrail":
                await self._block.apply(session, self._asked)
            elif result and not checks_answers(result.current_agent, setup.run_config):
                await self._words.keep(session, marked=store.keeps_marks)
        except Exception as exc:
            is_needed = code == "guardrail" or store.in_database
            if is_needed and isinstance(exc, AWAY):
                raise
            # The run has ended all the same, and its row is to say so.
            logger.warning(
                "Run %r: its turn could not be brought to an end (%s)",
                self.run_id,
                type(exc).__name__,
                extra={"run_id": self.run_id, "error_type": type(exc).__name__},
            )

    async def _outcome(self, status: str, code: str) -> records.Outcome:
        result, used = self._result, self._usage()
        base, head = await self._place()
        asked = [] if self.goes_on else self.request.user_messages
        start = self._base.result() if self._base.done() and not self._lost else None
        ids = await find_ids(self.conversation, start, asked, self._words.told)
        return records.Outcome(
            status,
            Spent() if used is None else Spent.of(used),
            agent_name=result.current_agent.name if result else "",
            error_code=code,
            trace_id=trace_of(result.trace) if result else "",
            base=base,
            head=head,
            message_ids=ids,
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

    # -- telling -------------------------------------------------------------------

    async def _restated(
        self, ids: Sequence[Any] = (), asked: Sequence[Event] = ()
    ) -> Event:
        """Return what replaces all that clients were shown by what is stored.

        `asked` are the run's messages, before they are stored.
        """
        page = await read_page(self.conversation, ids=ids)
        return restated(page, self.setup.options, asked)

    def _publish(self, events: list[Event]) -> None:
        """Number events and hand them on.

        Never awaits a listener: the SDK waits for the stream's consumer at the end of
        each turn, so a slow tab would slow down the model.
        """
        for event in events:
            self._words.follow(event)
            self._joining.put(event)

    def _say(self, event: Event) -> None:
        self.last_event = event
        [frame] = self.rows.number_next([event])
        # The last events are in rows already, unless they can't be written.
        self.rows.append(frame, is_written=self._is_written)
        self._emit(self, frame)

    async def about(self) -> About:
        """Return what is known once the run's first position is."""
        await asyncio.shield(self._base)
        return self._about()

    def _about(self) -> About:
        """Return what others need to know to tell the run again."""
        result, config = self._result, self.setup.run_config
        return About(
            self._base.result() if self._base.done() else None,
            self.goes_on,
            (result is not None and checks_answers(result.current_agent, config))
            or self._session is None
            or changes_items(self._session),
        )
