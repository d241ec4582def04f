"""The rows of runs that their caller started with a plain `Runner.run`."""

from __future__ import annotations

import uuid
from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.database.lineage import Lineages
from agent_sessions.backends.database.usage import opening
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import opens_turn
from agent_sessions.models import AgentRun, Branch
from agent_sessions.usage import Spent

PREFIX = "plain-"
Status = AgentRun.Status


class PlainRun:
    """One such run: a row, written again after each response of the model.

    Only this object writes the row, so it knows what is counted already.
    """

    def __init__(self, backend: BaseSessionBackend, key: SessionKey) -> None:
        self.backend = backend
        self.directory = backend.directory
        self.key = key
        # Else the caller says which item of the store is the newest.
        self.is_in_rows = backend.in_database is not None
        self.run_id = f"{PREFIX}{uuid.uuid4().hex}"
        self.agent_name = ""
        self.status: str = Status.RUNNING
        self.error_code = ""
        self._pk: int | None = None
        self._branch: int | None = None
        self._head: int | None = 0
        self._resumed = False
        self._counted = Spent()

    def begin(
        self,
        agent_name: str,
        *,
        resumed: bool,
        newest: StoredItem | None = None,
        **columns: str,
    ) -> None:
        """Open the row. Raises SessionDoesNotExist for someone else's session."""
        using = self.directory.using
        self.agent_name, self._resumed = agent_name, resumed
        with transaction.atomic(using):
            self.backend.enroll(self.key)
            rows = self.directory.rows(self.key)
            # The session's row first, as every other writer takes it.
            rows.update(agent_name=agent_name[:255])
            session = rows.values_list("pk", flat=True).get()
            runs = AgentRun._base_manager.using(using).filter(session_id=session)
            # A run without a last word: nothing tells when a plain run breaks off.
            runs.filter(status=Status.RUNNING, run_id__startswith=PREFIX).update(
                status=Status.INTERRUPTED,
                error_code="interrupted",
                finished_at=timezone.now(),
            )
            branch = self.directory.branches(self.key).first()
            if not self.is_in_rows:
                self._head = _before(newest, resumed=resumed)
            elif branch is not None:
                self._branch, self._head = branch.pk, branch.head
            self._pk = runs.create(
                session_id=session,
                branch=branch,
                run_id=self.run_id,
                agent_name=agent_name[:255],
                **columns,
            ).pk

    def write(self, spent: Spent, newest: StoredItem | None = None) -> None:
        """Bring the row and the session's counters up to date."""
        counted = self._counted.counters()
        more = {name: n - counted[name] for name, n in spent.counters().items()}
        using = self.directory.using
        with transaction.atomic(using):
            self.directory.rows(self.key).update(
                agent_name=self.agent_name[:255],
                **{name: F(name) + used for name, used in more.items() if used},
            )
            AgentRun._base_manager.using(using).filter(pk=self._pk).update(
                status=self.status,
                agent_name=self.agent_name[:255],
                error_code=self.error_code,
                finished_at=None if self.status == Status.RUNNING else timezone.now(),
                **self._place(using, newest),
                **spent.columns(),
            )
        self._counted = spent

    def _place(self, using: str, newest: StoredItem | None) -> dict[str, Any]:
        """Return where the run's items lie, and which turn it is about."""
        if not self.is_in_rows:
            if newest is None or self._head is None or newest.position <= self._head:
                return {}
            return {
                "first_position": self._head + 1,
                "last_position": newest.position,
                "turn": newest.turn,
            }
        heads = Branch._base_manager.using(using).filter(pk=self._branch)
        head = heads.values_list("head", flat=True).first()
        if self._branch is None or not head:
            return {}
        opened = opening(using, Lineages(using), self._branch)
        first = (self._head or 0) + 1
        if opened is not None and not self._resumed:
            # Runner.run stores the user's message before its first hook.
            first = min(first, opened.position)
        wrote = first <= head
        return {
            "first_position": first if wrote else None,
            "last_position": head if wrote else None,
            "turn": opened.turn if opened and wrote else 0,
            "turn_item": opened.item if opened and wrote else None,
        }


def _before(newest: StoredItem | None, *, resumed: bool) -> int:
    """Return the last position before a run, whose message may be stored already."""
    if newest is None:
        return 0
    asked = newest.item is not None and opens_turn(newest.item)
    return newest.position - (asked and not resumed)
