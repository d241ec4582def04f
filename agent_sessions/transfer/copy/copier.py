"""The copying itself: one history after the other, compared when it is done."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import F

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.directory import NO_RUN
from agent_sessions.backends.leases import DatabaseNow
from agent_sessions.backends.reading import find_head, read_history
from agent_sessions.backends.remote.erasure import enroll
from agent_sessions.exceptions import (
    AgentSessionError,
    SessionDoesNotExist,
    StorageError,
)
from agent_sessions.items import StoredItem
from agent_sessions.models import AgentSession, Branch
from agent_sessions.reports import guarded
from agent_sessions.retention import why_spared
from agent_sessions.retention.pending import is_cleared
from agent_sessions.transfer.copy.histories import Fingerprint, Hasher, batches
from agent_sessions.transfer.copy.rows import MARKER, Places, finish_row, mark_of
from agent_sessions.transfer.copy.sources import Chosen

# How often a history is read again that grows while it is copied.
_ROUNDS = 5


class CopyProblem(AgentSessionError):
    """One history was left as it is, here and there; the others go on."""


@dataclass(slots=True)
class Report:
    """What was copied."""

    copied: int = 0
    # Copies that were there, begun or grown old, and are whole now.
    resumed: int = 0
    unchanged: int = 0
    moved: int = 0
    items: int = 0
    # Histories that were left as they are, and why.
    refused: dict[str, str] = field(default_factory=dict)
    # Sessions that have other branches, which stay where they are.
    branched: list[str] = field(default_factory=list)


class Copier:
    """Copies histories between two backends."""

    def __init__(
        self,
        source: BaseSessionBackend,
        target: BaseSessionBackend,
        *,
        move: bool = False,
        batch_size: int = 200,
        in_clear: bool = False,
    ) -> None:
        if source.encrypts and not (target.encrypts or in_clear):
            raise CopyProblem(
                f"{source.alias!r} encrypts and {target.alias!r} does not: what is "
                "copied would be stored in clear. Add --in-clear if that is meant."
            )
        self.source = source
        self.target = target
        self.move = move
        self.batch_size = batch_size
        self.report = Report()
        # Told how many items were copied or found to be there.
        self.progress: Callable[[int], None] | None = None
        self._exact = source.keeps_exactly and target.keeps_exactly

    @guarded
    def run(self, chosen: Iterable[Chosen | str]) -> Report:
        """Copy what is chosen. It may be run again after any end, and goes on.

        What a store refuses, or what can't be copied, is reported and left.
        """
        for each in chosen:
            if isinstance(each, str):
                self.report.refused[each] = "there is no such session."
                continue
            try:
                self._copy(each)
            except AgentSession.DoesNotExist:
                self._refuse(each, "it has been deleted meanwhile.")
            except SessionDoesNotExist:
                self._refuse(each, "a session of this id belongs to somebody else.")
            except (CopyProblem, StorageError) as exc:
                self._refuse(each, str(exc))
        return self.report

    def _refuse(self, chosen: Chosen, reason: str) -> None:
        self.report.refused[chosen.key.session_id] = reason

    # -- one history ---------------------------------------------------------------

    def _copy(self, chosen: Chosen) -> None:
        key = chosen.key
        self._check(chosen)
        held = self._hold(key) if self.move and chosen.row is not None else None
        try:
            was = find_head(self.target, key) > 0
            written, fingerprint = self._copy_items(key)
            done = self._finish(chosen)
            self._count(written, was=was, done=done)
            if self.move:
                self._remove(chosen, fingerprint, held)
        finally:
            if held is not None:
                self._release(key, held)

    def _check(self, chosen: Chosen) -> None:
        """Raise CopyProblem where a history can't be copied now."""
        if chosen.row is not None:
            chosen.row.refresh_from_db()
        for row in (chosen.row, self.target.directory.rows(chosen.key).first()):
            if row is not None and (reason := why_spared(row)):
                raise CopyProblem(f"{reason} in {row.backend!r}.")
        self._check_owner(chosen.key)
        if chosen.row is None:
            return
        branches = Branch._base_manager.using(self.source.directory.using)
        own = branches.filter(session_id=chosen.row.pk, head__gt=0)
        if own.exclude(pk=chosen.row.branch_id).exists():
            if self.move:
                raise CopyProblem(
                    "it has other branches, which only the source can keep. Copy it "
                    "without --move."
                )
            self.report.branched.append(chosen.key.session_id)

    def _check_owner(self, key: SessionKey) -> None:
        using = self.target.directory.using
        if key.user_id is None or using == self.source.directory.using:
            return
        owners: Any = get_user_model()._base_manager
        if not owners.using(using).filter(pk=key.user_id).exists():
            raise CopyProblem(f"its owner is not in the database {using!r}.")

    # -- items ---------------------------------------------------------------------

    def _copy_items(self, key: SessionKey) -> tuple[int, Fingerprint]:
        """Copy what the target lacks; tell how many items, and what both are now."""
        written = 0
        for number in range(_ROUNDS):
            more, fingerprint = self._copy_once(key, tell=not number)
            written += more
            if not more:
                # Both were read as they lie there now, and are alike.
                return written, fingerprint
        raise CopyProblem("it grows while it is copied. Run the command again.")

    def _copy_once(self, key: SessionKey, *, tell: bool) -> tuple[int, Fingerprint]:
        """Read both histories side by side, and append what the target lacks."""
        mine, theirs = Hasher(exact=self._exact), Hasher(exact=self._exact)
        items = iter(read_history(self.source, key))
        for there in read_history(self.target, key):
            here = next(items, None)
            same = (
                here is not None
                and here.item is not None
                and there.item is not None
                and mine.add(here.item) == theirs.add(there.item)
            )
            if not same:
                raise CopyProblem(
                    f"{self.target.alias!r} has another history of this id. Nothing "
                    "was overwritten."
                )
            if tell:
                self._tell(1)
        if mine.fingerprint() != theirs.fingerprint():
            raise CopyProblem("its copy differs from it, though each item is alike.")
        written = 0
        for batch in batches(items, self.batch_size):
            if not written:
                self._begin(key, begun=mine.count > 0)
            self.target.append(key, [self._readable(each, mine) for each in batch])
            written += len(batch)
            self._tell(len(batch))
        return written, mine.fingerprint()

    def _begin(self, key: SessionKey, *, begun: bool) -> None:
        """Mark the target as a copy, before anything is written to it."""
        rows = self.target.directory.rows(key)
        row = rows.first()
        marker = mark_of(row)
        if begun and marker.get("backend") != self.source.alias:
            raise CopyProblem(
                f"{self.target.alias!r} has a shorter history of this id, and it is no "
                "copy. Nothing was overwritten."
            )
        if row is None:
            with transaction.atomic(self.target.directory.using):
                enroll(self.target, key)
            row = rows.get()
        if not marker:
            metadata = {**row.metadata, MARKER: {"backend": self.source.alias}}
            rows.update(metadata=metadata)

    def _readable(self, stored: StoredItem, hasher: Hasher) -> dict[str, Any]:
        if stored.item is None:
            raise CopyProblem(
                f"item {stored.position} can't be read. Repair the session first: "
                "manage.py check_agent_sessions."
            )
        hasher.add(stored.item)
        return stored.item

    def _read(self, backend: BaseSessionBackend, key: SessionKey) -> Fingerprint:
        hasher = Hasher(exact=self._exact)
        for stored in read_history(backend, key):
            self._readable(stored, hasher)
        return hasher.fingerprint()

    # -- the rest ------------------------------------------------------------------

    def _finish(self, chosen: Chosen) -> bool:
        """Copy what the rows say; tell whether that was to be done."""
        if chosen.row is None:
            return False
        rows = self.target.directory.rows(chosen.key)
        if not rows.exists():
            # It is empty, and so is its copy.
            self._begin(chosen.key, begun=False)
        return finish_row(
            self.target,
            chosen.row,
            rows.get(),
            lambda: Places.read(self.source, self.target, chosen.key),
        )

    def _count(self, written: int, *, was: bool, done: bool) -> None:
        self.report.items += written
        if not written and not done:
            self.report.unchanged += 1
        elif was:
            self.report.resumed += 1
        else:
            self.report.copied += 1

    def _tell(self, count: int) -> None:
        if self.progress is not None:
            self.progress(count)

    # -- moving --------------------------------------------------------------------

    def _hold(self, key: SessionKey) -> str:
        """Take the lease, so that no run begins; give its name."""
        held = f"copy-{uuid.uuid4().hex}"
        idle = self.source.directory.rows(key).filter(
            run_id="", state=AgentSession.State.IDLE
        )
        if not idle.update(
            run_id=held,
            run_seen_at=DatabaseNow(),
            fence=F("fence") + 1,
            state=AgentSession.State.RUNNING,
        ):
            raise CopyProblem("a run holds it. It is free once that has ended.")
        return held

    def _release(self, key: SessionKey, held: str) -> None:
        self.source.directory.rows(key).filter(run_id=held).update(**NO_RUN)

    def _remove(self, chosen: Chosen, there: Fingerprint, held: str | None) -> None:
        """Remove the source's history, if it is still what was copied."""
        key = chosen.key
        if self._read(self.source, key) != there:
            raise CopyProblem("it was written to while it was copied; it stays here.")
        rows = self.source.directory.rows(key)
        if held is not None and not rows.filter(run_id=held).exists():
            raise CopyProblem("somebody else took it while it was copied; it stays.")
        self.source.clear(key)
        row = rows.first()
        if row is not None:
            is_cleared(row).delete(using=row._state.db)
        self.report.moved += 1
