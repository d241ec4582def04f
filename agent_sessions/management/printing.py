"""What commands print and ask, and what they say of errors and interruptions."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import (
    BaseCommand,
    CommandError,
    OutputWrapper,
    SystemCheckError,
)
from django.core.management.color import no_style
from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.db.migrations.executor import MigrationExecutor
from django.utils.connection import ConnectionDoesNotExist

from agent_sessions.backends.options import DEFAULT_ALIAS
from agent_sessions.characters import ascii_json, printable, printable_lines
from agent_sessions.exceptions import AgentSessionError, StorageError
from agent_sessions.models import AgentSession
from agent_sessions.reports import guard_methods
from agent_sessions.retention.selection import databases
from agent_sessions.times import iso

# Of a progress bar: its characters, and the seconds between two pictures.
WIDTH = 24
EVERY = 0.2
# Rows by which the widths of columns are chosen.
_PAGE = 100
# The exit code of what Ctrl-C has ended, as shells have it.
INTERRUPTED = 130
_OF_DATABASES = (DatabaseError, InterfaceError, StorageError)
# How many items there are, or an estimate that is made from how many are done.
Total = int | Callable[[int], int]


class Output(OutputWrapper):
    """A command's stream: text passes the table of characters, then gets its colour."""

    def __init__(self, out: Any) -> None:
        super().__init__(out)
        # For a progress bar, which redraws its line with numbers only.
        self.stream = out
        # A line end within a line is shown, not obeyed, but in contents and checks.
        self.clean: Callable[[str], str] = _clean_line

    def write(  # type: ignore[override]  # as Django's own
        self,
        msg: str = "",
        style_func: Callable[[str], str] | None = None,
        ending: str | None = None,
    ) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = self.clean(msg).encode(encoding, "backslashreplace").decode(encoding)
        super().write(text, style_func, ending)

    def write_lines(self, text: str, ending: str | None = None) -> None:
        """Write contents, whose line ends and tabs stay."""
        self.clean, before = printable_lines, self.clean
        self.write(text, ending=ending)
        self.clean = before


def _clean_line(text: str) -> str:
    return printable(text.removesuffix("\n")) + "\n" * text.endswith("\n")


class PrintingCommand(BaseCommand):
    """The base of every command here: nothing is printed but by the table.

    An error ends a command that has not `begun` with the exit code `nothing_done`,
    and one that has begun with `incomplete`, unless it brings a code of its own.
    """

    nothing_done = 1
    incomplete = 3
    begun = False

    # What Ctrl-C prints: what is done, and how to go on. Others only read.
    stopped: Callable[[], str] | None = None

    stdout: Output
    stderr: Output

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Reports of errors show no variables.
        guard_methods(cls, ["handle"])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stdout = Output(kwargs.get("stdout") or sys.stdout)
        stderr = Output(kwargs.get("stderr") or sys.stderr)
        stderr.style_func = self.stderr.style_func
        self.stderr = stderr

    def create_parser(
        self, prog_name: str, subcommand: str, **kwargs: Any
    ) -> Any:  # Django's CommandParser
        parser: ArgumentParser = super().create_parser(prog_name, subcommand, **kwargs)
        refuse = parser.error
        # A shell may have put the names of somebody else's files among the arguments.
        parser.error = lambda message: refuse(printable(message))  # type: ignore[method-assign]
        return parser

    def execute(self, *args: Any, **options: Any) -> Any:
        # Django would wrap these in streams of its own.
        for name in ("stdout", "stderr"):
            if options.get(name):
                setattr(self, name, Output(options[name]))
                options[name] = None
        self.options, self.begun = options, False
        try:
            return super().execute(*args, **options)
        except KeyboardInterrupt:
            text = "Stopped." if self.stopped is None else printable(self.stopped())
            raise CommandError(text, returncode=INTERRUPTED) from None
        except Exception as exc:
            _clean_messages(exc)
            told = self._explain(exc)
            if told is exc:
                raise
            _clean_messages(told)
            raise told from exc

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Make Django print its checks in many lines, without their colours."""
        style, self.style = self.style, no_style()
        self.stdout.clean = self.stderr.clean = printable_lines
        super().check(*args, **kwargs)
        # Where a check is an error, it is what is printed next, and the last.
        self.stdout.clean = self.stderr.clean = _clean_line
        self.style = style

    # -- for the commands ----------------------------------------------------------

    def confirm(self, question: str, *, undone: str = "written") -> None:
        try:
            answer = input(printable(question)) if question else input()
        except UnicodeDecodeError:
            answer = ""
        except EOFError:
            raise CommandError(
                "There is nobody to ask. Use --noinput to go on without."
            ) from None
        if answer.strip().lower() not in {"y", "yes"}:
            raise CommandError(f"Cancelled; nothing was {undone}.")

    @contextmanager
    def progress(self, total: Callable[[], Total]) -> Iterator[Callable[[int], None]]:
        """Show a bar where --progress asks for one; yield what counts the items done."""
        shown = self.options["progress"]
        if shown is None:
            shown = bool(self.options["verbosity"]) and self.stderr.isatty()
        if not shown:
            yield lambda count: None
            return
        # Not stderr itself, which ends every line and colours it.
        progress = Progress(self.stderr.stream, total())
        try:
            yield progress.add
        finally:
            progress.close()

    def _explain(self, exc: Exception) -> Exception:
        """Return the error to print instead of one, or that one itself."""
        code = self.incomplete if self.begun else self.nothing_done
        found = next((e for e in _chain(exc) if isinstance(e, _OF_DATABASES)), None)
        if found is not None and (lacking := _find_unmigrated()):
            if not _has_tables():
                code = self.nothing_done
            return CommandError(lacking, returncode=code)
        if isinstance(exc, CommandError):
            # 1 is what an error has that brings none.
            if exc.returncode == 1:
                exc.returncode = code
            return exc
        if isinstance(exc, AgentSessionError):
            return CommandError(str(exc), returncode=code)
        if isinstance(exc, ImproperlyConfigured | ConnectionDoesNotExist):
            return CommandError(
                f"{exc} Mend the settings, and run the command again.", returncode=code
            )
        if found is None:
            return exc
        # The driver's own words may quote contents, so only its kind is told.
        advice = "Its own log says why."
        if self.begun:
            advice = "Run the same command again to go on."
        elif isinstance(found, OperationalError | InterfaceError):
            advice = (
                "See that it runs, that DATABASES says where, and that it takes writes."
            )
        return CommandError(
            f"The database could not be used ({type(found).__name__}). {advice}",
            returncode=code,
        )


def moment(when: datetime | None) -> str:
    return "" if when is None else iso(when, " ", "seconds")


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Return the lines of a table; memory doesn't grow with the rows."""
    page: list[list[str]] = [list(heads)]
    widths: list[int] = []
    for row in rows:
        page.append([printable(cell) for cell in row])
        if len(page) > _PAGE:
            widths = widths or _widths(page)
            yield from _lines(page, widths)
            page = []
    yield from _lines(page, widths or _widths(page))


