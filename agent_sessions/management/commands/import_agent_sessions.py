from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from django.core.management.base import CommandError, no_translations
from django.db import DatabaseError
from django.utils.translation import ngettext

from agent_sessions.backends.arguments import check_session_id
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.management.progress import add_progress, showing
from agent_sessions.management.selecting import count
from agent_sessions.reports import guarded
from agent_sessions.transfer.import_.importer import KINDS, Importer, open_source
from agent_sessions.transfer.import_.owners import (
    OneOwner,
    Owners,
    OwnersFromFile,
    OwnersFromIds,
)
from agent_sessions.transfer.import_.records import Source
from agent_sessions.transfer.report import Report


class Command(PrintingCommand):
    help = (
        "Import sessions from another store. It may be interrupted and run again: it "
        "goes on where it stopped, and a second run imports only what is new. A "
        "session that is here already and wasn't made by this import is refused by "
        "name, and the others go on. Exit codes: 0 all done, 1 some were refused or "
        "nothing could be read."
    )

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
        owners.add_argument("--user", help="name of the user who is to own them all")
        owners.add_argument(
            "--user-from",
            metavar="RULE",
            help="how the id tells the owner: 'user:{username}:*', with {email} or "
            "{pk} likewise; or what comes before the name: 'user:'",
        )
        owners.add_argument(
            "--owners-csv", metavar="FILE", help="rows of a session's id and a name"
        )
        parser.add_argument(
            "--session-id",
            action="append",
            default=[],
            metavar="ID",
            help="import this session only; may be given again",
        )
        parser.add_argument(
            "--sessions-table", default="agent_sessions", help="default: %(default)s"
        )
        parser.add_argument(
            "--messages-table", default="agent_messages", help="default: %(default)s"
        )
        parser.add_argument(
            "--timezone",
            help="zone of the source's times that name none (default: UTC, and for an "
            "export TIME_ZONE)",
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=1_000,
            help="items of one transaction (default: %(default)s)",
        )
        parser.add_argument(
            "--in-clear",
            action="store_true",
            help="store in clear what was encrypted where the export is from",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="write nothing, say what would be"
        )
        add_progress(parser)

    # Half of the report is words that are not translated, as those of other commands.
    @no_translations
    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        source = None
        try:
            source = _source(options)
            importer = self._importer(source, options)
            report = importer.report
            self.stopped = partial(self._stopped, report)
            with showing(self, options, source.total) as importer.progress:
                importer.run(options["session_id"])
        except AgentSessionError as exc:
            raise CommandError(str(exc)) from exc
        except DatabaseError as exc:
            # The driver's own words may quote contents, so only its kind is told.
            raise CommandError(
                f"The database refused the import ({type(exc).__name__}). What was "
                "imported before is kept; run the same command again to go on."
            ) from exc
        finally:
            if source is not None:
                source.close()
        self._tell(report, options)

    def _importer(self, source: Source, options: dict[str, Any]) -> Importer:
        backend = sessions[options["backend"]]
        target = backend.in_database
        if target is None:
            raise CommandError(
                f"The backend {backend.alias!r} is a {type(backend).__name__}; only a "
                "DatabaseBackend can be imported into."
            )
        return Importer(
            source,
            target,
            owners=_owners(options),
            batch_size=options["batch_size"],
            dry_run=options["dry_run"],
            in_clear=options["in_clear"],
        )

    def _stopped(self, report: Report) -> str:
        return (
            f"Stopped. Imported so far: {report.items:,} items of "
            f"{report.made + report.grown:,} sessions, whole batches of which are kept. "
            "Run the same command again to go on."
        )

    def _tell(self, report: Report, options: dict[str, Any]) -> None:
        for session_id, reason in report.refused.items():
            self.stderr.write(f"{session_id}: refused: {reason}")
        if report.more_refused:
            self.stderr.write(f"and {report.more_refused} more: refused.")
        for session_id in sorted(report.missing):
            self.stderr.write(f"{session_id}: the source has no such session.")
        if options["verbosity"]:
            for line in _lines(report, dry_run=options["dry_run"]):
                self.stdout.write(line)
        if failures := report.failures:
            raise CommandError(
                ngettext(
                    "%d session was not imported.",
                    "%d sessions were not imported.",
                    failures,
                )
                % failures
            )


def _source(options: dict[str, Any]) -> Source:
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


def _owners(options: dict[str, Any]) -> Owners:
    if options["user"] is not None:
        return OneOwner(options["user"])
    if options["user_from"] is not None:
        return OwnersFromIds(options["user_from"])
    if options["owners_csv"] is not None:
        return OwnersFromFile(options["owners_csv"])
    return Owners()


def _lines(report: Report, *, dry_run: bool) -> list[str]:
    done = "Would import" if dry_run else "Imported"
    items = ngettext("%d item", "%d items", report.items) % report.items
    lines = [
        f"{done} {items}: sessions new {report.made}, grown {report.grown}, unchanged "
        f"{report.unchanged}, refused "
        f"{len(report.refused) + report.more_refused}; branches "
        f"{report.branches}, runs {report.runs}."
    ]
    if report.unreadable:
        lines.append(f"Unreadable, kept as they are: {report.unreadable}.")
    if report.left_out:
        lines.append(f"In no branch of the source, left out: {report.left_out}.")
    return lines
