from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from django.core.management.base import CommandError
from django.db import DatabaseError

from agent_sessions.backends.database.removal import BATCH_SIZE
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import sessions
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.management.progress import Progress
from agent_sessions.management.selecting import (
    add_selection,
    count,
    counted,
    find_named,
    read_selection,
)
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded
from agent_sessions.retention import (
    Removal,
    Selection,
    Spared,
    count_trimmed,
    finish_removals,
    has_retention,
    remove,
    trim,
    unfinished_items,
    why_spared,
)
from agent_sessions.retention.pending import retry_pending

# Exit codes beside 0 and CommandError's 1, where nothing was written.
INCOMPLETE = 3
NOTHING_WRITTEN = "Nothing was written."


@dataclass(slots=True)
class Done:
    """What became of the sessions."""

    # By alias: sessions and items.
    removed: dict[str, list[int]] = field(default_factory=dict)
    spared: int = 0
    failed: int = 0

    def add(self, alias: str, items: int) -> None:
        sums = self.removed.setdefault(alias, [0, 0])
        sums[0] += 1
        sums[1] += items


class Command(PrintingCommand):
    help = (
        "Remove the items of sessions, of all backends alike. Without options: what is "
        "idle for longer than the max_idle of its backend, older than its max_age, or "
        "whose time is over; fit for cron. A session with an active run, or that waits "
        "for an approval, is left out. Exit codes: 0 all done, 1 nothing written, 3 "
        "some sessions were left as they are."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_selection(parser, verb="clear")
        parser.add_argument(
            "--all", action="store_true", help="all sessions that the options leave"
        )
        parser.add_argument(
            "--waiting",
            action="store_true",
            help="take sessions too that wait for an approval, which is withdrawn",
        )
        what = parser.add_mutually_exclusive_group()
        what.add_argument(
            "--delete",
            action="store_true",
            help="delete the sessions themselves too, not only their items",
        )
        what.add_argument(
            "--keep-last-turns",
            type=count,
            metavar="N",
            help="remove only what is older than the last N turns of each session",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="write nothing, say what would be"
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=BATCH_SIZE,
            help="rows to delete in one transaction (default: %(default)s)",
        )
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="don't ask before more than one session",
        )
        parser.add_argument(
            "--progress",
            action=BooleanOptionalAction,
            help="show a progress bar (default: on a terminal)",
        )

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity: int = options["verbosity"]
        self.options = options
        try:
            self._handle()
        except AgentSessionError as exc:
            raise CommandError(str(exc)) from exc
        except DatabaseError as exc:
            # The driver's own words may quote contents, so only its kind is told.
            raise CommandError(
                f"The database refused the call ({type(exc).__name__}). Run the same "
                "command again to go on.",
                returncode=INCOMPLETE,
            ) from exc

    def _handle(self) -> None:
        selection = self._selection()
        rows: Iterable[AgentSession] = (
            find_named(selection, undone=NOTHING_WRITTEN)
            if selection.session_ids
            else selection.rows()
        )
        failed = 0
        if self.options["dry_run"]:
            done = self._try(rows)
        else:
            if self.options["interactive"]:
                self._ask(selection, rows)
            failed = self._finish()
            done = self._remove(selection, rows)
        self._tell(done)
        done.failed += failed
        left = done.failed + (0 if self._is_governed(selection) else done.spared)
        if left:
            left_as = "was left as it is" if left == 1 else "were left as they are"
            raise CommandError(
                f"{counted(left, 'session')} {left_as}.", returncode=INCOMPLETE
            )

    # -- what is meant -------------------------------------------------------------

    def _selection(self) -> Selection:
        selection = read_selection(self.options)
        if self.options["keep_last_turns"]:
            selection = self._trimmable(selection)
        if not (selection.narrows or self.options["all"]):
            if self.verbosity and not has_retention(selection.backends):
                self.stdout.write(
                    "No backend has max_idle or max_age in its OPTIONS: only sessions "
                    "whose own time is over are looked for."
                )
            selection = replace(selection, idle=True, expired=True)
        if self._is_governed(selection) and not self.options["delete"]:
            selection = replace(selection, filled=True)
        return selection

    def _trimmable(self, selection: Selection) -> Selection:
        """Leave out backends that can't remove single turns."""
        can: list[str] = []
        for alias in selection.backends or sessions:
            if sessions[alias].in_database:
                can.append(alias)
                continue
            kind = type(sessions[alias]).__name__
            told = f"{alias}: {kind} can't remove single turns"
            if alias in selection.backends:
                raise CommandError(f"{told}. {NOTHING_WRITTEN}")
            if not selection.session_ids:
                self.stderr.write(f"{told}; its sessions are left out.")
        if selection.session_ids:
            # Each is told of by its own name.
            return selection
        if not can:
            raise CommandError(f"No backend can remove single turns. {NOTHING_WRITTEN}")
        if len(can) == len(selection.backends or list(sessions)):
            return selection
        return replace(selection, backends=tuple(can))

    def _is_governed(self, selection: Selection) -> bool:
        """Return whether the settings say which sessions are meant."""
        return not selection.session_ids and (selection.idle or selection.expired)

    def _ask(self, selection: Selection, rows: Iterable[AgentSession]) -> None:
        """Ask before more than one session, where settings haven't decided it."""
        if self._is_governed(selection) and not self.options["delete"]:
            return
        if isinstance(rows, list):
            meant = [row for row in rows if not self._reason(row)]
            number, items = len(meant), sum(row.item_count for row in meant)
        else:
            totals = selection.totals()
            number, items = totals.sessions, totals.items
        if number < 2:
            return
        keep = self.options["keep_last_turns"]
        question = (
            f"{'Delete' if self.options['delete'] else 'Clear'} {number} sessions"
        )
        if keep:
            question = (
                f"Keep only the last {counted(keep, 'turn')} of {number} sessions"
            )
        try:
            answer = self.ask(
                f"{question} with {counted(items, 'item')}? This can't be undone. [y/N] "
            )
        except EOFError:
            raise CommandError(
                "There is nobody to ask. Use --noinput to go on without."
            ) from None
        if answer.strip().lower() not in {"y", "yes"}:
            raise CommandError("Cancelled; nothing was written.")

    # -- what is done --------------------------------------------------------------

    def _finish(self) -> int:
        """Go on with what earlier calls were kept from; tell how many are still left."""
        report = retry_pending()
        if self.verbosity and report.cleared:
            self.stdout.write(
                f"Removed {counted(report.items, 'item')} of "
                f"{counted(report.cleared, 'session')} deleted earlier."
            )
        failed = 0
        for alias, reason in sorted(report.reasons.items()):
            failed += report.left[alias]
            self.stderr.write(
                f"{alias}: what {counted(report.left[alias], 'deleted session')} held "
                f"is still there ({reason})."
            )
        if unfinished_items():
            items = finish_removals(batch_size=self.options["batch_size"])
            if self.verbosity:
                self.stdout.write(
                    f"Deleted {counted(items, 'item')} that an earlier call had "
                    "removed."
                )
        return failed

    def _try(self, rows: Iterable[AgentSession]) -> Done:
        done = Done()
        for row in rows:
            if reason := self._reason(row):
                self._spare(row, reason, done)
            elif keep := self.options["keep_last_turns"]:
                self._one(row, done, partial(count_trimmed, row, keep))
            else:
                done.add(row.backend, row.item_count)
        return done

    def _remove(self, selection: Selection, rows: Iterable[AgentSession]) -> Done:
        done = Done()
        size, keep = self.options["batch_size"], self.options["keep_last_turns"]
        how = Removal(
            delete=self.options["delete"],
            waiting=self.options["waiting"],
            still=selection.holds,
            batch_size=size,
        )
        progress = self._progress(selection)
        for row in rows:
            if keep:
                self._one(row, done, partial(trim, row, keep, how))
                progress.add(row.item_count)
                continue
            items = self._one(row, done, partial(remove, row, how)) or 0
            if items > size:
                finish_removals(batch_size=size, progress=progress.add)
            else:
                progress.add(items)
        progress.close()
        return done

    def _one(
        self, row: AgentSession, done: Done, act: Callable[[], int | None]
    ) -> int | None:
        """Do something to one session; give the number of its items, if it was done."""
        try:
            items = act()
        except Spared as exc:
            self._spare(row, str(exc), done)
        except AgentSessionError as exc:
            done.failed += 1
            self.stderr.write(f"{row.session_id}: {exc}")
        else:
            if items is not None:
                done.add(row.backend, items)
            return items
        return None

    def _reason(self, row: AgentSession) -> str:
        return why_spared(row, waiting=self.options["waiting"])

    def _spare(self, row: AgentSession, reason: str, done: Done) -> None:
        done.spared += 1
        self.stderr.write(f"{row.session_id}: left out, because {reason}.")

    # -- what is told --------------------------------------------------------------

    def _progress(self, selection: Selection) -> Any:
        shown = self.options["progress"]
        if shown is None:
            shown = bool(self.verbosity) and self.stderr.isatty()
        if not shown:
            return _Silence()
        # Not self.stderr, which ends every line and colours it.
        return Progress(self.stderr.stream, selection.totals().items)

    def _tell(self, done: Done) -> None:
        if not self.verbosity:
            return
        verb = "Deleted" if self.options["delete"] else "Cleared"
        if self.options["dry_run"]:
            verb = "Would delete" if self.options["delete"] else "Would clear"
        several = len(done.removed) > 1
        for alias, (number, items) in sorted((done.removed or {"": [0, 0]}).items()):
            where = f"{alias}: " if several else ""
            text = f"{verb} {counted(number, 'session')} with {counted(items, 'item')}."
            if self.options["keep_last_turns"]:
                verb = "Would remove" if self.options["dry_run"] else "Removed"
                text = (
                    f"{verb} {counted(items, 'item')} of {counted(number, 'session')}."
                )
            self.stdout.write(where + text)


class _Silence:
    """The progress of a call that nobody watches."""

    def add(self, number: int) -> None: ...

    def close(self) -> None: ...
