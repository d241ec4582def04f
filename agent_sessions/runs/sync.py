"""Bring a listener up to date: a replay where that is exact, else a fresh start."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_sessions.agui import (
    SYNC_PREFIX,
    StreamOptions,
    idle_sync,
    messages_from_items,
    run_error,
    run_started,
    snapshot,
)
from agent_sessions.backends.base import Page
from agent_sessions.backends.encrypted.pages import assert_open
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import pausing, records
from agent_sessions.runs.conversation import Conversation
from agent_sessions.runs.errors import message_for
from agent_sessions.runs.log import Event, EventLog, Frame

if TYPE_CHECKING:
    from agent_sessions.runs.active import ActiveRun

SNAPSHOT_LIMIT = 100


@dataclass(frozen=True, slots=True)
class Rest:
    """What the rows say of a conversation in which no run of this process is going."""

    page: Page
    interrupts: list[dict[str, Any]]
    # The code with which the last run failed, and its id.
    failed: tuple[str, str] | None
    # The id of a run that another process has, or whose log has lost its start.
    running: str | None


def messages_of(page: Page, options: StreamOptions) -> list[Event]:
    """Turn a page of stored items into AG-UI messages. Raises EncryptionError."""
    # Left out, the conversation would look empty.
    assert_open(page)
    return messages_from_items(page.items, options)


def cursor_of(page: Page) -> str | None:
    """Give the cursor of what lies before a page; None where nothing does."""
    return str(page.items[0].position) if page.has_earlier and page.items else None


def replay(offset: str | None, log: EventLog | None) -> list[Frame] | None:
    """Give the frames after an offset; None where the log can't tell exactly."""
    run_id, _, number = (offset or "").rpartition(":")
    if log is None or log.run_id != run_id or not number.isascii():
        return None
    return log.after(int(number)) if number.isdigit() else None


async def read_before(run: ActiveRun) -> Page:
    """Read the history up to where a run began."""
    conversation = run.conversation
    base = await run.base()
    return await conversation.backend.apage(
        conversation.key, before=base + 1, limit=SNAPSHOT_LIMIT
    )


def fresh_running(run: ActiveRun, page: Page) -> list[Frame]:
    """Start anew in the middle of a run: its start, what was before, its events."""
    first, *events = run.log.frames()
    before = snapshot(messages_of(page, run.setup.options), before=cursor_of(page))
    return [first, Frame(run.run_id, first.number, before), *events]


async def read_rest(conversation: Conversation, stale_after: float) -> Rest:
    """Read a conversation at rest, after freeing it from what died."""

    def read() -> tuple[list[dict[str, Any]], tuple[str, str] | None, str | None]:
        row = pausing.recover(conversation, stale_after)
        if row is None or row.state == AgentSession.State.RUNNING:
            return [], None, row.run_id if row else None
        waiting = pausing.pending(conversation)
        if waiting is not None:
            return waiting.interrupts, None, None
        run = records.last_run(conversation)
        if run is None or run.status not in {
            AgentRun.Status.FAILED,
            AgentRun.Status.INTERRUPTED,
        }:
            return [], None, None
        return [], (run.error_code or "internal", run.run_id), None

    rows = await conversation.backend.threads.run(read)
    page = await conversation.backend.apage(conversation.key, limit=SNAPSHOT_LIMIT)
    return Rest(page, *rows)


def fresh_resting(
    conversation: Conversation, rest: Rest, options: StreamOptions
) -> list[Frame]:
    """Start anew where nothing runs: a legal run of its own that only tells."""
    run_id = f"{SYNC_PREFIX}{uuid.uuid4().hex[:12]}"
    messages = messages_of(rest.page, options)
    before = cursor_of(rest.page)
    if rest.failed is not None:
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
