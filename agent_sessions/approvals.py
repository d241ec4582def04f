"""The stored state of a run that waits for approval: a text that only it can open.

The run's state, its open approvals and their expiry are sealed together with the run,
the session and the number of the session's lease. So who can change rows can't put
them into another run, change what is shown or done, or bring back what was answered.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Exists, OuterRef, Q, QuerySet, Subquery
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.run_rows import newest
from agent_sessions.exceptions import (
    AgentSessionError,
    EncryptionError,
    InvalidApproval,
    UnknownEncryptionKey,
)
from agent_sessions.handler import sessions
from agent_sessions.models import AgentRun, AgentSession

_KIND = "approval"
State = AgentSession.State


@dataclass(frozen=True, slots=True)
class Paused:
    """What a run waits for, and what it goes on from."""

    # The SDK's RunState, as JSON. Like the next one it quotes the conversation.
    state: str = field(repr=False)
    # AG-UI's interrupts: what a person is shown and answers.
    interrupts: list[dict[str, Any]] = field(repr=False)
    # In Unix seconds.
    expires_at: float
    # How many messages of the user the run answers.
    asked: int = 1

    @property
    def is_over(self) -> bool:
        """Return whether the time to answer has passed."""
        return self.expires_at <= timezone.now().timestamp()


@dataclass(frozen=True, slots=True)
class Pending:
    """A paused run that waits for answers, as it was sealed."""

    run: AgentRun
    paused: Paused

    @property
    def interrupts(self) -> list[dict[str, Any]]:
        """The open approvals, as a client sees them."""
        return self.paused.interrupts

    @property
    def fence(self) -> int:
        """The number of the session's lease when this was read."""
        return self.run.session.fence


@sensitive_variables()
def seal(
    backend: BaseSessionBackend,
    key: SessionKey,
    run: AgentRun,
    fence: int,
    paused: Paused,
) -> str:
    """Return the text to store for a paused run; `fence` is its lease's number."""
    content = {
        **_binding(run, fence),
        "state": paused.state,
        "interrupts": paused.interrupts,
        "expires_at": paused.expires_at,
        "asked": paused.asked,
    }
    # It quotes the conversation, so it is kept as the items are.
    return backend.sealer.seal(key, json.dumps(content))


@sensitive_variables()
def unseal(backend: BaseSessionBackend, key: SessionKey, run: AgentRun) -> Paused:
    """Return what a run waits for; `run` was read together with its session's row.

    Raise InvalidApproval if it was changed, is another run's or was answered, and
    UnknownEncryptionKey if the key to read it is missing.
    """
    try:
        text = backend.sealer.open(key, run.state)
    except UnknownEncryptionKey:
        raise
    except EncryptionError:
        raise InvalidApproval(run.run_id) from None
    return _read(run, text)


def newest_waiting(backend: BaseSessionBackend, session: int) -> AgentRun | None:
    """Return a session's newest run, with the session, if it waits for approval.

    After a newer run the conversation has gone on without the answer.
    """
    using = backend.directory.using
    # Joined to the newest run itself PostgreSQL may read all sessions.
    found = Subquery(newest(using, session).values("pk")[:1])
    runs = AgentRun._base_manager.using(using).filter(pk=found)
    run: AgentRun | None = runs.select_related("session").first()
    return run if run and run.status == AgentRun.Status.WAITING else None


def open_pending(
    backend: BaseSessionBackend, key: SessionKey, run: AgentRun
) -> Pending | None:
    """Open what newest_waiting() has found; return None if its time has passed.

    Raise InvalidApproval and UnknownEncryptionKey.
    """
    # The column may end the time early; what was sealed can't be prolonged by it.
    if run.expires_at is not None and run.expires_at <= timezone.now():
        return None
    paused = unseal(backend, key, run)
    return None if paused.is_over else Pending(run, paused)


