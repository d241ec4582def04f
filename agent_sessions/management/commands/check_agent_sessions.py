from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from django.core.management.base import CommandError

from agent_sessions.doctor import Finding, Report, examine
from agent_sessions.doctor.examining import why_closed
from agent_sessions.doctor.turns import BATCH_SIZE
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import sessions
from agent_sessions.management.printing import PrintingCommand, as_json
from agent_sessions.management.selecting import count, counted, find_user
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded
from agent_sessions.retention.selection import is_storable

# Exit codes beside 0: something is left to mend, or nothing was looked at.
LEFT = 1
NOT_EXAMINED = 2
# Seconds between two lines of progress.
INTERVAL = 2.0


class Command(PrintingCommand):
    nothing_done = NOT_EXAMINED
    help = (
        "Look for what is broken in stored sessions: outputs without calls, repeated "
        "messages, unreadable rows, wrong counters, runs that died. Nothing is written "
        "without --repair, and nothing is deleted: rows go into a quarantine. Exit "
        "codes: 0 nothing left to mend, 1 something is left, 2 nothing was examined."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "session_ids",
            nargs="*",
            metavar="SESSION_ID",
            help="a session to examine (default: all)",
        )
        parser.add_argument(
            "--backend", help="only sessions of this alias of AGENT_SESSIONS"
        )
        parser.add_argument("--user", help="only sessions of the user of this name")
        parser.add_argument("--repair", action="store_true", help="mend what is found")
        parser.add_argument(
            "--batch-size",
            type=count,
            default=BATCH_SIZE,
            help=f"rows to read at a time (default: {BATCH_SIZE})",
        )
        parser.add_argument(
            "--json", action="store_true", help="print the report as JSON"
        )

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity: int = options["verbosity"]
        self._told = time.monotonic()
        report = examine(
            list(_named(options)) if options["session_ids"] else _all(options),
            repair=options["repair"],
            batch_size=options["batch_size"],
            progress=self._tell_progress,
        )
        if options["json"]:
            self.stdout.write(as_json({**asdict(report), "left": len(report.left)}))
        else:
            self._tell(report)
        if not report.is_clean:
            raise CommandError(self._what_is_left(report, options), returncode=LEFT)

    def _tell(self, report: Report) -> None:
        for finding in report.findings:
            if finding.is_left or self.verbosity:
                self.stdout.write(_line(finding))
        for skip in report.skipped:
            self.stdout.write(f"{skip.session_id}: skipped: {skip.reason}")
        if self.verbosity > 1:
            for row in report.quarantined:
                self.stdout.write(
                    f"{row.session_id}: {row.branch} #{row.position}: in quarantine"
                )
        if self.verbosity:
            mended = sum(finding.repaired for finding in report.findings)
            self.stdout.write(
                f"Examined {counted(report.sessions, 'session')} with "
                f"{counted(report.items, 'item')}: "
                f"{counted(len(report.findings), 'finding')}, {mended} repaired, "
                f"{len(report.left)} left; "
                f"{counted(len(report.skipped), 'session')} skipped, "
                f"{counted(len(report.quarantined), 'row')} in quarantine."
            )

    def _tell_progress(self, sessions: int, items: int) -> None:
        now = time.monotonic()
        if self.verbosity and now - self._told >= INTERVAL:
            self._told = now
            self.stderr.write(
                f"{counted(sessions, 'session')}, {counted(items, 'item')} …"
            )

    def _what_is_left(self, report: Report, options: dict[str, Any]) -> str:
        failed = sum(skip.failed for skip in report.skipped)
        if failed:
            return f"{counted(failed, 'session')} could not be examined."
        advice = "" if options["repair"] else " Mend with --repair."
        return f"{counted(len(report.left), 'finding')} left.{advice}"


def _named(options: dict[str, Any]) -> Iterator[AgentSession]:
    """Find the named sessions in the order given."""
    queries = _rows(options)
    found: dict[str, list[AgentSession]] = {}
    # One by one: they are typed by hand, and each may be of several backends.
    for name in options["session_ids"]:
        own = queries if is_storable(name) else []
        found[name] = [row for query in own for row in query.filter(session_id=name)]
    if unknown := [name for name, rows in found.items() if not rows]:
        raise CommandError(
            f"There is no such session: {', '.join(map(repr, unknown))}. Nothing was "
            "examined.",
            returncode=NOT_EXAMINED,
        )
    for rows in found.values():
        yield from rows


def _all(options: dict[str, Any]) -> Iterator[AgentSession]:
    for query in _rows(options):
        after = 0
        while chunk := list(query.filter(pk__gt=after).order_by("pk")[:500]):
            yield from chunk
            after = chunk[-1].pk


def _rows(options: dict[str, Any]) -> list[Any]:
    """Return a query for each Django database that has sessions with their items."""
    alias, name = options["backend"], options["user"]
    owner = (
        {} if name is None else {"user_id": find_user(name, returncode=NOT_EXAMINED).pk}
    )
    try:
        if alias is not None:
            only = sessions[alias]
            if (found := only.in_database) is None:
                raise CommandError(why_closed(only), returncode=NOT_EXAMINED)
            rows = AgentSession.objects.using(found.using)
            return [rows.filter(backend=alias, **owner)]
        # DjangoSession works without any setting.
        backends = [sessions.database(), *(sessions[each] for each in sessions)]
    except AgentSessionError as exc:
        raise CommandError(str(exc), returncode=NOT_EXAMINED) from exc
    stores = [backend.in_database for backend in backends]
    databases = {store.using for store in stores if store is not None}
    return [
        AgentSession.objects.using(using).filter(**owner) for using in sorted(databases)
    ]


def _line(finding: Finding) -> str:
    place = "" if finding.branch is None else f" {finding.branch}"
    place += "" if finding.position is None else f" #{finding.position}"
    end = ""
    if finding.repaired:
        end = " Repaired."
    elif finding.repair:
        end = f" --repair would {finding.repair}."
    return f"{finding.session_id}:{place} {finding.code}: {finding.message}{end}"
