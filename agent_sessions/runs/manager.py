"""The runs of one event loop, and those who listen to them."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

from agent_sessions.agui import OpenRun, RunRequest, StreamOptions
from agent_sessions.approvals import Pending
from agent_sessions.backends.base import SessionKey
from agent_sessions.concurrency.connections import without_caller
from agent_sessions.concurrency.settle import settle, settle_or_undo
from agent_sessions.exceptions import InvalidApproval, UnreadableState
from agent_sessions.models import AgentRun
from agent_sessions.ratelimit import Rates
from agent_sessions.reports import guarded
from agent_sessions.runs import records, recovery, sync
from agent_sessions.runs.active import ActiveRun
from agent_sessions.runs.failures import refusal_code
from agent_sessions.runs.log import ChannelRelay, Frame, Subscription
from agent_sessions.runs.resuming import refuses_all, restore
from agent_sessions.runs.setup import Conversation, RunSetup
from agent_sessions.runs.writing import RunLog, Writer
from agent_sessions.usage import Spent, model_of

if TYPE_CHECKING:
    from agents import RunState

# A backend's alias, the database, a row's primary key, and what that row must be: a
# primary key alone may come back for another session, as after a backup was restored.
Place = tuple[str, str, int, SessionKey]

# Seconds that a run gets to say that it has ended, once its row says so.
LAST_WORDS = 5


class Seated(Protocol):
    """A socket that takes a seat among its user's."""

    async def displace(self) -> None:
        """Make room for a newer one."""


