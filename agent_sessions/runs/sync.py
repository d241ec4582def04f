"""Bring a listener up to date: a replay where that is exact, else a fresh start."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agent_sessions.agui import (
    SYNC_PREFIX,
    OpenRun,
    StreamOptions,
    add_pending_calls,
    merge,
    run_error,
    run_finished,
    run_started,
    snapshot,
)
from agent_sessions.approvals import pending
from agent_sessions.backends.base import Page
from agent_sessions.backends.run_rows import newest
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import event_rows, recovery
from agent_sessions.runs.event_rows import About
from agent_sessions.runs.failures import message_for
from agent_sessions.runs.log import Event, Frame
from agent_sessions.runs.pages import read_page, restated, shown
from agent_sessions.runs.setup import Conversation
from agent_sessions.usage import usage_of

Status = AgentRun.Status
# No more digits than int() takes, and than a run has events.
_NUMBER = re.compile("[0-9]{1,18}")

# Seconds until a run that has told nothing yet is looked at again.
LOOK_AGAIN = 0.1
# Behind every event of a run.
END = 2**62


@dataclass(slots=True)
class Found:
    """What the rows say of a conversation."""

    # The id of the run that goes on, in whichever process.
    running: str
    # That one, or the newest.
    run: AgentRun | None
    # What it has told, and what is to be known to tell it again.
    frames: list[Frame]
    about: About
    interrupts: list[dict[str, Any]]
    # How the run of the listener ended, or the last one.
    end: Event
    # The current branch, and whether the newest run was on another.
    branch: str = ""
    has_switched: bool = False

    @property
    def last(self) -> int:
        """The number of the last event that was found."""
        return self.frames[-1].number if self.frames else 0

    @property
    def position(self) -> tuple[int, int]:
        """The run and the number up to which a conversation is told by this."""
        # One that has begun since the session was seen at rest is still to be told.
        begins = self.run is not None and self.run.status == Status.RUNNING
        number = self.last if self.running else 0 if begins else END
        return (self.run.pk if self.run else 0), number

    def add(self, waiting: Iterable[Frame], about: About) -> None:
        """Take in what the run of this process has not written yet."""
        self.frames += [frame for frame in waiting if frame.number > self.last]
        self.about = about


@dataclass(frozen=True, slots=True)
class Answer:
    """What brings a listener up to date."""

    frames: list[Frame]
    # What the listener has heard before.
    told: OpenRun
    # The run that is told, and the number of the last event.
    at: tuple[str, int] = ("", 0)
    # A run that can't be told from here on; the listener waits for its end.
    skips: str = ""


def look(
    conversation: Conversation, stale_after: float, told: OpenRun, *, is_local: bool
) -> Found:
    """Read a conversation, after freeing it from what died.

    `told` is the run that its listener is within, whose end is looked for.
    """
    rows = conversation.rows().select_related("branch")
    row = rows.first() if is_local else recovery.recover(conversation, stale_after)
    going_on = row is not None and row.state == AgentSession.State.RUNNING
    running = row.run_id if row is not None and going_on else ""
    asked = None
    if not going_on:
        asked = pending(conversation.backend, conversation.key, conversation.pk)
    runs = newest(conversation.using, conversation.pk).select_related("branch")
    run = (runs.filter(run_id=running) if running else runs).first()
    chunks = event_rows.read(conversation, run.pk) if run else []
    within = "" if told.run_id.startswith(SYNC_PREFIX) else told.run_id
    interrupts = [] if asked is None else asked.interrupts
    ended = None if _is_elsewhere(row, run) else run
    if within:
        ended = runs.filter(run_id=within).first()
    return Found(
        running,
        run,
        [frame for chunk in chunks for frame in chunk.frames],
        chunks[-1].about if chunks else About(),
        interrupts,
        _end_of(conversation, ended, within, interrupts),
        **_branch_of(conversation, row, run),
    )


def _branch_of(
    conversation: Conversation, row: AgentSession | None, run: AgentRun | None
) -> dict[str, Any]:
    if row is None or row.branch is None or conversation.backend.in_database is None:
        return {}
    is_left = run is not None and run.branch_id not in {None, row.branch_id}
    return {"branch": row.branch.name, "has_switched": is_left}


def _is_elsewhere(row: AgentSession | None, run: AgentRun | None) -> bool:
    """Return whether a run was on a branch of another name than the current one's."""
    if row is None or row.branch is None or run is None or run.branch is None:
        return False
    return run.branch.name != row.branch.name


async def answer(
    conversation: Conversation,
    found: Found,
    listener: tuple[OpenRun, str | None, bool],
    options: StreamOptions,
) -> Answer:
    """Return what a listener lacks: what came after its offset, or all of it anew.

    A listener is what it has heard, its offset, and whether it begins.
    """
    told, offset, begins = listener
    exact = told_after(found, offset, None if begins else told)
    if exact is not None:
        return exact
    frames: list[Frame] = []
    running, is_whole = found.running, _is_whole(found.frames, 0)
    is_within = told.run_id == running
    if running and is_whole:
        if told.run_id and not is_within:
            page = await read_page(conversation)
            frames = fresh_resting(conversation, (page, found, ""), options, told)
        base = found.about.base
        page = await read_page(conversation, before=None if base is None else base + 1)
        inside = told if is_within else OpenRun()
        frames += fresh_running(found, page, inside, options)
        return Answer(frames, told, (running, found.last))
    if not (running and is_within):
        page = await read_page(conversation)
        frames = fresh_resting(conversation, (page, found, running), options, told)
    return Answer(frames, told, skips=running)


