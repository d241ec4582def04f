from __future__ import annotations

import os
import re
import shutil
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from django.core.management.base import CommandError

from agent_sessions.exceptions import AgentSessionError
from agent_sessions.management.files import unwritable, writing
from agent_sessions.management.options import (
    add_selection,
    counted,
    read_rows,
    read_selection,
)
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.models import AgentSession
from agent_sessions.transfer import Report
from agent_sessions.transfer.export import FORMS

# Bytes of a session that are held in memory before it is known to be whole.
_HELD = 4 * 1024 * 1024


class Command(PrintingCommand):
    help = (
        "Export sessions of all backends: as JSON, which "
        "import_agent_sessions reads, or as Markdown for people. A session that can't "
        "be read whole is left out and named. Exit codes: 0 all done, 1 nothing "
        "exported, 3 some were left out."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_selection(parser, verb="export")
        parser.add_argument(
            "--format", choices=FORMS, default="json", help="default: %(default)s"
        )
        parser.add_argument(
            "--output",
            default="-",
            metavar="PATH",
            help="a file for all of them, or a folder that gets a file of each "
            "(default: standard output)",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace files that are there"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        report = Report()
        self.stopped = partial(_stopped, report, options["output"])
        try:
            self._export(report, options)
        except (OSError, ValueError) as exc:
            raise unwritable(options["output"], exc) from exc
        if options["verbosity"]:
            # Standard output may be the export.
            self.stderr.write(
                f"Exported {counted(report.made, 'session')} with "
                f"{counted(report.items, 'item')}."
            )
            if report.opened:
                self.stderr.write(
                    f"{counted(report.opened, 'session')} of these: encrypted in the "
                    "store, and in clear in the export."
                )
        if report.refused:
            self.begun = True
            raise CommandError(
                f"{counted(report.refused, 'session')} could not be exported."
            )

    def _export(self, report: Report, options: dict[str, Any]) -> None:
        """Export one session after the other; one that fails is left out whole."""
        rows = read_rows(read_selection(options), undone="Nothing was exported.")
        make = FORMS[options["format"]].make
        with self._target(options) as take:
            for row in rows:
                before = report.items
                with SpooledTemporaryFile(max_size=_HELD) as whole:
                    try:
                        for piece in make(row, report):
                            whole.write(piece.encode("utf-8", "replace"))
                    except AgentSessionError as exc:
                        report.refused += 1
                        report.items = before
                        self.stderr.write(f"{row.session_id}: {exc}")
                        continue
                    whole.seek(0)
                    take(row, whole)
                report.made += 1

    @contextmanager
    def _target(
        self, options: dict[str, Any]
    ) -> Iterator[Callable[[AgentSession, IO[bytes]], None]]:
        output, overwrite = options["output"], options["overwrite"]
        path = Path(output)
        if output == "-":
            yield self._print
        elif path.is_dir() or output.endswith(os.sep):
            # Contents are private: nobody else may read what is written.
            path.mkdir(0o700, parents=True, exist_ok=True)
            ending = FORMS[options["format"]].ending

            def to_file(row: AgentSession, text: IO[bytes]) -> None:
                name = _file_name(row, ending)
                with writing(path / name, overwrite=overwrite) as file:
                    shutil.copyfileobj(text, file)

            yield to_file
        else:
            with writing(path, overwrite=overwrite) as file:
                yield lambda row, text: shutil.copyfileobj(text, file)

    def _print(self, row: AgentSession, text: IO[bytes]) -> None:
        for line in text:
            self.stdout.write_lines(line.decode(), ending="")


def _stopped(report: Report, output: str) -> str:
    done = f"Stopped after {counted(report.made, 'session')}."
    if output == "-" or Path(output).is_dir():
        return done
    return f"{done} Nothing was written to {output}."


def _file_name(row: AgentSession, ending: str) -> str:
    """Name a session's file, so that every file system takes it and none collide."""
    words = f"{row.backend}-{row.session_id}"
    return (
        f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', words)[:100].strip('.-')}-{row.pk}.{ending}"
    )
