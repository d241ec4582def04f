"""Bring a listener up to date: a replay where that is exact, else a fresh start."""

from __future__ import annotations

import json
import re
import uuid
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_sessions.agui import (
    SYNC_PREFIX,
    StreamOptions,
    idle_sync,
    messages_from_items,
    output_call_id,
    run_error,
    run_started,
    snapshot,
)
from agent_sessions.approvals import pending
from agent_sessions.backends.base import Page
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import CALLS, OUTPUTS
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import records
from agent_sessions.runs.failures import message_for
from agent_sessions.runs.log import Event, EventLog, Frame
from agent_sessions.runs.naming import named
from agent_sessions.runs.setup import Conversation

if TYPE_CHECKING:
    from agent_sessions.runs.active import ActiveRun

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
    # The code with which the last run failed, and its id.
    failed: tuple[str, str] | None
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
        first = next((n for n in _beginnings(items) if n >= first), first)
        messages = messages_from_items(items[first:], options)
    if not items or not (page.has_earlier or first):
        return messages, None
    # Where not even the newest item fits, the cursor lies behind it.
    before = items[first].position if first < len(items) else items[-1].position + 1
    return messages, str(before)


def restated(page: Page, options: StreamOptions) -> Event:
    """Return the snapshot of a page that replaces what a run has sent."""
    messages, before = shown(page, options)
    return snapshot(messages, before=before)


def lacks_calls(page: Page) -> bool:
    """Return whether a page is full of outputs whose calls lie before it."""
    return bool(page.items and page.has_earlier and not _beginnings(page.items))


def _beginnings(items: Sequence[StoredItem]) -> list[int]:
    """Return where a page may begin: no output after it has its call before it."""
    unanswered: set[str] = set()
    found = []
    for index in range(len(items) - 1, -1, -1):
        item = items[index].item or {}
        if item.get("type") in OUTPUTS:
            unanswered.add(output_call_id(item))
        elif item.get("type") in CALLS:
            unanswered.discard(output_call_id(item))
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


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def replay(offset: str | None, log: EventLog) -> list[Frame] | None:
    """Return the frames after an offset; None where the log can't tell exactly."""
    run_id, _, number = (offset or "").rpartition(":")
    if log.run_id != run_id or not _NUMBER.fullmatch(number):
        return None
    return log.after(int(number))


async def read_before(run: ActiveRun) -> Page:
    """Read the history up to where a run began."""
    return await read_page(run.conversation, before=await run.base() + 1)


async def read_page(conversation: Conversation, before: int | None = None) -> Page:
    """Read the newest page of a history before a position, as a snapshot has it."""
    read, key = conversation.backend.apage, conversation.key
    page = await read(key, before=before, limit=SNAPSHOT_LIMIT)
    if lacks_calls(page):
        page = await read(key, before=before, limit=SNAPSHOT_LIMIT * WIDER)
    return await conversation.backend.threads.run(named, page, conversation.runs())


def fresh_running(run: ActiveRun, page: Page) -> list[Frame]:
    """Start anew in the middle of a run: its start, what was before, its events."""
    first, *events = run.log.frames()
    # A snapshot replaces all messages: those that the run answers are in it too.
    asked = [] if run.goes_on else run.request.user_messages
    room = SNAPSHOT_BYTES - len(_written(asked))
    messages, before = shown(page, run.setup.options, room)
    told = snapshot([*messages, *asked], before=before)
    return [first, Frame(run.run_id, first.number, told), *events]


async def read_rest(conversation: Conversation, stale_after: float) -> Rest:
    """Read a conversation at rest, after freeing it from what died."""

    def read() -> tuple[list[dict[str, Any]], tuple[str, str] | None, str | None]:
        row = records.recover(conversation, stale_after)
        if row is None or row.state == AgentSession.State.RUNNING:
            return [], None, row.run_id if row else None
        waiting = pending(conversation.backend, conversation.key, conversation.pk)
        if waiting is not None:
            return waiting.interrupts, None, None
        run = conversation.runs().order_by("-pk").first()
        if run is None or run.status not in {
            AgentRun.Status.FAILED,
            AgentRun.Status.INTERRUPTED,
        }:
            return [], None, None
        return [], (run.error_code or "internal", run.run_id), None

    rows = await conversation.backend.threads.run(read)
    return Rest(await read_page(conversation), *rows)


def fresh_resting(
    conversation: Conversation, rest: Rest, options: StreamOptions
) -> list[Frame]:
    """Start anew where nothing runs here: a legal run of its own that only tells."""
    run_id = f"{SYNC_PREFIX}{uuid.uuid4().hex[:12]}"
    messages, before = shown(rest.page, options)
    if rest.running is not None:
        # It goes on, so it is not ended: a page shows it and can stop it.
        events = [
            run_started(conversation.session_id, rest.running),
            snapshot(messages, before=before),
        ]
    elif rest.failed is not None:
        code, failed_run = rest.failed
        events = [
            run_started(conversation.session_id, run_id),
            snapshot(messages, before=before),
            run_error(code, message_for(code), run_id=failed_run),
        ]
    else:
        events = idle_sync(
            conversation.session_id,
            run_id,
            messages,
            before=before,
            open_interrupts=rest.interrupts,
            options=options,
        )
    return [Frame(run_id, number, event) for number, event in enumerate(events, 1)]
