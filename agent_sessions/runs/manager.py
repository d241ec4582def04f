"""The runs of one event loop, and those who listen to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from agent_sessions.agui import OpenRun, RunRequest, StreamOptions
from agent_sessions.backends.leases import RUN_SILENCE
from agent_sessions.concurrency.connections import without_caller
from agent_sessions.concurrency.settle import settle_or_undo
from agent_sessions.exceptions import ShuttingDown, StorageError
from agent_sessions.ratelimit import Rates
from agent_sessions.reports import guarded
from agent_sessions.runs import queued, records, sync
from agent_sessions.runs.active import ActiveRun
from agent_sessions.runs.forking import Fork
from agent_sessions.runs.log import ChannelRelay, Frame, Subscription
from agent_sessions.runs.resuming import claimable, restore_or_withdraw
from agent_sessions.runs.seats import Seats
from agent_sessions.runs.setup import Conversation, RunSetup
from agent_sessions.runs.telling import AWAY, FIRST_PAUSE, LONGEST_PAUSE
from agent_sessions.runs.watching import TELL, Place, Watcher, is_heard, place_of
from agent_sessions.runs.writing import RunLog, Writer
from agent_sessions.usage import model_of

if TYPE_CHECKING:
    from agents import RunState

logger = logging.getLogger("agent_sessions.runs")

# Seconds that a run gets to say that it has ended, once its row says so.
LAST_WORDS = 5
# How often a conversation is read until what is read fits what goes on.
ATTEMPTS = 20


class RunManager:
    """Start runs, keep them going without listeners, tell listeners about them.

    Sockets come and go; a run is a task that the manager holds.
    """

    def __init__(self) -> None:
        self._runs: dict[Place, ActiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: dict[Place, set[Subscription]] = {}
        self._detached: dict[Place, asyncio.TimerHandle] = {}
        # Whether the process ends.
        self.is_closing = False
        # How many runs are about to begin.
        self._starting = 0
        # What a user's sockets of this process may ask for together.
        self.rates = Rates()
        self.seats = Seats(self._do)
        self.writer = Writer(self._wrote)
        self.watcher = Watcher(self._runs, self._listeners)
        # Nudges other processes, where there is a way.
        self.relay: ChannelRelay | None = None

    # -- runs ----------------------------------------------------------------------

    @guarded
    async def start(
        self, conversation: Conversation, request: RunRequest, setup: RunSetup
    ) -> ActiveRun | None:
        """Start or resume a run; None where its id was used before, so it isn't new.

        Raises SessionBusy, InterruptsPending, UnknownInterrupt, InterruptExpired,
        InvalidApproval, UnreadableState, ShuttingDown, StorageError and
        SessionDoesNotExist, with nothing done.
        """
        if self.is_closing:
            raise ShuttingDown
        self._starting += 1
        try:
            return await self._start(conversation, request, setup)
        finally:
            self._starting -= 1

    async def _start(
        self, conversation: Conversation, request: RunRequest, setup: RunSetup
    ) -> ActiveRun | None:
        threads, run_id = conversation.backend.threads, request.run_id
        state = waiting = None
        fork = Fork(conversation, request, setup.options) if request.forks else None
        if request.resume:
            after = setup.limits.stale_after
            waiting = await threads.run(claimable, conversation, request, after)
            if waiting is None:
                return None
            # Rebuilt before it is claimed. None: it can't be, and need not be.
            state = await restore_or_withdraw(conversation, waiting, request, setup)

        taken: list[records.Lease] = []

        async def take() -> records.Lease | None:
            try:
                lease = await threads.run(
                    records.begin,
                    conversation,
                    run_id,
                    model=model_of(setup.agent, setup.run_config),
                    limits=setup.limits,
                    after=fork.begin if fork else waiting,
                    taken=taken,
                )
            except AWAY:
                self._do(self._give_back(conversation, taken))
                raise
            if lease is not None:
                await self._last_words(conversation)
                await self.watcher.catch_up(place_of(conversation), lease.run.pk)
            return lease

        async def give_back(lease: records.Lease | None) -> None:
            if lease is not None:
                await threads.run(records.give_back, conversation, lease)

        lease = await settle_or_undo(take(), give_back)
        if lease is None:
            return None
        request = fork.request if fork else request
        run = ActiveRun(conversation, request, setup, lease, self.tell)
        run.waiting = waiting
        self.begin(run, state)
        return run

    def begin(self, run: ActiveRun, state: RunState[Any] | None = None) -> None:
        """Begin a run whose lease this process has."""
        conversation, name = run.conversation, f"agent run {run.run_id}"
        self._runs[place_of(conversation)] = run
        task = asyncio.create_task(run.run(state), name=name, context=without_caller())
        run.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(run, task))
        self.watcher.watch(conversation, run.setup.limits.stale_after)
        self._watch(conversation)

    def active(self, conversation: Conversation) -> ActiveRun | None:
        """Return the run of this process that is going on."""
        return self._runs.get(place_of(conversation))

    def abort(
        self,
        conversation: Conversation,
        run_id: str,
        mode: Literal["immediate", "after_turn"] = "immediate",
    ) -> bool:
        """Stop a run of this process; False where it isn't here."""
        run = self.active(conversation)
        if run is None or run.run_id != run_id:
            return False
        run.abort(mode)
        return True

    async def stop(
        self,
        conversation: Conversation,
        run_id: str,
        mode: Literal["immediate", "after_turn"] = "immediate",
        *,
        stale_after: float = RUN_SILENCE.total_seconds(),
    ) -> bool:
        """Stop a run of whichever process; False where it doesn't go on.

        Its row says so to the process that has it; a nudge makes that look sooner.
        """
        if self.abort(conversation, run_id, mode):
            return True
        run = conversation.backend.threads.run
        asked = await run(queued.ask_to_stop, conversation, run_id, mode, stale_after)
        self.nudge(conversation, run_id)
        return asked

    def nudge(self, conversation: Conversation, run_id: str = "") -> None:
        """Make all processes look at a conversation's rows now."""
        if self.relay is not None:
            self.relay.nudge(conversation, run_id)
        self.watcher.wake(often=True)

    async def shutdown(self) -> None:
        """Stop every run after its turn, within its `grace`, then close all sockets.

        Another process may go on then; no run begins here any more.
        """
        self.is_closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while self._starting:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        async with asyncio.TaskGroup() as ending:
            for run in list(self._runs.values()):
                ending.create_task(run.interrupt())
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        leaving = [each.displace(shutting_down=True) for each in self.seats.taken]
        await asyncio.gather(*leaving, return_exceptions=True)

    # -- listeners -----------------------------------------------------------------

    def subscribe(self, conversation: Conversation, listener: Subscription) -> None:
        """Send a listener what happens in a conversation from now on."""
        place = place_of(conversation)
        self._listeners.setdefault(place, set()).add(listener)
        if (timer := self._detached.pop(place, None)) is not None:
            timer.cancel()

    def unsubscribe(self, conversation: Conversation, listener: Subscription) -> None:
        """Stop sending to a listener; a run without listeners ends after a while."""
        place = place_of(conversation)
        listeners = self._listeners.get(place, set())
        listeners.discard(listener)
        if not listeners:
            self._listeners.pop(place, None)
            self._watch(conversation)

    def listeners(self, conversation: Conversation) -> int:
        """Count a conversation's listeners in this process."""
        return len(self._listeners.get(place_of(conversation), ()))

    @guarded
    async def sync(
        self,
        conversation: Conversation,
        listener: Subscription,
        *,
        offset: str | None,
        options: StreamOptions,
        stale_after: float,
        begins: bool = True,
    ) -> None:
        """Bring a listener up to date and keep it so: no gap and nothing twice.

        One that doesn't begin goes on within the run that it has heard the start of.
        """
        place = place_of(conversation)
        told = OpenRun() if begins else listener.open
        threads = conversation.backend.threads
        for attempt in range(ATTEMPTS):
            run = self._runs.get(place)
            found = await threads.run(
                sync.look, conversation, stale_after, told, is_local=run is not None
            )
            if run is not None and run.run_id == found.running:
                if found.last < run.rows.written and attempt < ATTEMPTS - 1:
                    # It wrote after its rows were read.
                    continue
                found.add(run.rows.waiting, await run.about())
            elif attempt < ATTEMPTS - 1 and (
                run is not None or (found.running and not found.frames)
            ):
                # It is just ending, or has only just begun in another process.
                await asyncio.sleep(sync.LOOK_AGAIN)
                continue
            heard = told, offset, begins
            answer = await sync.answer(conversation, found, heard, options)
            more = [] if run is None else run.rows.since(answer.at)
            if self._runs.get(place) is run and more is not None:
                break
        else:
            raise StorageError("A run can't be told: its events can't be read.")
        if not begins and not listener.lagging:
            # Its client has asked for a beginning meanwhile.
            return
        # Nothing is awaited between the last look at the log and these lines.
        at = (answer.at[0], more[-1].number) if more else answer.at
        frames = [*answer.frames, *more]
        listener.restart(frames, answer.told, at=at, skips=answer.skips)
        listener.open.branch = listener.open.branch or found.branch
        self.subscribe(conversation, listener)
        self.watcher.watch(conversation, stale_after)
        if run is None:
            self.watcher.told(place, listener, found.position, found.running)

    # -- inside --------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_back(
        self, conversation: Conversation, taken: list[records.Lease]
    ) -> None:
        """Release a lease whose commit was not answered, once the database is back."""
        pause = FIRST_PAUSE
        while taken:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            with suppress(*AWAY):
                lease = taken[-1]
                await conversation.backend.threads.run(
                    records.give_back, conversation, lease
                )
                taken.clear()

    async def _last_words(self, conversation: Conversation) -> None:
        """Wait until the previous run, which has given its lease back, ends its stream."""
        previous = self.active(conversation)
        if previous is not None and previous.task is not None:
            await asyncio.wait({previous.task}, timeout=LAST_WORDS)

    def tell(self, run: ActiveRun, frame: Frame) -> None:
        """Pass on what a run says, to its rows and its listeners."""
        place = place_of(run.conversation)
        if frame.is_last:
            if self._runs.get(place) is run:
                del self._runs[place]
                if (timer := self._detached.pop(place, None)) is not None:
                    timer.cancel()
            self.watcher.ended(place, run.lease.run.pk)
            self.writer.done(run.rows, run.setup.limits.keep_log)
            self._wrote(run.rows)
        else:
            self.writer.said(run.rows, frame)
        for listener in self._listeners.get(place, ()):
            listener.put(frame)

    def _wrote(self, log: RunLog) -> None:
        """Nudge other processes: a run has new rows."""
        if self.relay is not None:
            self.relay.nudge(log.conversation, log.lease.run.run_id, log.number)

    def _over(self, run: ActiveRun, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        place = place_of(run.conversation)
        if self._runs.get(place) is run:
            del self._runs[place]
        if run.told_early:
            # The rows say more by now: they are told instead of the log.
            self.writer.done(run.rows, 0)
            for listener in self._listeners.get(place, ()):
                listener.give_up()
        if not task.cancelled() and (error := task.exception()) is not None:
            # What it was caused by may quote the conversation.
            error.__cause__ = error.__context__ = None
            task.get_loop().call_exception_handler(
                {"message": f"Agent run {run.run_id} broke off", "exception": error}
            )

    def _watch(self, conversation: Conversation, *, again: bool = False) -> None:
        """Start the countdown of a run without listeners."""
        place = place_of(conversation)
        run = self._runs.get(place)
        if run is None or place in self._listeners or place in self._detached:
            return

        def abandon() -> None:
            self._detached.pop(place, None)
            self._do(self._abandon(run))

        delay = TELL if again else run.setup.limits.detach_timeout
        if delay is not None:
            loop = asyncio.get_running_loop()
            self._detached[place] = loop.call_later(delay, abandon)

    async def _abandon(self, run: ActiveRun) -> None:
        """End a run that nobody listens to, in any process."""
        conversation, limits = run.conversation, run.setup.limits
        within = max(limits.detach_timeout or 0, 3 * TELL)
        try:
            heard = await conversation.backend.threads.run(
                is_heard, conversation, run.run_id, within
            )
        except Exception as exc:
            logger.warning("A run's listeners are unknown (%s)", type(exc).__name__)
            heard = True
        if heard:
            self._watch(conversation, again=True)
        elif place_of(conversation) not in self._listeners:
            run.abort("after_turn")


def get_run_manager() -> RunManager:
    """Return the running event loop's manager."""
    # What a manager keeps holds its loop, so that weak keys would keep both.
    for ended in [loop for loop in list(_managers) if loop.is_closed()]:
        _managers.pop(ended, None)
    return _managers.setdefault(asyncio.get_running_loop(), RunManager())


_managers: dict[asyncio.AbstractEventLoop, RunManager] = {}
