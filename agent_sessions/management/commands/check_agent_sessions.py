from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import asdict
from functools import partial
from typing import Any

from django.core.management.base import CommandError

from agent_sessions.doctor import Finding, Report, examine, why_closed
from agent_sessions.handler import sessions
from agent_sessions.management.options import (
    add_options,
    add_selection,
    counted,
    read_rows,
    read_selection,
)
from agent_sessions.management.printing import PrintingCommand, as_json


class Command(PrintingCommand):
    # Something is left to mend, or nothing was looked at.
    incomplete = 1
    nothing_done = 2
    help = (
        "Look for what is broken in stored sessions: outputs without calls, repeated "
        "messages, unreadable rows, wrong counters, runs that died. Nothing is written "
        "without --repair, and nothing is deleted: rows go into a quarantine. Exit "
        "codes: 0 nothing left to mend, 1 something is left, 2 nothing was examined."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_selection(parser, verb="examine")
        parser.add_argument("--repair", action="store_true", help="mend what is found")
        add_options(
            parser,
            "--batch-size",
            default=1000,
            help="rows to read at a time (default: %(default)s)",
        )
        add_options(parser, "--json", help="print the report as JSON")
        add_options(parser, "--progress")

    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity: int = options["verbosity"]
        selection = read_selection(options)
        for alias in selection.backends:
            if sessions[alias].in_database is None:
                raise CommandError(why_closed(sessions[alias]))
        rows = read_rows(selection, undone="Nothing was examined.")
        report = Report()
        self.begun, self.stopped = True, partial(_stopped, report)
        with self.progress(lambda: selection.totals().items) as add:
            examine(
                rows,
                repair=options["repair"],
                batch_size=options["batch_size"],
                progress=add,
                report=report,
            )
        if options["json"]:
            self.stdout.write(as_json({**asdict(report), "left": len(report.left)}))
        else:
            self._tell(report)
        if failed := sum(skip.failed for skip in report.skipped):
            raise CommandError(f"{counted(failed, 'session')} could not be examined.")
        if report.left:
            advice = "" if options["repair"] else " Mend with --repair."
            raise CommandError(f"{counted(len(report.left), 'finding')} left.{advice}")

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
            self.stdout.write(
                f"Examined {counted(report.sessions, 'session')} with "
                f"{counted(report.items, 'item')}: "
                f"{counted(len(report.findings), 'finding')}, {_mended(report)} repaired, "
                f"{len(report.left)} left; "
                f"{counted(len(report.skipped), 'session')} skipped, "
                f"{counted(len(report.quarantined), 'row')} in quarantine."
            )


def _mended(report: Report) -> int:
    return sum(finding.repaired for finding in report.findings)


def _stopped(report: Report) -> str:
    return (
        f"Stopped. Examined {counted(report.sessions, 'session')}: "
        f"{counted(len(report.findings), 'finding')}, {_mended(report)} repaired. Run "
        "the same command again for all."
    )


def _line(finding: Finding) -> str:
    place = "" if finding.branch is None else f" {finding.branch}"
    place += "" if finding.position is None else f" #{finding.position}"
    end = ""
    if finding.repaired:
        end = " Repaired."
    elif finding.repair:
        end = f" --repair would {finding.repair}."
    return f"{finding.session_id}:{place} {finding.code}: {finding.message}{end}"
