from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from typing import Any

from django.core.management.base import CommandError

from agent_sessions.handler import sessions
from agent_sessions.management.options import add_options, counted, find_user
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.retention import Selection
from agent_sessions.transfer import Report
from agent_sessions.transfer.copy import Copier, find_sources


class Command(PrintingCommand):
    help = (
        "Copy histories from one backend to another, with their owners, titles, "
        "metadata, usage and runs. Each is compared with its copy, item by item. It "
        "may be interrupted and run again: it goes on where it stopped. A different "
        "history at the target is never overwritten. Exit codes: 0 all done, 1 nothing "
        "written, 3 some histories were left as they are."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "session_ids", nargs="*", metavar="SESSION_ID", help="a session to copy"
        )
        for name in ("from", "to"):
            parser.add_argument(
                f"--{name}",
                required=True,
                dest=f"{name}_alias",
                metavar="ALIAS",
                help=f"the alias of AGENT_SESSIONS to copy {name}",
            )
        add_options(parser, "--user")
        parser.add_argument("--all", action="store_true", help="all sessions")
        parser.add_argument(
            "--move",
            action="store_true",
            help="remove from the source what was copied and compared",
        )
        add_options(
            parser,
            "--batch-size",
            default=500,
            help="items of one append (default: %(default)s)",
        )
        parser.add_argument(
            "--in-clear",
            action="store_true",
            help="store in clear what the source encrypts, where the target doesn't",
        )
        add_options(parser, "--noinput", "--progress")

    def handle(self, *args: Any, **options: Any) -> None:
        ids = tuple(dict.fromkeys(options["session_ids"]))
        if not (ids or options["user"] or options["all"]):
            raise CommandError("Name sessions, or give --user or --all.")
        if options["from_alias"] == options["to_alias"]:
            raise CommandError("--from and --to are the same backend.")
        source, target = sessions[options["from_alias"]], sessions[options["to_alias"]]
        user = None if options["user"] is None else find_user(options["user"])
        copier = Copier(
            source,
            target,
            move=options["move"],
            batch_size=options["batch_size"],
            in_clear=options["in_clear"],
        )
        if options["move"] and options["interactive"]:
            self.confirm(
                f"What is copied to {target.alias!r} will be removed from "
                f"{source.alias!r}. This can't be undone. Type 'yes' to go on: "
            )
        chosen = Selection(session_ids=ids, backends=(source.alias,), user=user)
        self.begun = True
        report = copier.report
        report.tell = self.stderr.write
        self.stopped = partial(_stopped, report)
        with self.progress(lambda: chosen.totals().items) as copier.progress:
            copier.run(find_sources(source, chosen))
        if options["verbosity"]:
            moved = f", moved {report.moved}" if options["move"] else ""
            self.stdout.write(
                f"Copied {counted(report.items, 'item')}: sessions new {report.made}, "
                f"grown {report.grown}, unchanged {report.unchanged}{moved}, refused "
                f"{report.refused}."
            )
        if report.refused:
            raise CommandError(
                f"{counted(report.refused, 'session')} could not be copied."
            )


def _stopped(report: Report) -> str:
    done = counted(report.made + report.grown, "session")
    return f"Stopped. Copied so far: {done}. Run the same command again to go on."
