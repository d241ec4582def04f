from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from django.core.management.base import CommandError

from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import sessions
from agent_sessions.management.options import (
    add_options,
    add_selection,
    count,
    counted,
    read_rows,
    read_selection,
)
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.models import AgentSession
from agent_sessions.retention import (
    Removal,
    Selection,
    Spared,
    finish_removals,
    foresee,
    has_retention,
    remove_all,
    unfinished_items,
)
from agent_sessions.retention.pending import retry_pending
from agent_sessions.retention.removal import Outcome

NOTHING_WRITTEN = "Nothing was written."


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
        add_options(parser, "--dry-run", "--progress", "--batch-size", "--noinput")

    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity: int = options["verbosity"]
        # What became of the sessions: their numbers and those of their items, by alias.
        self.cleared, self.items = Counter[str](), Counter[str]()
        self.spared = self.failed = 0
        selection = self._selection()
        # Whether the settings say which sessions are meant.
        governed = not selection.session_ids and (selection.idle or selection.expired)
        if governed and not options["delete"]:
            selection = replace(selection, filled=True)
        how = Removal(
            delete=options["delete"],
            waiting=options["waiting"],
            keep_turns=options["keep_last_turns"] or 0,
            still=selection,
            batch_size=options["batch_size"],
        )
        rows = read_rows(selection, undone=NOTHING_WRITTEN)
        if options["dry_run"]:
            for row in rows:
                self._count(row, foresee(row, how))
        else:
            if options["interactive"] and (how.delete or not governed):
                self._ask(selection, rows, how)
            self.begun, self.stopped = True, self._stopped
            self._finish()
            self._remove(selection, rows, how)
        if self.verbosity:
            for line in self._lines():
                self.stdout.write(line)
        if left := self.failed + (0 if governed else self.spared):
            left_as = "was left as it is" if left == 1 else "were left as they are"
            raise CommandError(
                f"{counted(left, 'session')} {left_as}.", returncode=self.incomplete
            )

    def _stopped(self) -> str:
        done = " ".join(self._lines())
        return f"Stopped. {done} Run the same command again to go on."

    # -- what is meant -------------------------------------------------------------

    def _selection(self) -> Selection:
        selection = read_selection(self.options)
        if keep := self.options["keep_last_turns"]:
            selection = self._trimmable(selection)
            if not selection.session_ids:
                selection = replace(selection, more_turns_than=keep)
        if selection.narrows or self.options["all"]:
            return selection
        if self.verbosity and not has_retention(selection.backends):
            self.stdout.write(
                "No backend has max_idle or max_age in its OPTIONS: only sessions "
                "whose own time is over are looked for."
            )
        return replace(selection, idle=True, expired=True)

    def _trimmable(self, selection: Selection) -> Selection:
        """Leave out backends that can't remove single turns."""
        every = selection.backends or tuple(sessions)
        can = tuple(alias for alias in every if sessions[alias].in_database)
        for alias in sorted(set(every) - set(can)):
            told = (
                f"{alias}: {type(sessions[alias]).__name__} can't remove single turns"
            )
            if selection.backends:
                raise CommandError(f"{told}. {NOTHING_WRITTEN}")
            # Those that are named are told of by their own names.
            if not selection.session_ids:
                self.stderr.write(f"{told}; its sessions are left out.")
        if selection.session_ids or len(can) == len(every):
            return selection
        if not can:
            raise CommandError(f"No backend can remove single turns. {NOTHING_WRITTEN}")
        return replace(selection, backends=can)

    def _ask(
        self, selection: Selection, rows: Iterable[AgentSession], how: Removal
    ) -> None:
        """Ask before more than one session."""
        if isinstance(rows, list):
            meant = [row for row in rows if not how.why_spared(row)]
            number, items = len(meant), sum(row.item_count for row in meant)
        else:
            totals = selection.totals()
            number, items = totals.sessions, totals.items
        if number < 2:
            return
        act = "Delete" if how.delete else "Clear"
        if keep := how.keep_turns:
            act = f"Keep only the last {counted(keep, 'turn')} of"
        self.confirm(
            f"{act} {number} sessions with {counted(items, 'item')}? This can't be "
            "undone. [y/N] "
        )

    # -- what is done --------------------------------------------------------------

    def _finish(self) -> None:
        """Go on with what earlier calls were kept from."""
        report = retry_pending()
        if self.verbosity and report.cleared:
            self.stdout.write(
                f"Removed {counted(report.items, 'item')} of "
                f"{counted(report.cleared, 'session')} deleted earlier."
            )
        for alias, reason in sorted(report.reasons.items()):
            self.failed += report.left[alias]
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

    def _remove(
        self, selection: Selection, rows: Iterable[AgentSession], how: Removal
    ) -> None:
        size = how.batch_size
        with self.progress(lambda: selection.totals().items) as add:
            for row, items in remove_all(rows, how):
                self._count(row, items)
                if not how.keep_turns and isinstance(items, int) and items > size:
                    finish_removals(batch_size=size, progress=add)
                else:
                    add(row.item_count)
            # What short histories have left, such as very many runs.
            finish_removals(batch_size=size)

    def _count(self, row: AgentSession, outcome: Outcome) -> None:
        if isinstance(outcome, Spared):
            self.spared += 1
            self.stderr.write(f"{row.session_id}: left out, because {outcome}.")
        elif isinstance(outcome, AgentSessionError):
            self.failed += 1
            self.stderr.write(f"{row.session_id}: {outcome}")
        elif outcome is not None:
            self.cleared[row.backend] += 1
            self.items[row.backend] += outcome

    def _lines(self) -> Iterator[str]:
        """Return what was done, or would be, a line for each backend."""
        options = self.options
        verb = "Delete" if options["delete"] else "Clear"
        if options["keep_last_turns"]:
            verb = "Remove"
        verb = (
            f"Would {verb.lower()}" if options["dry_run"] else f"{verb.rstrip('e')}ed"
        )
        for alias in sorted(self.cleared) or [""]:
            sessions = counted(self.cleared[alias], "session")
            items = counted(self.items[alias], "item")
            what = f"{sessions} with {items}"
            if options["keep_last_turns"]:
                what = f"{items} of {sessions}"
            yield f"{f'{alias}: ' if len(self.cleared) > 1 else ''}{verb} {what}."
