from __future__ import annotations

import os
import re
import shutil
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from django.core.management.base import CommandError

from agent_sessions.backends.reading import read_history
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import StoredItem
from agent_sessions.management.files import unwritable, writing
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.management.selecting import (
    add_selection,
    counted,
    find_named,
    read_selection,
)
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded
from agent_sessions.retention import store_of
from agent_sessions.times import iso
from agent_sessions.transcript.markdown import markdown
from agent_sessions.transfer.export import export_session
from agent_sessions.transfer.report import Report

# Exit code beside 0 and CommandError's 1, where nothing was exported.
INCOMPLETE = 3
# Bytes of a session that are held in memory before it is known to be whole.
_HELD = 4 * 1024 * 1024


def _as_markdown(row: AgentSession, report: Report) -> Iterator[str]:
    backend, key = store_of(row)
    count = 0

    def items() -> Iterator[StoredItem]:
        nonlocal count
        for item in read_history(backend, key):
            count += 1
            yield item

    facts = (
        ("Backend", row.backend),
        ("Owner", "" if row.user is None else row.user.get_username()),
        ("Created", iso(row.created_at)),
        ("Last activity", iso(row.updated_at)),
    )
    for line in markdown(items(), title=row.session_id, facts=facts):
        yield f"{line}\n"
    report.items += count
    report.opened += backend.encrypts


FORMATS: dict[str, tuple[Callable[[AgentSession, Report], Iterator[str]], str]] = {
    "json": (export_session, "jsonl"),
    "markdown": (_as_markdown, "md"),
}


class Command(PrintingCommand):
    help = (
        "Export sessions of all backends: as JSON, an object a line, which "
        "import_agent_sessions reads, or as Markdown for people. A session that can't "
        "be read whole is left out and named. Exit codes: 0 all done, 1 nothing "
        "exported, 3 some were left out."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_selection(parser, verb="export")
        parser.add_argument(
            "--format", choices=FORMATS, default="json", help="default: %(default)s"
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

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        try:
            selection = read_selection(options)
            rows: Iterable[AgentSession] = (
                find_named(selection, undone="Nothing was exported.")
                if selection.session_ids
                else selection.rows()
            )
            done, report, failed = self._export(rows, options)
        except AgentSessionError as exc:
            raise CommandError(str(exc)) from exc
        except (OSError, ValueError) as exc:
            raise unwritable(options["output"], exc) from exc
        if options["verbosity"]:
            # Standard output may be the export.
            self.stderr.write(
                f"Exported {counted(done, 'session')} with "
                f"{counted(report.items, 'item')}."
            )
            if report.opened:
                self.stderr.write(
                    f"{counted(report.opened, 'session')} of these: encrypted in the "
                    "store, and in clear in the export."
                )
        if failed:
            raise CommandError(
                f"{counted(failed, 'session')} could not be exported.",
                returncode=INCOMPLETE,
            )

    def _export(
        self, rows: Iterable[AgentSession], options: dict[str, Any]
    ) -> tuple[int, Report, int]:
        """Export one session after the other; count them, their items and failures."""
        make, ending = FORMATS[options["format"]]
        done = failed = 0
        report = Report()
        with self._target(options, ending) as take:
            for row in rows:
                with SpooledTemporaryFile(max_size=_HELD) as whole:
                    try:
                        for piece in make(row, report):
                            whole.write(piece.encode("utf-8", "replace"))
                    except AgentSessionError as exc:
                        failed += 1
                        self.stderr.write(f"{row.session_id}: {exc}")
                        continue
                    whole.seek(0)
                    take(row, whole)
                done += 1
        return done, report, failed

    @contextmanager
    def _target(
        self, options: dict[str, Any], ending: str
    ) -> Iterator[Callable[[AgentSession, IO[bytes]], None]]:
        """Return what takes each session's text."""
        output: str = options["output"]
        path = Path(output)
        if output == "-":
            yield self._print
        elif path.is_dir() or output.endswith(os.sep):
            # Contents are private: nobody else may read what is written.
            path.mkdir(0o700, parents=True, exist_ok=True)
            overwrite = options["overwrite"]

            def to_file(row: AgentSession, text: IO[bytes]) -> None:
                with writing(
                    path / _file_name(row, ending), overwrite=overwrite
                ) as file:
                    shutil.copyfileobj(text, file)

            yield to_file
        else:
            with writing(path, overwrite=options["overwrite"]) as file:
                yield lambda row, text: shutil.copyfileobj(text, file)

    def _print(self, row: AgentSession, text: IO[bytes]) -> None:
        for line in text:
            self.stdout.write_lines(line.decode(), ending="")


def _file_name(row: AgentSession, ending: str) -> str:
    """Name a session's file, so that every file system takes it and none collide."""
    words = f"{row.backend}-{row.session_id}"
    return (
        f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', words)[:100].strip('.-')}-{row.pk}.{ending}"
    )