def told_after(
    found: Found, offset: str | None, told: OpenRun | None = None
) -> Answer | None:
    """Return the events after an offset, for one who has heard those before it.

    None where they can't be told exactly.
    """
    run_id, _, digits = (offset or "").rpartition(":")
    number = int(digits) if _NUMBER.fullmatch(digits) else END
    is_known = found.run is not None and found.run.run_id == run_id and found.frames
    if not is_known or number > found.last or found.has_switched:
        return None
    if not found.frames[-1].is_last and found.running != run_id:
        return None
    if not _is_whole(found.frames, number if told else 0):
        return None
    if told is None:
        told = OpenRun()
        for frame in found.frames:
            if frame.number <= number:
                told.follow(frame.event)
    later = [frame for frame in found.frames if frame.number > number]
    return Answer(later, told, (run_id, found.last))


def _is_whole(frames: Sequence[Frame], after: int) -> bool:
    """Return whether no number is missing after one."""
    numbers = [frame.number for frame in frames if frame.number > after]
    return numbers == list(range(after + 1, after + 1 + len(numbers))) and bool(frames)


def read_on(
    conversation: Conversation, run: int, after: int, before: int = END
) -> list[tuple[int, str, list[Frame]]]:
    """Read what a run has told after a number, and then what each newer one has told.

    Only of runs with a key below `before`.
    """
    runs = conversation.runs().filter(pk__gte=run, pk__lt=before).order_by("pk")
    found = []
    for pk, run_id in runs.values_list("pk", "run_id"):
        chunks = event_rows.read(conversation, pk, after if pk == run else 0)
        frames = [frame for chunk in chunks for frame in chunk.frames]
        found.append((pk, run_id, frames))
    return found


def fresh_running(
    found: Found, page: Page, told: OpenRun, options: StreamOptions
) -> list[Frame]:
    """Return a run from its start: the messages before it, then its events.

    A listener that is within this run goes on in place.
    """
    first, *events = joined(found.frames)
    # A snapshot replaces all messages: those that the run answers are in it too.
    asked = [] if found.about.goes_on else first.event["input"]["messages"]
    told_before = restated(page, options, asked)
    snapshot = Frame(first.run_id, first.number, told_before)
    if told.run_id == first.run_id:
        return [*_apart(told.ends()), snapshot, *events]
    return [first, snapshot, *events]


def joined(frames: Iterable[Frame]) -> list[Frame]:
    """Join what neighbours say of the same, under the number of the last of them."""
    groups: list[list[Frame]] = []
    for frame in frames:
        if groups and len(merge([groups[-1][0].event, frame.event])) == 1:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    return [
        Frame(
            group[-1].run_id, group[-1].number, merge(each.event for each in group)[0]
        )
        for group in groups
    ]


def _end_of(
    conversation: Conversation,
    run: AgentRun | None,
    run_id: str,
    interrupts: list[dict[str, Any]],
) -> Event:
    """Return the last event of a run that has ended, as its row tells it.

    Without `run_id` the event ends the telling of what lies at rest.
    """
    status = None if run is None else run.status
    # What tells of the rest is no run, and has used nothing.
    used = usage_of(run) if run and run_id else None
    outcome: dict[str, Any] = {"type": "success"}
    if interrupts:
        # Also those of a later run: a page asks what the last event says.
        outcome = {"type": "interrupt", "interrupts": interrupts}
    elif status in {Status.FAILED, Status.INTERRUPTED} or (run_id and run is None):
        # Without a row it was deleted, with all of the session.
        code = (run.error_code or "internal") if run else "interrupted"
        failed = run.run_id if run else run_id
        return run_error(code, message_for(code), run_id=failed, usage=used)
    elif run_id and status != Status.COMPLETED:
        outcome = {"type": "cancelled"}
    return run_finished(conversation.session_id, run_id, outcome, used)


def fresh_resting(
    conversation: Conversation,
    rest: tuple[Page, Found, str],
    options: StreamOptions,
    told: OpenRun,
) -> list[Frame]:
    """Return what the rows have, as the events of a legal run.

    A listener that is within a run hears its end in place. What is running, the last of
    `rest`, is not ended, so that a page shows it and can stop it.
    """
    page, found, running = rest
    messages, about = shown(page, options)
    messages = add_pending_calls(messages, found.interrupts, options)
    told_now = snapshot(messages, **about)
    run_id = told.run_id or f"{SYNC_PREFIX}{uuid.uuid4().hex[:12]}"
    end = {**found.end, "runId": run_id} if "runId" in found.end else found.end
    events = [*told.ends(), told_now, end] if told.run_id else []
    if running:
        started = run_started(conversation.session_id, running)
        events += [started, told_now]
    elif not told.run_id:
        events = [run_started(conversation.session_id, run_id), told_now, end]
    return _apart(events)


def _apart(events: Iterable[Event]) -> list[Frame]:
    """Number events that are in no run's log, so that no replay begins at them."""
    name = f"{SYNC_PREFIX}{uuid.uuid4().hex[:12]}"
    return [Frame(name, number, event) for number, event in enumerate(events, 1)]