class RunManager:
    """Start runs, keep them going without listeners, tell listeners about them.

    Sockets come and go; a run is a task that the manager holds.
    """

    def __init__(self) -> None:
        self._runs: dict[Place, ActiveRun] = {}
        self._ended: dict[Place, ActiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: dict[Place, set[Subscription]] = {}
        self._detached: dict[Place, asyncio.TimerHandle] = {}
        self._seats: dict[Hashable, dict[Seated, None]] = {}
        # What a user's sockets of this process may ask for together.
        self.rates = Rates()
        self.writer = Writer(self._wrote)
        # Takes every frame to other processes, where there is a way.
        self.relay: ChannelRelay | None = None

    # -- runs ----------------------------------------------------------------------

    @guarded
    async def start(
        self, conversation: Conversation, request: RunRequest, setup: RunSetup
    ) -> ActiveRun | None:
        """Start or resume a run; None where its id was used before, so it isn't new.

        Raises SessionBusy, InterruptsPending, UnknownInterrupt, InterruptExpired,
        InvalidApproval, UnreadableState, StorageError and SessionDoesNotExist, with
        nothing done.
        """
        threads, run_id = conversation.backend.threads, request.run_id
        state = waiting = None
        if request.resume:
            ids = {entry["interruptId"] for entry in request.resume}
            waiting = await threads.run(records.claimable, conversation, run_id, ids)
            if waiting is None:
                return None
            # Rebuilt before it is claimed. None: it can't be, and need not be.
            state = await self._restore(conversation, waiting, request, setup)

        async def take() -> records.Lease | None:
            lease = await threads.run(
                records.begin,
                conversation,
                run_id,
                model=model_of(setup.agent, setup.run_config),
                stale_after=setup.limits.stale_after,
                answers=waiting,
            )
            if lease is not None:
                await self._last_words(conversation)
            return lease

        async def give_back(lease: records.Lease | None) -> None:
            if lease is not None:
                stopped = records.Outcome(AgentRun.Status.CANCELLED, Spent())
                await threads.run(records.finish, conversation, lease, stopped)

        lease = await settle_or_undo(take(), give_back)
        if lease is None:
            return None
        run = ActiveRun(conversation, request, setup, lease, self._tell)
        run.waiting = waiting
        self._runs[_place(conversation)] = run
        name = f"agent run {run.run_id}"
        task = asyncio.create_task(run.run(state), name=name, context=without_caller())
        run.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(run, task))
        self._watch(conversation)
        return run

    def active(self, conversation: Conversation) -> ActiveRun | None:
        """Return the run of this process that is going on."""
        return self._runs.get(_place(conversation))

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

    async def shutdown(self) -> None:
        """Cancel every run and wait until each has closed its row."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- listeners -----------------------------------------------------------------

    def subscribe(self, conversation: Conversation, listener: Subscription) -> None:
        """Send a listener what happens in a conversation from now on."""
        place = _place(conversation)
        self._listeners.setdefault(place, set()).add(listener)
        if (timer := self._detached.pop(place, None)) is not None:
            timer.cancel()

    def unsubscribe(self, conversation: Conversation, listener: Subscription) -> None:
        """Stop sending to a listener; a run without listeners ends after a while."""
        place = _place(conversation)
        listeners = self._listeners.get(place, set())
        listeners.discard(listener)
        if not listeners:
            self._listeners.pop(place, None)
            self._watch(conversation)

    def listeners(self, conversation: Conversation) -> int:
        """Count a conversation's listeners in this process."""
        return len(self._listeners.get(_place(conversation), ()))

    def take_seat(self, seat: Hashable, socket: Seated, limit: int) -> None:
        """Seat one more socket of a user; the oldest ones over the limit must go.

        They are those that nobody may be listening to any more: a phone that lost its
        network leaves sockets that look open.
        """
        seated = self._seats.setdefault(seat, {})
        seated[socket] = None
        for oldest in list(seated)[: max(len(seated) - limit, 0)]:
            task = asyncio.create_task(oldest.displace())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def leave_seat(self, seat: Hashable, socket: Seated) -> None:
        """Free the seat of a socket."""
        seated = self._seats.get(seat, {})
        seated.pop(socket, None)
        if not seated:
            self._seats.pop(seat, None)

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
        place = _place(conversation)
        told = OpenRun() if begins else listener.open
        frames: list[Frame] = []
        missed_run = None
        while True:
            run = self._runs.get(place)
            if (exact := self._told_since(place, offset)) is not None:
                frames, told = exact
                break
            page = rest = None
            if run is not None:
                page = await sync.read_before(run)
            if run is None or told.run_id not in {"", run.run_id}:
                rest = await sync.read_rest(conversation, stale_after, told)
            if self._runs.get(place) is not run or (run is not None and run.ended):
                continue
            if rest is not None and run is None:
                missed_run = rest.running
            if rest is not None and not (missed_run and missed_run == told.run_id):
                frames = sync.fresh_resting(
                    conversation, rest, missed_run, options, told
                )
            if run is not None and page is not None:
                within = OpenRun() if rest else told
                frames += sync.fresh_running(run, page, within)
            break
        if not begins and not listener.lagging:
            # Its client has asked for a beginning meanwhile.
            return
        # Nothing is awaited between the last look at the log and these lines.
        listener.restart(frames, told, missed_run=missed_run)
        self.subscribe(conversation, listener)

    async def goes_on(
        self, conversation: Conversation, run_id: str, stale_after: float
    ) -> bool:
        """Return whether a run of another process has its lease still."""
        threads = conversation.backend.threads
        row = await threads.run(recovery.recover, conversation, stale_after)
        return row is not None and row.run_id == run_id

    # -- inside --------------------------------------------------------------------

    def _told_since(
        self, place: Place, offset: str | None
    ) -> tuple[list[Frame], OpenRun] | None:
        """Replay the run that goes on, or ended last, from an offset."""
        last = self._runs.get(place) or self._ended.get(place)
        return None if last is None else sync.replay(offset, last.log)

    async def _restore(
        self,
        conversation: Conversation,
        waiting: Pending,
        request: RunRequest,
        setup: RunSetup,
    ) -> RunState[Any] | None:
        """Rebuild a paused run; None where it can't be, but all of it is refused.

        One that can't be, or would do what nobody was shown, is withdrawn.
        """
        try:
            return await restore(waiting, request, setup)
        except (InvalidApproval, UnreadableState) as exc:
            # The agent that it needs may be opened with the run.
            may_wait = refuses_all(request) or setup.open_run is not None
            if isinstance(exc, UnreadableState) and may_wait:
                return None
            withdraw = partial(
                recovery.withdraw,
                conversation,
                waiting.fence,
                error_code=refusal_code(exc) or "",
            )
            await settle(conversation.backend.threads.run(withdraw))
            raise

    async def _last_words(self, conversation: Conversation) -> None:
        """Wait until the previous run, which has given its lease back, ends its stream."""
        previous = self.active(conversation)
        if previous is not None and previous.task is not None:
            await asyncio.wait({previous.task}, timeout=LAST_WORDS)

    def _tell(self, run: ActiveRun, frame: Frame) -> None:
        place = _place(run.conversation)
        if frame.is_last:
            if self._runs.get(place) is run:
                del self._runs[place]
            self._keep(place, run)
            self.writer.done(run.rows, run.setup.limits.keep_log)
        else:
            self.writer.said(run.rows, frame)
        for listener in self._listeners.get(place, ()):
            listener.put(frame)
        if self.relay is not None:
            self.relay(run.conversation, frame)

    def _wrote(self, log: RunLog) -> None:
        """Tell other processes that a run has new rows."""

    def _keep(self, place: Place, run: ActiveRun) -> None:
        """Keep an ended run's log for those who reconnect."""
        self._ended[place] = run
        run.ended = True

        def forget() -> None:
            if self._ended.get(place) is run:
                del self._ended[place]

        loop = asyncio.get_running_loop()
        loop.call_later(run.setup.limits.keep_log, forget)

    def _over(self, run: ActiveRun, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        place = _place(run.conversation)
        if self._runs.get(place) is run:
            del self._runs[place]
        if run.told_early:
            # The rows say more by now: they are told instead of the log.
            self._ended.pop(place, None)
            self.writer.done(run.rows, 0)
            for listener in self._listeners.get(place, ()):
                listener.give_up()
        if not task.cancelled() and (error := task.exception()) is not None:
            # What it was caused by may quote the conversation.
            error.__cause__ = error.__context__ = None
            loop = asyncio.get_running_loop()
            loop.call_exception_handler(
                {"message": f"Agent run {run.run_id} broke off", "exception": error}
            )

    def _watch(self, conversation: Conversation) -> None:
        """Start the countdown of a run without listeners."""
        place = _place(conversation)
        run = self._runs.get(place)
        if run is None or place in self._listeners or place in self._detached:
            return

        def abandon() -> None:
            self._detached.pop(place, None)
            run.abort("after_turn")

        delay = run.setup.limits.detach_timeout
        if delay is not None:
            loop = asyncio.get_running_loop()
            self._detached[place] = loop.call_later(delay, abandon)


def get_run_manager() -> RunManager:
    """Return the running event loop's manager."""
    loop = asyncio.get_running_loop()
    return _managers.setdefault(loop, RunManager())


def _place(conversation: Conversation) -> Place:
    alias = conversation.backend.alias
    return alias, conversation.using, conversation.pk, conversation.key


_managers: WeakKeyDictionary[asyncio.AbstractEventLoop, RunManager] = (
    WeakKeyDictionary()
)