def as_json(value: Any, *, indent: int | None = None) -> str:
    return ascii_json(json.dumps(value, indent=indent, default=iso))


def json_list(values: Iterable[Any]) -> Iterator[str]:
    """Return the lines of a JSON list, one value a line."""
    before = "["
    for value in values:
        yield before + as_json(value)
        before = ","
    yield "[]" if before == "[" else "]"


def _chain(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = exc
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _clean_messages(exc: BaseException) -> None:
    """Clean an error and its causes, which --traceback prints by itself."""
    for found in _chain(exc):
        one_line = isinstance(found, CommandError) and not isinstance(
            found, SystemCheckError
        )
        clean = printable if one_line else printable_lines
        found.args = tuple(
            clean(each) if isinstance(each, str) else each for each in found.args
        )


def _find_unmigrated() -> str:
    """Return what to say of a database that lacks migrations, or ""."""
    for using in databases(skip_broken=True):
        # Out of order, or in a transaction that is lost: nobody can tell.
        with suppress(Exception):
            executor = MigrationExecutor(connections[using])
            targets = executor.loader.graph.leaf_nodes(AgentSession._meta.app_label)
            if plan := executor.migration_plan(targets):
                where = "" if using == DEFAULT_ALIAS else f" --database {using}"
                are = "migration is" if len(plan) == 1 else "migrations are"
                return (
                    f"The database {using!r} is not migrated: {len(plan)} {are} not "
                    f"applied. Run manage.py migrate{where} first."
                )
    return ""


def _has_tables() -> bool:
    """Return whether a database has ours, so that something may have been written."""
    for using in databases(skip_broken=True):
        with suppress(Exception):
            tables = connections[using].introspection.table_names()
            if AgentSession._meta.db_table in tables:
                return True
    return False


def _widths(page: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*page, strict=True)]


def _lines(page: list[list[str]], widths: list[int]) -> Iterator[str]:
    for row in page:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


class Progress:
    """A bar with the rate and the time that is left."""

    def __init__(self, stream: Any, total: Total) -> None:
        self._stream = stream
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._drawn = 0.0
        self._length = 0

    def add(self, count: int) -> None:
        """Count what is done, and draw if it is time."""
        self._done += count
        now = time.monotonic()
        if now - self._drawn >= EVERY:
            self._drawn = now
            self._draw(now)

    def close(self) -> None:
        self._draw(time.monotonic())
        self._write("\n")

    def _draw(self, now: float) -> None:
        seconds = max(now - self._began, 0.001)
        rate = self._done / seconds
        total = self._total(self._done) if callable(self._total) else self._total
        share = min(self._done / total, 1) if total else 1
        bar = "#" * round(share * WIDTH)
        text = (
            f"[{bar:-<{WIDTH}}] {share:4.0%} {self._done:,}/{total:,} items, "
            f"{rate:,.0f}/s"
        )
        if rate and self._done < total:
            left = round((total - self._done) / rate)
            text += f", {left // 60}:{left % 60:02} left"
        # Spaces wipe what a longer text left behind.
        self._write(f"\r{text:<{self._length}}")
        self._length = len(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
