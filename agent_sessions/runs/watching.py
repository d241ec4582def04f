"""Look at the rows of what this process runs or listens to, twice a second.

So a run hears that it is to stop, and listeners what a run of another process says.
A nudge over a channel layer makes it sooner.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Any, Literal, cast

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.leases import DatabaseNow, is_over, is_silent, judged
from agent_sessions.concurrency.connections import without_caller
from agent_sessions.models import AgentSession
from agent_sessions.runs import recovery, sync
from agent_sessions.runs.active import ActiveRun
from agent_sessions.runs.log import Subscription
from agent_sessions.runs.setup import Conversation

logger = logging.getLogger("agent_sessions.runs")

# A backend's alias, the database, a row's primary key, what that row must be, and its
# table: a primary key alone may come back for another session, as after a backup was
# restored, and another tenant may have both.
Place = tuple[str, str, int, SessionKey, str]

# Seconds between looks, and between those in which listeners are told of.
LOOK = 0.5
TELL = 2.0
# Between looks while somebody here waits for a run to stop, and for how long that is.
LOOK_SOON = 0.1
SOON = 2.0


def place_of(conversation: Conversation) -> Place:
    """Return what a conversation is known by in this process."""
    alias, key = conversation.backend.alias, conversation.key
    return alias, conversation.using, conversation.pk, key, conversation.table


@dataclass(slots=True, eq=False)
class Watched:
    """A conversation that is looked at, and how far it has been told here."""

    conversation: Conversation
    stale_after: float
    # The key of a run and the number of its last event; all before that is told too.
    told: tuple[int, int] | None = None
    # The run of another process that listeners are within.
    run_id: str = ""
    # The number of the session's last lease.
    fence: int | None = None
    context: contextvars.Context = field(default_factory=without_caller)
    # Those of several conversations are looked at together, in a thread of ours.
    group: object = None

    def __post_init__(self) -> None:
        threads = self.conversation.backend.threads
        self.group = threads if threads.serves_caller() else self


def look(
    using: str, sessions: Sequence[int], silence: timedelta, heard: Sequence[int]
) -> dict[int, AgentSession]:
    """Read sessions' rows, to see which run each has, and how that is asked to stop.

    Note of `heard` that their runs have listeners in this process.
    """
    rows = AgentSession._base_manager.using(using)
    if heard:
        going_on = rows.filter(pk__in=heard).exclude(run_id="")
        going_on.update(run_listened_at=DatabaseNow())
    found = judged(rows.filter(pk__in=sessions), silence)
    key = "backend", "session_id", "user_id", "branch__name"
    lease = "run_id", "run_owner", "run_seen_at", "run_stop", "fence"
    return {row.pk: row for row in found.select_related("branch").only(*key, *lease)}


def is_heard(conversation: Conversation, run_id: str, within: float) -> bool:
    """Return whether another process has said lately that it has listeners of a run."""
    silent = is_silent("run_listened_at", timedelta(seconds=within))
    heard: bool = conversation.rows().filter(run_id=run_id).exclude(silent).exists()
    return heard


class Watcher:
    """Looks at the rows of one event loop's conversations as long as there are any."""

    def __init__(
        self,
        runs: Mapping[Place, ActiveRun],
        listeners: Mapping[Place, Collection[Subscription]],
    ) -> None:
        self._runs = runs
        self._listeners = listeners
        self._watched: dict[Place, Watched] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told_at = 0.0
        self._soon_until = 0.0

    def watch(self, conversation: Conversation, stale_after: float) -> Watched:
        """Look at a conversation until it has neither a run nor listeners here."""
        place = place_of(conversation)
        if place not in self._watched:
            self._watched[place] = Watched(conversation, stale_after)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())
        return self._watched[place]

    def told(
        self,
        place: Place,
        listener: Subscription,
        told: tuple[int, int],
        run_id: str = "",
    ) -> None:
        """Note how far a listener has been told; what others know they leave out."""
        listener.since = told
        watched = self._watched.get(place)
        if watched is not None:
            watched.told = min(watched.told or told, told)
            # Look at its runs also where they have ended meanwhile.
            watched.fence = None
            # Those who are within a run have still to hear its end.
            watched.run_id = run_id or watched.run_id

    def ended(self, place: Place, run: int) -> None:
        """Note that a run of this process has told all."""
        if place in self._watched:
            self._watched[place].told = run, sync.END
            self._watched[place].run_id = ""

    def wake(self, *, often: bool = False) -> None:
        """Look now, and where a run is to stop `often` for a while."""
        if often:
            self._soon_until = time.monotonic() + SOON
        self._news.set()

    async def catch_up(self, place: Place, before: int) -> None:
        """Send listeners the events of runs with a key below `before`."""
        watched = self._watched.get(place)
        if watched is None or not self._listeners.get(place):
            return
        try:
            await self._tell(place, watched, "", before)
        except Exception as exc:
            # They are brought up to date by the frames that come.
            logger.warning("A run can't be followed (%s)", type(exc).__name__)

    async def _serve(self) -> None:
        while self._watched:
            pause = LOOK_SOON if time.monotonic() < self._soon_until else LOOK
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause)
            self._news.clear()
            for place in list(self._watched):
                if place not in self._runs and not self._listeners.get(place):
                    del self._watched[place]
            watched = sorted(self._watched.items(), key=_group)
            groups = [list(some) for _, some in groupby(watched, _group)]
            tells = time.monotonic() - self._told_at >= TELL
            if tells:
                self._told_at = time.monotonic()
            await _all(
                (some[0][1].context, self._look(some, tells=tells)) for some in groups
            )

    async def _look(
        self, some: Sequence[tuple[Place, Watched]], *, tells: bool
    ) -> None:
        """Look at conversations in one statement, then at those that have news."""
        conversation = some[0][1].conversation
        silence = timedelta(seconds=min(each.stale_after for _, each in some))
        heard = [place[2] for place, each in some if tells and each.run_id]
        pks = [place[2] for place, _ in some]
        try:
            rows = await conversation.backend.threads.run(
                look, conversation.using, pks, silence, heard
            )
        except Exception as exc:
            logger.warning("Runs can't be looked at (%s)", type(exc).__name__)
            return
        calls = []
        for place, watched in some:
            row = rows.get(place[2])
            row = row if row is not None and _is_of(row, place) else None
            run = self._runs.get(place)
            if run is None and self._listeners.get(place):
                calls.append((watched.context, self._follow(place, watched, row)))
            elif run and row and row.run_id == run.run_id and row.run_stop:
                run.abort(cast("Literal['immediate', 'after_turn']", row.run_stop))
        await _all(calls)
        for place, _ in some:
            row = rows.get(place[2])
            if row is not None and _is_of(row, place):
                self._show_branch(place, row)

    def _show_branch(self, place: Place, row: AgentSession) -> None:
        """Bring those up to date who are shown another branch than the current one."""
        if row.run_id or row.branch is None or place in self._runs:
            return
        known = {"", row.branch.name}
        for listener in self._listeners.get(place, ()):
            if listener.is_resting and listener.open.branch not in known:
                listener.give_up()

    async def _follow(
        self, place: Place, watched: Watched, row: AgentSession | None
    ) -> None:
        """Send listeners the events of a run of another process."""
        fence = None if row is None else row.fence
        running = "" if row is None else row.run_id
        if fence == watched.fence and not running and not watched.run_id:
            return
        threads = watched.conversation.backend.threads
        try:
            if row is not None and running and is_over(row):
                await threads.run(
                    recovery.recover, watched.conversation, watched.stale_after
                )
                running = ""
            await self._tell(place, watched, running, sync.END)
        except Exception as exc:
            logger.warning("A run can't be followed (%s)", type(exc).__name__)
            return
        watched.fence = fence

    async def _tell(
        self, place: Place, watched: Watched, running: str, before: int
    ) -> None:
        if watched.told is None:
            return
        threads = watched.conversation.backend.threads
        found = await threads.run(
            sync.read_on, watched.conversation, *watched.told, before
        )
        if place in self._runs:
            # It has caught up before it began.
            return
        listeners = list(self._listeners.get(place, ()))
        for pk, run_id, frames in found:
            for frame in frames:
                for listener in listeners:
                    # Others may have heard less than it.
                    if (pk, frame.number) > listener.since:
                        listener.put(frame)
            number = frames[-1].number if frames else 0
            if frames and frames[-1].is_last:
                number = sync.END
            if (pk, number) > watched.told:
                watched.told = pk, number
            if running == run_id:
                watched.run_id = running
            elif number == sync.END and watched.run_id == run_id:
                watched.run_id = ""
        if watched.run_id and watched.run_id != running:
            # Its process died, or its events were removed: its row tells its end.
            for listener in listeners:
                if listener.open.run_id == watched.run_id:
                    listener.give_up()
            watched.run_id = ""


def _group(entry: tuple[Place, Watched]) -> tuple[int, str]:
    return id(entry[1].group), entry[1].conversation.using


def _is_of(row: Any, place: Place) -> bool:
    alias, _, _, key, _ = place
    found = row.backend, row.session_id, row.user_id
    return found == (alias, key.session_id, key.user_id)


async def _all(calls: Iterable[tuple[contextvars.Context, Any]]) -> None:
    tasks = [
        asyncio.get_running_loop().create_task(call, context=context)
        for context, call in calls
    ]
    await asyncio.gather(*tasks)
