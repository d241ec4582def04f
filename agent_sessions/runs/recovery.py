"""Free a session from what ended without saying so. All functions are synchronous."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import DatabaseError
from django.db.models import F, Q

from agent_sessions import approvals
from agent_sessions.agui import RunRequest, user_items
from agent_sessions.agui.content import message_text
from agent_sessions.approvals import Paused
from agent_sessions.backends import run_rows
from agent_sessions.backends.directory import NO_RUN
from agent_sessions.backends.leases import (
    RUN_SILENCE,
    is_dead,
    is_over,
    is_unheard,
    judged,
)
from agent_sessions.backends.run_rows import Status
from agent_sessions.backends.wrapping import innermost
from agent_sessions.concurrency.connections import atomic, transact
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items.kinds import ENDED_EARLY, type_and_role
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.runs import announcing, event_rows
from agent_sessions.runs.event_rows import About
from agent_sessions.runs.log import Event
from agent_sessions.runs.naming import NAMED, pair
from agent_sessions.runs.setup import Conversation
from agent_sessions.runs.turns import UNKNOWN_RESULT, Words, missing_outputs
from agent_sessions.times import stored

logger = logging.getLogger("agent_sessions.runs")

State = AgentSession.State


def recover(conversation: Conversation, stale_after: float) -> AgentSession | None:
    """Read the session's row, freed first of what ended without saying so.

    Raise UnknownEncryptionKey.
    """
    row = free(conversation, stale_after)
    if (
        row is not None
        and row.state == State.WAITING
        and approvals.pending(conversation.backend, conversation.key, row.pk) is None
    ):
        if withdraw(conversation, row.fence):
            logger.warning(
                "Session %s waited for an approval that can't be given any more; it "
                "was withdrawn",
                row.pk,
            )
        row.refresh_from_db()
    return row


def free(conversation: Conversation, stale_after: float) -> AgentSession | None:
    """Read the session's row, freed first from a run that ended without saying so."""
    silence = timedelta(seconds=stale_after)
    row: AgentSession | None = judged(
        conversation.rows().select_related("branch"), silence
    ).first()
    if row is not None and row.run_id and is_over(row):
        abandon(conversation, row, silence)
        row.refresh_from_db()
    return row


def abandon(
    conversation: Conversation, row: AgentSession, silence: timedelta = RUN_SILENCE
) -> None:
    """Free a session from the run that its row names, if that is over.

    A run that has been heard of since the row was read keeps its lease. What readers
    were shown of its answer is kept, with the mark of one that was stopped.
    """
    gone = Q() if is_dead(row.run_owner) else is_unheard(silence)
    held = conversation.rows().filter(gone, run_id=row.run_id, fence=row.fence)

    lost = conversation.runs().filter(run_id=row.run_id, status=Status.RUNNING)
    own = conversation.runs().filter(run_id=row.run_id)
    in_rows = innermost(conversation.backend).in_database is not None
    # No transaction is held, or repeated, while another store is asked.
    asked = None if in_rows else _open_again(conversation, row)

    def end() -> bool:
        if in_rows:
            _hold_key(conversation)
        if not held.update(**NO_RUN, fence=F("fence") + 1):
            return False
        paused = _open_again(conversation, row) if in_rows else asked
        # By keys: MariaDB takes no subquery about the table that it changes.
        resumed = conversation.runs().filter(resumed_by__run_id=row.run_id)
        pks = list(resumed.exclude(state="").values_list("pk", flat=True))
        kept = conversation.runs().filter(pk__in=pks).exclude(state="")
        # Where none is written, a call has begun meanwhile.
        if pks and run_rows.write(kept, state="") and paused is not None:
            _wait_again(conversation, row, paused)
            return False
        announcing.tell_ended(conversation, lost, Status.INTERRUPTED, "interrupted")
        if in_rows:
            run_rows.write(own, **_keep_words(conversation, row))
        return True

    if transact(conversation.using, end) and not in_rows:
        run_rows.write(own, **_keep_words(conversation, row))


def _open_again(conversation: Conversation, row: AgentSession) -> Paused | None:
    """Return what a run that died went on from, if none of its calls has begun.

    A refusal that was stored is not asked for again.
    """
    resumed = conversation.runs().filter(resumed_by__run_id=row.run_id)
    answered = resumed.exclude(state="").select_related("session").last()
    if answered is None:
        return None
    # It was sealed with the number of the lease before.
    answered.session.fence = row.fence - 1
    backend, key = conversation.backend, conversation.key
    try:
        paused = approvals.unseal(backend, key, answered)
        # One that has died, or was given back, has written nothing itself.
        wrote = conversation.runs().filter(pk__lte=answered.pk).order_by("-pk")
        heads = wrote.exclude(last_position=None).values_list(
            "last_position", flat=True
        )
        done = backend.page(key, after=heads.first() or 0, limit=1).items
    except AgentSessionError as exc:
        logger.warning(
            "What run %r went on from can't be opened (%s)",
            row.run_id,
            type(exc).__name__,
        )
        return None
    return None if done or paused.is_over else paused