def pending(
    backend: BaseSessionBackend, key: SessionKey, session: int
) -> Pending | None:
    """Return the paused run that waits for answers; None if none can be given.

    Raise UnknownEncryptionKey.
    """
    run = newest_waiting(backend, session)
    try:
        return None if run is None else open_pending(backend, key, run)
    except InvalidApproval:
        return None


def waiting(runs: QuerySet[AgentRun]) -> QuerySet[AgentRun]:
    """Return those of `runs` that wait for approval, judged by their columns.

    For a status with =, SQLite would read all that wait where `runs` are a session's.
    """
    in_time = Q(expires_at=None) | Q(expires_at__gt=timezone.now())
    status = AgentRun.Status.WAITING
    return runs.filter(in_time, status__gte=status, status__lte=status)


def answerable(runs: QuerySet[AgentRun]) -> QuerySet[AgentRun]:
    """Return those of `runs` whose approvals can be given, judged by their columns."""
    newer = AgentRun._base_manager.using(runs.db).filter(
        session_id=OuterRef("session_id"), pk__gt=OuterRef("pk")
    )
    # After a newer run the conversation has gone on without the answer.
    wanted = waiting(runs).filter(~Exists(newer), session__state=State.WAITING)
    return wanted.exclude(state="")


@sensitive_variables()
def find_open(runs: QuerySet[AgentRun]) -> list[tuple[AgentRun, Paused]]:
    """Return those of `runs` whose approvals can be given now, to show them.

    The number of queries doesn't grow with the runs. Approvals that can't be opened are
    left out.
    """
    found: dict[str, list[AgentRun]] = defaultdict(list)
    for run in answerable(runs).select_related("session"):
        found[run.session.backend].append(run)
    opened = []
    for alias, own in found.items():
        keys = [SessionKey(run.session.session_id, run.session.user_id) for run in own]
        try:
            texts = sessions[alias].sealer.open_all(
                [(key, run.state) for key, run in zip(keys, own, strict=True)]
            )
        except AgentSessionError:
            # The alias is gone, or its keys can't be read.
            continue
        for run, text in zip(own, texts, strict=True):
            try:
                paused = None if text is None else _read(run, text)
            except InvalidApproval:
                continue
            if paused is not None and not paused.is_over:
                opened.append((run, paused))
    return opened


def find_states(rows: Iterable[AgentSession]) -> dict[int, str]:
    """Return the states of sessions by their primary keys, in a fixed number of queries.

    A session waits only if its approval can be given. Otherwise the next message is
    accepted and withdraws the approval, so the session is idle.
    """
    states: dict[int, str] = {row.pk: row.state for row in rows}
    using = next((row._state.db for row in rows), None)
    waiting = [pk for pk, state in states.items() if state == State.WAITING]
    if waiting:
        runs = AgentRun._base_manager.using(using).filter(session_id__in=waiting)
        opened = {run.session_id for run, _ in find_open(runs)}
        states |= {pk: State.IDLE.value for pk in waiting if pk not in opened}
    return states


@sensitive_variables()
def _read(run: AgentRun, text: str) -> Paused:
    """Return an opened text's content. Raise InvalidApproval if it is bound elsewhere."""
    try:
        found = json.loads(text)
        bound = _binding(run, run.session.fence)
        if {name: found[name] for name in bound} != bound:
            raise InvalidApproval(run.run_id)
        names = ("state", "interrupts", "expires_at", "asked")
        return Paused(*(found[name] for name in names))
    except (ValueError, KeyError, TypeError, RecursionError):
        # The error of json quotes the text.
        raise InvalidApproval(run.run_id) from None


def _binding(run: AgentRun, fence: int) -> dict[str, Any]:
    """Return what an approval is bound to, beside its session's id, owner and alias."""
    return {
        "kind": _KIND,
        "session": run.session_id,
        "run": run.pk,
        "run_id": run.run_id,
        # Each lease has a higher one; withdrawing an approval raises it too.
        "fence": fence,
    }
