from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from django.core.management.base import CommandError, no_translations

from agent_sessions.backends.keys import check_session_id
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.management.options import add_options, counted
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.transfer import Report
from agent_sessions.transfer.import_ import KINDS, Importer, open_source
from agent_sessions.transfer.import_.owners import Owners
from agent_sessions.transfer.import_.records import Source


class Command(PrintingCommand):
    help = (
        "Import sessions from another store. It may be interrupted and run again: it "
        "goes on where it stopped, and a second run imports only what is new. A "
        "session that is here already and wasn't made by this import is refused by "
        "name, and the others go on. Exit codes: 0 all done, 1 some were refused or "
        "nothing could be read."
    )
    incomplete = 1

    def add_arguments(self, parser: ArgumentParser) -> None:
        kinds = ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
        parser.add_argument("kind", choices=KINDS, metavar="KIND", help=kinds)
        parser.add_argument(
            "--from",
            required=True,
            dest="place",
            metavar="PATH_OR_ALIAS",
            help="a file, or an alias of DATABASES",
        )
        parser.add_argument(
            "--backend",
            default=DEFAULT_ALIAS,
            help="alias of AGENT_SESSIONS to import into (default: default)",
        )
        owners = parser.add_mutually_exclusive_group()
        add_options(owners, "--user", help="name of the user who is to own them all")
        owners.add_argument(
            "--user-from",
            metavar="RULE",
            help="how the id tells the owner: 'user:{username}:*', with {email} or "
            "{pk} likewise; or what comes before the name: 'user:'",
        )
        parser.add_argument(
            "--session-id",
            action="append",
            default=[],
            metavar="ID",
            help="import this session only; may be given again",
        )
        for table in ("sessions", "messages"):
            name, default = f"--{table}-table", f"agent_{table}"
            parser.add_argument(name, default=default, help="default: %(default)s")
        parser.add_argument(
            "--timezone",
            help="zone of the source's times that name none (default: UTC, and for an "
            "export TIME_ZONE)",
        )
        add_options(
            parser,
            "--batch-size",
            default=1_000,
            help="items of one transaction (default: %(default)s)",
        )
        parser.add_argument(
            "--in-clear",
            action="store_true",
            help="store in clear what was encrypted where the export is from",
        )
        add_options(parser, "--dry-run", "--progress")

    # Half of the report is words that are not translated, as those of other commands.
    @no_translations
    def handle(self, *args: Any, **options: Any) -> None:
        source = _open_source(options)
        try:
            importer = self._importer(source, options)
            self.begun = True
            importer.report.tell = self.stderr.write
            self.stopped = partial(_stopped, importer.report)
            with self.progress(lambda: source.total) as importer.progress:
                report = importer.run(options["session_id"])
        finally:
            source.close()
        if options["verbosity"]:
            for line in _lines(report, dry_run=options["dry_run"]):
                self.stdout.write(line)
        if report.refused:
            were = "was" if report.refused == 1 else "were"
            raise CommandError(
                f"{counted(report.refused, 'session')} {were} not imported."
            )

    def _importer(self, source: Source, options: dict[str, Any]) -> Importer:
        backend = sessions[options["backend"]]
        if backend.in_database is None:
            raise CommandError(
                f"The backend {backend.alias!r} is a {type(backend).__name__}; only a "
                "DatabaseBackend can be imported into."
            )
        importer = Importer(
            source,
            backend.in_database,
            owners=Owners(options["user"], options["user_from"]),
            batch_size=options["batch_size"],
            dry_run=options["dry_run"],
        )
        importer.in_clear = options["in_clear"]
        return importer


def _open_source(options: dict[str, Any]) -> Source:
    name = options["timezone"]
    try:
        zone = None if name is None else ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise CommandError(f"--timezone: there is no zone {name!r}.") from None
    for session_id in options["session_id"]:
        check_session_id(session_id)
    return open_source(
        options["kind"],
        options["place"],
        sessions_table=options["sessions_table"],
        messages_table=options["messages_table"],
        zone=zone,
        only=options["session_id"],
    )


def _stopped(report: Report) -> str:
    return (
        f"Stopped. Imported so far: {counted(report.items, 'item')} of "
        f"{counted(report.made + report.grown, 'whole session')}, but for the batch that "
        "was being written. Run the same command again to go on."
    )


def _lines(report: Report, *, dry_run: bool) -> list[str]:
    done = "Would import" if dry_run else "Imported"
    lines = [
        f"{done} {counted(report.items, 'item')}: sessions new {report.made}, grown "
        f"{report.grown}, unchanged {report.unchanged}, refused "
        f"{report.refused}; branches {report.branches}, runs "
        f"{report.runs}."
    ]
    if report.unreadable:
        lines.append(f"Unreadable, kept as they are: {report.unreadable}.")
    if report.left_out:
        lines.append(f"In no branch of the source, left out: {report.left_out}.")
    return lines