def _wait_again(conversation: Conversation, row: AgentSession, paused: Paused) -> None:
    """Make a run that died wait for the approvals that it was to carry out."""
    died = conversation.runs().filter(run_id=row.run_id)
    resumed = conversation.runs().filter(resumed_by__run_id=row.run_id)
    run = died.get()
    sealed = approvals.seal(
        conversation.backend, conversation.key, run, row.fence + 1, paused
    )
    run_rows.write(
        died,
        status=Status.WAITING,
        state=sealed,
        sdk_version=resumed.values_list("sdk_version", flat=True).last() or "",
        expires_at=stored(datetime.fromtimestamp(paused.expires_at, UTC)),
    )
    conversation.rows().update(state=State.WAITING)
    announcing.tell_paused(conversation, row.run_id, paused)


def _hold_key(conversation: Conversation) -> None:
    """Lock the session's own key, if it has one, before its row, as an append does.

    Taken the other way round, the two would wait for each other.
    """
    with suppress(AgentSessionError), atomic(conversation.using):
        conversation.backend.sealer.seal(conversation.key, conversation.session_id)


def _keep_words(conversation: Conversation, row: AgentSession) -> dict[str, Any]:
    """Store what a run has said that died; return columns of the run's row."""
    run = conversation.runs().filter(run_id=row.run_id).first()
    try:
        with atomic(conversation.using):
            return {} if run is None else _store_words(conversation, run, row.fence + 1)
    except (AgentSessionError, DatabaseError) as exc:
        # The session is free all the same.
        logger.warning(
            "Words of run %r were not kept (%s)",
            row.run_id,
            type(exc).__name__,
            extra={"run_id": row.run_id, "error_type": type(exc).__name__},
        )
        return {}


def _store_words(
    conversation: Conversation, run: AgentRun, fence: int
) -> dict[str, Any]:
    chunks = event_rows.read(conversation, run.pk)
    about = chunks[-1].about if chunks else About()
    if about.base is None:
        return {}
    events = [frame.event for chunk in chunks for frame in chunk.frames]
    words = Words()
    for event in events:
        words.follow(event)
    backend, key = conversation.backend, conversation.key
    items = backend.page(key, after=about.base, limit=NAMED).items
    stored = [
        message_text(entry.item)[0]
        for entry in items
        if entry.item and type_and_role(entry.item) == ("message", "assistant")
    ]
    messages = [] if about.goes_on else events[0].get("input", {}).get("messages", [])
    asked = RunRequest(conversation.session_id, run.run_id, messages)
    closing = _results(conversation, run, events)
    unsaid = [text for text in newest_texts(events) if text and text not in stored]
    mark = ENDED_EARLY if innermost(backend).keeps_marks else {}
    lost = [{"role": "assistant", "content": text, **mark} for text in unsaid]
    lost = [*closing, *lost]
    if not items and not closing:
        # It died before the SDK stored what it was asked. A message that it asks again is
        # whole on another branch alone: what is told of it lacks files and sounds.
        is_again = [each["id"] for each in messages] == [asked.again_id]
        lost = [] if is_again else [*user_items(asked), *lost]
    if lost and not about.is_checked:
        backend.append(key.fenced(fence), lost)
        items = backend.page(key, after=about.base, limit=NAMED).items
    if not items:
        return {}
    return {
        "first_position": about.base + 1,
        "last_position": items[-1].position,
        "message_ids": pair(items, [each["id"] for each in messages], words.told),
    }


def _results(
    conversation: Conversation, run: AgentRun, events: Iterable[Event]
) -> list[dict[str, Any]]:
    """Return outputs for the approved calls of a run that died before it stored them."""
    if not run.resumes.exists():
        return []
    known = {
        event["toolCallId"]: event["content"]
        for event in events
        if event["type"] == "TOOL_CALL_RESULT" and not event.get("metadata")
    }
    page = conversation.backend.page(conversation.key, limit=NAMED)
    found = [entry.item for entry in page.items if entry.item]
    return missing_outputs(found, UNKNOWN_RESULT, known)


def newest_texts(events: Iterable[Event]) -> list[str]:
    """Return the texts of the newest response: what a tool has returned ends one."""
    texts: dict[str, str] = {}
    is_over = False
    for event in events:
        is_over = is_over or event["type"] == "TOOL_CALL_RESULT"
        if event["type"] == "TEXT_MESSAGE_START":
            texts = {} if is_over else texts
            texts[event["messageId"]] = ""
            is_over = False
        elif event["type"] == "TEXT_MESSAGE_CONTENT" and event["messageId"] in texts:
            texts[event["messageId"]] += event["delta"]
    return list(texts.values())


def withdraw(conversation: Conversation, fence: int, *, error_code: str = "") -> bool:
    """Drop what waits for approval, so that the conversation can go on.

    Only while the session's lease has the number `fence`: what was paused since stays.
    """

    def drop() -> int:
        freed: int = (
            conversation.rows()
            .filter(state=State.WAITING, fence=fence)
            # Counted on, so that what was sealed doesn't open if it is put back.
            .update(state=State.IDLE, fence=F("fence") + 1)
        )
        if freed:
            waiting = conversation.runs().filter(status=Status.WAITING)
            announcing.tell_ended(conversation, waiting, Status.CANCELLED, error_code)
        return freed

    return bool(transact(conversation.using, drop))
