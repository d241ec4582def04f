"""The events of runs as rows: what any process tells again, exactly.

A row has some neighbouring events of one run. They quote the conversation, so they are
sealed as the items are, and bound to the run and to their numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from django.db import connections
from django.db.models import F
from django.views.decorators.debug import sensitive_variables

from agent_sessions.backends import run_rows
from agent_sessions.concurrency.connections import transact
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.models import AgentRun, AgentSession, RunEvents
from agent_sessions.runs.log import Frame
from agent_sessions.runs.setup import Conversation

logger = logging.getLogger("agent_sessions.runs")


@dataclass(frozen=True, slots=True)
class About:
    """What is to be known of a run to tell its events again."""

    # The last position before the run; None as long as that isn't known.
    base: int | None = None
    # Whether its messages were stored before it began, by a run that failed.
    goes_on: bool = False
    # Whether its answers count only once guardrails have seen them, or a session of
    # the project has changed them.
    is_checked: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring events of a run."""

    frames: Sequence[Frame]
    about: About

    @property
    def first(self) -> int:
        """The number of the first event."""
        return self.frames[0].number

    @property
    def last(self) -> int:
        """The number of the last event."""
        return self.frames[-1].number


@dataclass(frozen=True, slots=True)
class Unwritten:
    """The chunks of a run that are to be written under its lease."""

    conversation: Conversation
    run: AgentRun
    fence: int
    chunks: Sequence[Chunk]

    @property
    def lease(self) -> tuple[str, int]:
        """What the session's row says as long as the run holds it."""
        return self.run.run_id, self.fence


def write(using: str, found: Sequence[Unwritten]) -> list[bool]:
    """Write chunks of runs; return of each run whether nothing of it is left to write.

    A run that has lost its lease writes nothing any more. A session whose row is locked
    is left to the next call: one writer holds up no other.
    """
    sessions = {each.conversation.pk for each in found}
    # Before the transaction: sealing may wait for an append, which waits for the row.
    sealed = [(each, rows_of(each)) for each in found]

    def add() -> dict[int, tuple[str, int]]:
        held = hold(using, sessions)
        for each, rows in sealed:
            if held.get(each.conversation.pk) == each.lease:
                run_rows.add_events(using, rows)
        return held

    others = sessions - transact(using, add).keys()
    locked = read_leases(using, others) if others else {}
    return [locked.get(each.conversation.pk) != each.lease for each in found]


def rows_of(found: Unwritten) -> list[RunEvents]:
    """Return a run's chunks as rows, sealed and not written yet."""
    return [
        RunEvents(run=found.run, first=chunk.first, last=chunk.last, body=body)
        for chunk in found.chunks
        if (body := _seal(found, chunk))
    ]


def read(conversation: Conversation, run: int, after: int = 0) -> list[Chunk]:
    """Read the events of a conversation's run that come after a number.

    What doesn't open is left out: a hole in the numbers, as what is removed is.
    """
    rows = RunEvents._base_manager.using(conversation.using)
    own = rows.filter(run_id=run, last__gt=after).order_by("first")
    found = list(own.values_list("first", "last", "body", "run__run_id"))
    texts = conversation.backend.sealer.open_all(
        [(conversation.key, body) for *_, body, _ in found]
    )
    chunks = []
    for (first, last, _, run_id), text in zip(found, texts, strict=True):
        body = {} if text is None else json.loads(text)
        if body and body["bound"] == [run, first, last]:
            frames = [
                Frame(run_id, first + number, event)
                for number, event in enumerate(body["events"])
                if first + number > after
            ]
            chunks.append(Chunk(frames, About(**body["about"])))
    return chunks


@sensitive_variables()
def _seal(found: Unwritten, chunk: Chunk) -> str:
    """Return the text of a row; "" where the session's key can't be had."""
    body = {
        "bound": [found.run.pk, chunk.first, chunk.last],
        "about": asdict(chunk.about),
        "events": [frame.event for frame in chunk.frames],
    }
    conversation = found.conversation
    try:
        return conversation.backend.sealer.seal(conversation.key, json.dumps(body))
    except AgentSessionError as exc:
        logger.warning(
            "Events of run %r can't be sealed and were left out (%s)",
            found.run.run_id,
            type(exc).__name__,
            extra={"run_id": found.run.run_id, "error_type": type(exc).__name__},
        )
        return ""


def hold(using: str, sessions: Collection[int]) -> dict[int, tuple[str, int]]:
    """Lock sessions' rows that nobody else has locked; return their leases."""
    rows = AgentSession._base_manager.using(using).filter(pk__in=sessions)
    features = connections[using].features
    if features.has_select_for_update:
        rows = rows.order_by("pk").select_for_update(
            skip_locked=features.has_select_for_update_skip_locked,
            no_key=features.has_select_for_no_key_update,
        )
    else:
        # A transaction that reads first may be refused its turn to write.
        rows.update(fence=F("fence"))
    return _leases(rows)


def read_leases(using: str, sessions: Collection[int]) -> dict[int, tuple[str, int]]:
    """Return the leases that sessions' rows tell: of which run, and their numbers."""
    return _leases(AgentSession._base_manager.using(using).filter(pk__in=sessions))


def _leases(rows: Any) -> dict[int, tuple[str, int]]:
    return {
        pk: (run, fence) for pk, run, fence in rows.values_list("pk", "run_id", "fence")
    }
