"""Copy histories from one backend to another, and compare each with its copy."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import F

from agent_sessions.backends import run_rows
from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.directory import NO_RUN, active
from agent_sessions.backends.leases import DatabaseNow, this_process
from agent_sessions.backends.reading import read_history
from agent_sessions.backends.remote.erasure import enroll
from agent_sessions.backends.wrapping import innermost
from agent_sessions.exceptions import (
    AgentSessionError,
    SessionDoesNotExist,
    StorageError,
)
from agent_sessions.items import Item, StoredItem, text_of
from agent_sessions.items.kinds import type_and_role
from agent_sessions.models import AgentRun, AgentSession, Branch
from agent_sessions.reports import guarded
from agent_sessions.retention import (
    Removal,
    Selection,
    Spared,
    finish_removals,
    remove,
)
from agent_sessions.retention.selection import is_storable
from agent_sessions.transfer import Report
from agent_sessions.transfer.copied_rows import (
    MARKER,
    Chosen,
    Known,
    Pairs,
    mark_of,
    together,
)
from agent_sessions.transfer.export import MARKER as IMPORTED
from agent_sessions.usage import COUNTERS

# How often a history is read again that grows while it is copied.
_ROUNDS = 5
# Bytes of one append.
_MOST_BYTES = 4 * 1024 * 1024
# How the name of a lease begins that a copy takes.
_HELD = "copy-"


class CopyProblem(AgentSessionError):
    """One history was left as it is, here and there; the others go on."""


def find_sources(
    backend: BaseSessionBackend, selection: Selection
) -> Iterator[Chosen | str]:
    """Return the chosen histories of a backend, or an id that it doesn't have.

    Without ids and user these are all, also those that only the store knows where it
    can list them.
    """
    ids, user = selection.session_ids, selection.user
    rows, unknown = selection.named() if ids else (selection.rows(), [])
    for row in rows:
        yield Chosen(SessionKey(row.session_id, row.user_id), row)
    for session_id in unknown:
        key = SessionKey(session_id)
        # Stores refuse to look for other ids.
        is_sought = user is None and is_storable(session_id)
        yield Chosen(key) if is_sought and _is_there(backend, key) else session_id
    if not ids and user is None and backend.supports_listing:
        for session_id in list(cast("Any", backend).list_ids()):
            key = SessionKey(session_id)
            if not backend.directory.rows(key).exists() and _is_there(backend, key):
                yield Chosen(key)


class Copier:
    def __init__(
        self,
        source: BaseSessionBackend,
        target: BaseSessionBackend,
        *,
        move: bool = False,
        batch_size: int = 500,
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
        self.progress: Callable[[int], None] = lambda count: None
        # Items are compared as the SDK does, by their JSON with sorted keys; where a
        # store writes them anew, only by what they say.
        self._exact = source.keeps_exactly and target.keeps_exactly

    @guarded
    def run(self, chosen: Iterable[Chosen | str]) -> Report:
        """Copy what is chosen. It may be run again after any end, and goes on.

        What a store refuses, or what can't be copied, is reported and left.
        """
        # Before it is removed, each is looked at by itself.
        for group in together(chosen, 1 if self.move else self.batch_size):
            self._copy_some(group)
        return self.report

    def _copy_some(self, group: Sequence[Chosen | str]) -> None:
        known = self._known([each for each in group if isinstance(each, Chosen)])
        for each in group:
            if isinstance(each, str):
                self.report.refuse(each, "there is no such session.")
                continue
            try:
                self._copy(each, known)
            except AgentSession.DoesNotExist:
                reason = "it has been deleted meanwhile."
            except SessionDoesNotExist:
                reason = "a session of this id belongs to somebody else."
            except Spared as exc:
                reason = f"{exc}; it stays here."
            except (CopyProblem, StorageError) as exc:
                reason = str(exc)
            else:
                continue
            self.report.refuse(each.key.session_id, reason)

    def _known(self, chosen: Sequence[Chosen]) -> Known:
        return Known(self.source.directory.using, self.target.directory, chosen)

    def _copy(self, chosen: Chosen, known: Known) -> None:
        key, row, held = chosen.key, known.row(chosen), None
        self._check(chosen, known)
        if self.move and row is not None:
            held = self._hold(key, row)
            # A run may have ended before that.
            known = self._known([chosen])
            row = known.row(chosen)
        there, runs = known.copies.get(key), known.runs[row.pk if row else 0]
        try:
            had_items, written, pairs = self._copy_items(key, there, runs)
            if not pairs.here:  # It is empty, or gone since its row was read.
                self._known([chosen]).row(chosen)
            # An empty session's copy is made here.
            is_new = row is not None and self._copy_row(
                row, pairs.copy or self._begin(key, None), runs, pairs
            )
            self.report.items += written
            if not written and not is_new:
                self.report.unchanged += 1
            elif had_items:
                self.report.grown += 1
            else:
                self.report.made += 1
            if self.move:
                self._remove(chosen, held)
        finally:
            if held is not None:
                self._release(key, held)

    def _check(self, chosen: Chosen, known: Known) -> None:
        """Raise CopyProblem where nothing can be copied."""
        own = known.row(chosen)
        for row in (own, known.copies.get(chosen.key)):
            if row is not None and (reason := Removal().why_spared(row)):
                raise CopyProblem(f"{reason} in {row.backend!r}.")
        here, there = self.source.directory.using, self.target.directory.using
        if chosen.key.user_id is not None and here != there:
            owners: Any = get_user_model()._base_manager
            if not owners.using(there).filter(pk=chosen.key.user_id).exists():
                raise CopyProblem(f"its owner is not in the database {there!r}.")
        if own is not None and own.pk in known.forked:
            if self.move:
                raise CopyProblem(
                    "it has other branches, which only the source can keep. Copy it "
                    "without --move."
                )
            self.report.tell(
                f"{chosen.key.session_id}: only its current branch is copied; it has "
                "others."
            )

    # -- items ---------------------------------------------------------------------

    def _copy_items(
        self, key: SessionKey, copy: AgentSession | None, runs: Sequence[AgentRun]
    ) -> tuple[bool, int, Pairs]:
        """Copy what the target lacks: whether it had items, how many, where all lie."""
        written, had_items = 0, False
        for number in range(_ROUNDS):
            pairs = Pairs(self.target, copy, runs)
            more = 0
            found = self._missing(key, pairs, tell=not number)
            for batch in _batches(found, self.batch_size):
                if not more:
                    copy = self._begin(key, copy, has_items=bool(pairs.there))
                self.target.append(key, batch)
                more += len(batch)
                self.progress(len(batch))
            written += more
            had_items = had_items or (not number and bool(pairs.there))
            if not more:
                # Both were read as they lie there now, and are alike.
                pairs.write_times()
                return had_items, written, pairs
        raise CopyProblem("it grows while it is copied. Run the command again.")

    def _missing(
        self, key: SessionKey, pairs: Pairs | None = None, *, tell: bool = False
    ) -> Iterator[StoredItem]:
        """Return what the target lacks, once what it has is seen to be the same."""
        items = read_history(self.source, key)
        for there in read_history(self.target, key):
            here = next(items, None)
            if here is None or not self._are_same(here, there):
                raise CopyProblem(
                    f"{self.target.alias!r} has another history of this id. Nothing "
                    "was overwritten."
                )
            if pairs is not None:
                pairs.add(here, there)
            if tell:
                self.progress(1)
        yield from items

    def _are_same(self, here: StoredItem, there: StoredItem) -> bool:
        if here.item is None or there.item is None:
            return False
        return here.raw == there.raw or self._said(here.item) == self._said(there.item)

    def _said(self, item: Item) -> str:
        """Return what an item is compared by."""
        gist: Any = item
        if not self._exact:
            kind, role = type_and_role(item)
            names = ("call_id", "name", "arguments", "output")
            text = text_of(item) if kind == "message" else ""
            gist = [kind, role, text, *map(item.get, names)]
        return json.dumps(gist, sort_keys=True)

    def _begin(
        self, key: SessionKey, row: AgentSession | None, *, has_items: bool = False
    ) -> AgentSession:
        """Mark the target as a copy, before anything is written to it."""
        marker = mark_of(row)
        if has_items and marker.get("backend") != self.source.alias:
            raise CopyProblem(
                f"{self.target.alias!r} has a shorter history of this id, and it is no "
                "copy. Nothing was overwritten."
            )
        rows = self.target.directory.rows(key)
        with transaction.atomic(self.target.directory.using):
            if row is None:
                enroll(self.target, key)
            made: AgentSession = rows.get() if row is None else row
            if not marker:
                made.metadata |= {MARKER: {"backend": self.source.alias}}
                rows.update(metadata=made.metadata)
        return made

    def _copy_row(
        self,
        here: AgentSession,
        there: AgentSession,
        runs: Sequence[AgentRun],
        pairs: Pairs,
    ) -> bool:
        """Copy what a session's row and its runs say; tell whether anything was new."""
        using = self.target.directory.using
        marker = mark_of(there)
        if not marker:
            # A session of its own that says the same: its row is left alone.
            return False
        if runs and "usage" in marker:
            known = run_rows.runs_of(using, there.pk).values_list("run_id", flat=True)
            runs = [run for run in runs if run.run_id not in set(known)]
        # What an import wrote down is true of the source's branches alone.
        metadata = {
            k: v for k, v in here.metadata.items() if k not in {MARKER, IMPORTED}
        }
        counted = {name: getattr(here, name) for name in COUNTERS}
        wanted = {
            # Titles of encrypted sessions are not told.
            "title": "" if self.target.encrypts else here.title,
            "agent_name": here.agent_name,
            "expires_at": here.expires_at,
            "created_at": here.created_at,
            "metadata": {
                **metadata,
                MARKER: {"backend": here.backend, "usage": counted},
            },
        }
        if not runs and all(getattr(there, name) == wanted[name] for name in wanted):
            return False
        before = marker.get("usage") or {}
        more = {
            name: F(name) + counted[name] - before.get(name, 0) for name in COUNTERS
        }
        with transaction.atomic(using):
            AgentSession.objects.using(using).filter(pk=there.pk).update(
                **wanted, **more, **active(here.updated_at)
            )
            run_rows.copy(using, [pairs.copied(run, there) for run in runs])
        return True

    # -- moving --------------------------------------------------------------------

    def _hold(self, key: SessionKey, row: AgentSession) -> str:
        """Take the lease, so that no run begins; return its name."""
        held = f"{_HELD}{uuid.uuid4().hex}"
        rows = self.source.directory.rows(key)
        idle = rows.filter(run_id="", state=AgentSession.State.IDLE)
        if row.run_id.startswith(_HELD):
            # A copy that was killed has left it: _check() lets no other one pass.
            idle = rows.filter(run_id=row.run_id)
        if not idle.update(
            run_id=held,
            run_owner=this_process(),
            run_seen_at=DatabaseNow(),
            fence=F("fence") + 1,
            state=AgentSession.State.RUNNING,
        ):
            raise CopyProblem("a run holds it. It is free once that has ended.")
        return held

    def _release(self, key: SessionKey, held: str) -> None:
        self.source.directory.rows(key).filter(run_id=held).update(**NO_RUN)

    def _remove(self, chosen: Chosen, held: str | None) -> None:
        """Remove the source's history, if it is still what was copied."""
        key, row = chosen.key, chosen.row
        if row is not None:
            row.refresh_from_db()
        compared = self._state(row)

        def why_kept(row: AgentSession) -> str:
            if row.run_id != held:
                return "somebody else took it while it was copied"
            written = self._state(row) != compared
            return "it was written to while it was copied" if written else ""

        if next(self._missing(key), None) is not None:
            raise CopyProblem("it was written to while it was copied; it stays here.")
        if row is None:
            self.source.clear(key)
        else:
            # Asked again once writers wait: what is appended until then stays.
            how = Removal(delete=True, why_kept=why_kept, batch_size=self.batch_size)
            if remove(row, how) is None:
                raise CopyProblem("it has been deleted meanwhile.")
            finish_removals(batch_size=self.batch_size)
        self.report.moved += 1

    def _state(self, row: AgentSession | None) -> Any:
        """Return what every write to a history in the database changes."""
        if row is None or innermost(self.source).keeps_outside:
            return None
        branches = Branch._base_manager.using(row._state.db).filter(session_id=row.pk)
        heads = branches.order_by("pk").values_list("pk", "head", "archived_at")
        return row.branch_id, row.item_count, list(heads)


def _is_there(backend: BaseSessionBackend, key: SessionKey) -> bool:
    if backend.directory.rows(key).exists():
        return True
    return innermost(backend).keeps_outside and bool(backend.page(key, limit=1).items)


def _batches(found: Iterable[StoredItem], size: int) -> Iterator[list[Item]]:
    """Put items together, up to so many and so long. Raises CopyProblem."""
    batch: list[Item] = []
    length = 0
    for stored in found:
        if stored.item is None:
            raise CopyProblem(
                f"item {stored.position} can't be read. Repair the session first: "
                "manage.py check_agent_sessions."
            )
        if batch and (len(batch) == size or length + len(stored.raw) > _MOST_BYTES):
            yield batch
            batch, length = [], 0
        batch.append(stored.item)
        length += len(stored.raw)
    if batch:
        yield batch
