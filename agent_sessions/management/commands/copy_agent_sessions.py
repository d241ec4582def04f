from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from typing import Any

from django.core.management.base import CommandError
from django.db import DatabaseError

from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import sessions
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.management.progress import add_progress, showing
from agent_sessions.management.selecting import count, counted, find_user
from agent_sessions.reports import guarded
from agent_sessions.retention import Selection
from agent_sessions.transfer.copy import Copier, find_sources
from agent_sessions.transfer.report import Report

# The exit code beside 0 and CommandError's 1, where nothing was written.
INCOMPLETE = 3


class Command(PrintingCommand):
    help = (
        "Copy histories from one backend to another, with their owners, titles, "
        "metadata, usage and runs. Each is compared with its copy by count and hash. "
        "It may be interrupted and run again: it goes on where it stopped. A different "
        "history at the target is never overwritten. Exit codes: 0 all done, 1 nothing "
        "written, 3 some histories were left as they are."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "session_ids", nargs="*", metavar="SESSION_ID", help="a session to copy"
        )
        for name, what in (("from", "copy from"), ("to", "copy to")):
            parser.add_argument(
                f"--{name}",
                required=True,
                dest=f"{name}_alias",
                metavar="ALIAS",
                help=f"the alias of AGENT_SESSIONS to {what}",
            )
        parser.add_argument(
            "--user", metavar="NAME", help="only sessions of the user of this name"
        )
        parser.add_argument("--all", action="store_true", help="all sessions")
        parser.add_argument(
            "--move",
            action="store_true",
            help="remove from the source what was copied and compared",
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=200,
            help="items of one append (default: %(default)s)",
        )
        parser.add_argument(
            "--in-clear",
            action="store_true",
            help="store in clear what the source encrypts, where the target doesn't",
        )
        parser.add_argument(
            "--noinput", action="store_true", help="don't ask before removing"
        )
        add_progress(parser)

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        ids = tuple(dict.fromkeys(options["session_ids"]))
        if not (ids or options["user"] or options["all"]):
            raise CommandError("Name sessions, or give --user or --all.")
        if options["from_alias"] == options["to_alias"]:
            raise CommandError("--from and --to are the same backend.")
        try:
            report = self._copy(ids, options)
        except AgentSessionError as exc:
            raise CommandError(str(exc)) from exc
        except DatabaseError as exc:
            # The driver's own words may quote contents, so only its kind is told.
            raise CommandError(
                f"The database refused the copying ({type(exc).__name__}). What was "
                "copied before is kept; run the same command again to go on.",
                returncode=INCOMPLETE,
            ) from exc
        self._tell(report, options)

    def _copy(self, ids: tuple[str, ...], options: dict[str, Any]) -> Report:
        source, target = sessions[options["from_alias"]], sessions[options["to_alias"]]
        user = None if options["user"] is None else find_user(options["user"])
        copier = Copier(
            source,
            target,
            move=options["move"],
            batch_size=options["batch_size"],
            in_clear=options["in_clear"],
        )
        if options["move"] and not options["noinput"]:
            self._confirm(options)
        chosen = find_sources(source, session_ids=ids, user=user)
        self.stopped = partial(self._stopped, copier.report)
        selection = Selection(session_ids=ids, backends=(source.alias,), user=user)
        with showing(
            self, options, lambda: selection.totals().items
        ) as copier.progress:
            return copier.run(chosen)

    def _stopped(self, report: Report) -> str:
        done = counted(report.made + report.grown, "session")
        return f"Stopped after {done}. Run the same command again to go on."

    def _confirm(self, options: dict[str, Any]) -> None:
        answer = self.ask(
            f"What is copied to {options['to_alias']!r} will be removed from "
            f"{options['from_alias']!r}. This can't be undone. Type 'yes' to go on: "
        )
        if answer.strip().lower() != "yes":
            raise CommandError("Nothing was written.")

    def _tell(self, report: Report, options: dict[str, Any]) -> None:
        for session_id, reason in report.refused.items():
            self.stderr.write(f"{session_id}: left: {reason}")
        for session_id in report.branched:
            self.stderr.write(
                f"{session_id}: only its current branch was copied; it has others."
            )
        if options["verbosity"]:
            moved = f", moved {report.moved}" if options["move"] else ""
            self.stdout.write(
                f"Copied {counted(report.items, 'item')}: sessions new "
                f"{report.made}, completed {report.grown}, unchanged "
                f"{report.unchanged}{moved}, left {len(report.refused)}."
            )
        if report.refused:
            raise CommandError(
                f"{counted(len(report.refused), 'session')} could not be copied.",
                returncode=INCOMPLETE,
            )
