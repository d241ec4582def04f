"""Bring a listener up to date: a replay where that is exact, else a fresh start."""

from __future__ import annotations

import json
import re
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_sessions.agui import (
    SYNC_PREFIX,
    OpenRun,
    StreamOptions,
    add_pending_calls,
    messages_from_items,
    run_error,
    run_finished,
    run_started,
    snapshot,
)
from agent_sessions.approvals import pending
from agent_sessions.backends.base import Page
from agent_sessions.backends.run_rows import newest
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import CALL_OF, Key, call_key, own_key, type_and_role
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import recovery
from agent_sessions.runs.failures import message_for
from agent_sessions.runs.log import Event, EventLog, Frame
from agent_sessions.runs.naming import named
from agent_sessions.runs.setup import Conversation
from agent_sessions.usage import usage_of

if TYPE_CHECKING:
    from agent_sessions.runs.active import ActiveRun

Status = AgentRun.Status
SNAPSHOT_LIMIT = 100
# So many times longer is a page that would hold nothing but outputs of earlier calls.
WIDER = 10
# One snapshot's messages as JSON: a client that asks again and again gets no more.
SNAPSHOT_BYTES = 512 * 1024
# No more digits than int() takes, and than a run has events.
_NUMBER = re.compile("[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Rest:
    """What the rows say of a conversation in which no run of this process is going."""

    page: Page
    interrupts: list[dict[str, Any]]
    # How the run of the listener ended, or the last one.
    end: Event
    # The id of a run that another process has.
    running: str | None


def shown(
    page: Page, options: StreamOptions, room: int = SNAPSHOT_BYTES
) -> tuple[list[Event], str | None]:
    """Return a page's newest AG-UI messages that fit, and the cursor of what is earlier.

    `room` is in bytes of JSON. Raises EncryptionError.
    """
    # Left out, the conversation would look empty.
    page.assert_open()
    items, first = page.items, 0
    messages = messages_from_items(items, options)
    fitting = _fitting(messages, room)
    if fitting < len(messages):
        # Not every item is a message of its own.
        first = bisect_left(
            range(len(items)),
            True,
            key=lambda n: len(messages_from_items(items[n:], options)) <= fitting,
        )
    if first or page.has_earlier:
        found, fits = _beginnings(items), first
        first = next((n for n in found if n >= fits), fits)
        if found and found[-1] < fits < len(items):
            # Calls at once whose outputs don't all fit.
            first = found[-1]
        messages = messages_from_items(items[first:], options)
        if first < fits:
            _shorten(messages, room)
    if not items or not (page.has_earlier or first):
        return messages, None
    # Where not even the newest item fits, the cursor lies behind it.
    before = items[first].position if first < len(items) else items[-1].position + 1
    return messages, str(before)


def restated(page: Page, options: StreamOptions, asked: Sequence[Event] = ()) -> Event:
    """Return the snapshot of a page, and of messages that are not stored yet."""
    room = SNAPSHOT_BYTES - len(_written(asked))
    messages, before = shown(page, options, room)
    return snapshot([*messages, *asked], before=before)


def lacks_calls(page: Page) -> bool:
    """Return whether a page is full of outputs whose calls lie before it."""
    return bool(page.items and page.has_earlier and not _beginnings(page.items))


def _beginnings(items: Sequence[StoredItem]) -> list[int]:
    """Return where a page may begin: no output after it has its call before it."""
    unanswered: set[Key] = set()
    found = []
    for index in range(len(items) - 1, -1, -1):
        item = items[index].item or {}
        if type_and_role(item)[0] in CALL_OF:
            unanswered.add(call_key(item))
        else:
            unanswered.discard(own_key(item))
        if not unanswered:
            found.append(index)
    return found[::-1]


def _fitting(messages: list[Event], room: int) -> int:
    """Count the newest messages that fit, as written to the wire."""
    for count, message in enumerate(reversed(messages)):
        room -= len(_written(message)) + len(",")
        if room < len("[]"):
            return count
    return len(messages)


def _shorten(messages: list[Event], room: int) -> None:
    """Leave out what the oldest tools were given and gave, until the messages fit."""
    excess = len(_written(messages)) - room
    for message in messages:
        size = len(_written(message))
        if excess > 0 and message["role"] == "tool":
            message |= {"content": "", "metadata": {"truncated": True}}
        for call in message.get("toolCalls", ()) if excess > 0 else ():
            call["function"]["arguments"] = ""
        excess -= size - len(_written(message))


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def replay(offset: str | None, log: EventLog) -> tuple[list[Frame], OpenRun] | None:
    """Return the frames after an offset, and what is open at it.

    None where the log can't tell exactly.
    """
    run_id, _, number = (offset or "").rpartition(":")
    if log.run_id != run_id or not _NUMBER.fullmatch(number):
        return None
    frames, told = log.after(int(number)), OpenRun()
    for frame in log.frames():
        if frame.number <= int(number):
            told.follow(frame.event)
    return None if frames is None else (frames, told)


async def read_before(run: ActiveRun) -> Page:
    """Read the history up to where a run began."""
    return await read_page(run.conversation, before=await run.base() + 1)


async def read_page(
    conversation: Conversation, before: int | None = None, ids: Sequence[Any] = ()
) -> Page:
    """Read the newest page of a history before a position, as a snapshot has it.

    `ids` are those of messages whose run has not written them down yet.
    """
    read, key = conversation.backend.apage, conversation.key
    page = await read(key, before=before, limit=SNAPSHOT_LIMIT)
    if lacks_calls(page):
        page = await read(key, before=before, limit=SNAPSHOT_LIMIT * WIDER)
    return await conversation.backend.threads.run(named, page, conversation.runs(), ids)


def fresh_running(run: ActiveRun, page: Page, told: OpenRun) -> list[Frame]:
    """Return a run from its start: the messages before it, then its events.

    A listener that is within this run, or another one, goes on in place.
    """
    first, *events = run.log.frames()
    # A snapshot replaces all messages: those that the run answers are in it too.
    asked = [] if run.goes_on else run.request.user_messages
    told_before = restated(page, run.setup.options, asked)
    snapshot = Frame(run.run_id, first.number, told_before)
    if told.run_id == run.run_id:
        return [*_apart(told.ends()), snapshot, *events]
    return [first, snapshot, *events]


async def read_rest(
    conversation: Conversation, stale_after: float, told: OpenRun
) -> Rest:
    """Read a conversation at rest, after freeing it from what died.

    `told` is the run that its listener is within, whose end is looked for.
    """

    def read() -> tuple[list[dict[str, Any]], Event, str | None]:
        row = recovery.recover(conversation, stale_after)
        going_on = row is not None and row.state == AgentSession.State.RUNNING
        asked = None
        if not going_on:
            asked = pending(conversation.backend, conversation.key, conversation.pk)
        runs = newest(conversation.using, conversation.pk)
        within = "" if told.run_id.startswith(SYNC_PREFIX) else told.run_id
        run = runs.filter(run_id=within) if within else runs
        interrupts = [] if asked is None else asked.interrupts
        end = _end_of(conversation, run.first(), within, interrupts)
        return interrupts, end, row.run_id if row is not None and going_on else None

    rows = await conversation.backend.threads.run(read)
    return Rest(await read_page(conversation), *rows)


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
    rest: Rest,
    running: str | None,
    options: StreamOptions,
    told: OpenRun,
) -> list[Frame]:
    """Return what the rows have, as the events of a legal run.

    A listener that is within a run hears its end in place. What is `running` elsewhere
    is not ended, so that a page shows it and can stop it.
    """
    messages, before = shown(rest.page, options)
    messages = add_pending_calls(messages, rest.interrupts, options)
    told_now = snapshot(messages, before=before)
    run_id = told.run_id or f"{SYNC_PREFIX}{uuid.uuid4().hex[:12]}"
    end = {**rest.end, "runId": run_id} if "runId" in rest.end else rest.end
    events: list[Event] = []
    if told.run_id:
        events = [*told.ends(), told_now, end]
    if running is not None:
        started = run_started(conversation.session_id, running)
        events += [started, told_now]
    elif not told.run_id:
        events = [run_started(conversation.session_id, run_id), told_now, end]
    return _apart(events)


def _apart(events: Iterable[Event]) -> list[Frame]:
    """Number events that are in no run's log, so that no replay begins at them."""
    name = f"{SYNC_PREFIX}{uuid.uuid4().hex[:12]}"
    return [Frame(name, number, event) for number, event in enumerate(events, 1)]
