"""Read sessions in our own format, agent-sessions/1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import tzinfo
from pathlib import Path
from typing import Any, TextIO

from django.utils.timezone import get_default_timezone

from agent_sessions.exceptions import InvalidItem
from agent_sessions.items import encode_batch
from agent_sessions.models import MAIN_BRANCH
from agent_sessions.transfer.export import FORMAT, RUN_COLUMNS, ended
from agent_sessions.transfer.import_.records import (
    ITEM_BYTES,
    MOST_POSITIONS,
    MOST_TURNS,
    PAGE_BYTES,
    PAGE_ROWS,
    BreaksOff,
    ImportProblem,
    Source,
    SourceBranch,
    SourceItem,
    SourceRun,
    SourceSession,
    as_text,
    as_time,
    keep_text,
    sum_of,
    text_file,
)
from agent_sessions.usage import COUNTERS

# What is raised by values that aren't of the format.
_WRONG = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
# Characters of a line before its items, with all of its branches and runs.
HEADER_LENGTH = 16 * 1024 * 1024
_KEYS = frozenset({"format", "session", "branches", "runs"})
_CHUNK = 256 * 1024
_NO_BLANK = re.compile(r"[^ \t\r]")
_decoder = json.JSONDecoder()


class ExportSource(Source):
    """A file of our own export; sessions and items are read in the file's order."""

    def __init__(
        self, path: str, *, zone: tzinfo | None = None, only: Sequence[str] = ()
    ) -> None:
        # What was exported without an offset came from a project without USE_TZ.
        self.zone = zone or get_default_timezone()
        self.only = frozenset(only)
        # The lines that ids were found on: a second one would pass for growth.
        self._seen: dict[str, int] = {}
        self.name = as_text(f"export:{text_file(path).resolve()}")
        # Closed by close(). A byte that is no UTF-8 breaks its own line only: what it
        # becomes is no JSON.
        self._file = Path(path).open(  # noqa: SIM115
            encoding="utf-8", errors="backslashreplace", newline="\n"
        )
        self._stream = Stream(self._file)
        self._size = Path(path).stat().st_size
        # Where the line's items begin, once they were asked for.
        self._items_at: tuple[int, str] | None = None
        self._next: dict[str, Any] | None = None
        self._first = True

    def total(self, done: int) -> int:
        # As many items to a byte as there were so far.
        share = self._stream.position() / self._size if self._size else 1
        return max(done, round(done / share)) if share else done

    def sessions(self) -> Iterator[SourceSession]:
        while self._stream.more_lines():
            line = self._stream.line
            try:
                session = self._header()
            except (Broken, *_WRONG) as exc:
                problem = f"line {line} is no session of {FORMAT}."
                if isinstance(exc, TooLong):
                    problem = (
                        f"line {line} has more than {HEADER_LENGTH:,} characters "
                        "before its items."
                    )
                yield SourceSession(f"line {line}", problem=problem)
            else:
                if not self.only or session.session_id in self.only:
                    yield self._once(session)
            self._stream.next_line()

    def items(
        self, session: SourceSession, branch: SourceBranch, after: int = 0
    ) -> Iterator[list[SourceItem]]:
        if branch is session.branches[0]:
            self._begin_items()
        page: list[SourceItem] = []
        size = 0
        for number, item in enumerate(self._own(branch)):
            if number < after:
                continue
            page.append(item)
            size += len(item.row.data)
            if len(page) == PAGE_ROWS or size > PAGE_BYTES:
                yield page
                page, size = [], 0
        if branch is session.branches[-1] and self._next is not None:
            raise ImportProblem(
                f"line {self._stream.line}: its items aren't in its branches' order."
            )
        yield page

    def close(self) -> None:
        self._file.close()

    def _once(self, session: SourceSession) -> SourceSession:
        """Refuse an id that another line of the file has."""
        line = self._stream.line
        first = self._seen.setdefault(session.session_id, line)
        if first == line:
            return session
        of = f" of the backend {session.backend!r}" if session.backend else ""
        return SourceSession(
            f"line {line}",
            problem=f"the session {session.session_id!r}{of} has the id of line {first}. "
            "Export each backend to a file of its own, with --backend, and import them "
            "into different ones.",
        )

    # -- a line ----------------------------------------------------------------------

    def _header(self) -> SourceSession:
        """Read a line up to its items."""
        stream, found = self._stream, dict[str, Any]()
        before = stream.taken
        stream.take("{")
        while True:
            left = HEADER_LENGTH - (stream.taken - before)
            key = stream.value(left)
            stream.take(":")
            if key == "items":
                break
            value = stream.value(left)
            if key in _KEYS:
                found[key] = value
            stream.take(",")
        if found["format"] != FORMAT:
            raise Broken
        stream.take("[")
        self._items_at = None
        return _session(found, self.zone)

    def _begin_items(self) -> None:
        """Go to the line's first item, from wherever in it."""
        if self._items_at is None:
            self._items_at = self._stream.place()
        else:
            self._stream.go_back(self._items_at)
        self._first, self._next = True, None

    def _own(self, branch: SourceBranch) -> Iterator[SourceItem]:
        """Return the items that follow, as long as they are the branch's."""
        while (found := self._look()) is not None and found["branch"] == branch.name:
            self._next = None
            try:
                yield _item(found, self.zone)
            except _WRONG:
                raise self._broken() from None

    def _look(self) -> dict[str, Any] | None:
        """Look at the next item; None after the last one."""
        if self._next is not None:
            return self._next
        stream = self._stream
        try:
            if stream.peek() == "]":
                return None
            if not self._first:
                stream.take(",")
            found = stream.value(ITEM_BYTES)
        except TooLong:
            raise BreaksOff(
                f"line {stream.line} has an item of more than {ITEM_BYTES:,} "
                "characters. What came before is imported."
            ) from None
        except Broken:
            raise self._broken() from None
        if not isinstance(found, dict) or not isinstance(found.get("branch"), str):
            raise self._broken()
        self._first = False
        self._next = found
        return found

    def _broken(self) -> BreaksOff:
        return BreaksOff(
            f"line {self._stream.line} breaks off, or is no {FORMAT}. What came before "
            "is imported; with a whole file the rest follows."
        )


def _item(found: dict[str, Any], zone: tzinfo) -> SourceItem:
    position, turn = int(found["position"]), int(found["turn"])
    if position > MOST_POSITIONS or not 0 <= turn <= MOST_TURNS:
        raise ValueError
    created_at = as_time(found.get("created_at"), zone)
    if (item := found.get("item")) is None:
        kept = keep_text(as_text(found["raw"]), created_at)
        return kept._replace(position=position, turn=turn)
    try:
        row = encode_batch([item]).rows[0]
    except InvalidItem as exc:
        raise ValueError from exc
    return SourceItem(row, created_at, position, turn)


def _session(found: dict[str, Any], zone: tzinfo) -> SourceSession:
    row = found["session"]
    session_id = _word(row["id"])
    if session_id is None:
        raise TypeError
    runs = [_run(run, zone) for run in found.get("runs", ())]
    branches = [_branch(branch, zone) for branch in found["branches"]]
    # The sums hold runs too that are no longer there; those that are add themselves.
    sums = {
        name: max(int(row.get(name) or 0) - sum_of(runs, name), 0) for name in COUNTERS
    }
    return SourceSession(
        session_id,
        as_time(row.get("created_at"), zone),
        as_time(row.get("updated_at"), zone),
        _word(row.get("user")),
        _word(row.get("backend")),
        branches or [SourceBranch()],
        _word(row.get("branch")) or MAIN_BRANCH,
        runs,
        {
            "title": as_text(row.get("title"))[:200],
            "metadata": dict(row.get("metadata") or {}),
            "agent_name": as_text(row.get("agent_name"))[:255],
            "expires_at": as_time(row.get("expires_at"), zone),
            **sums,
        },
        opened=row.get("encrypted") is True,
    )


def _word(value: Any) -> str | None:
    """Return a text or nothing. Raises TypeError for anything else."""
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value


def _branch(found: dict[str, Any], zone: tzinfo) -> SourceBranch:
    fork = found.get("fork_position")
    return SourceBranch(
        str(found["name"]),
        _word(found.get("parent")),
        None if fork is None else int(fork),
        as_time(found.get("created_at"), zone),
        bool(found.get("archived")),
        bool(found.get("quarantine")),
        int(found.get("head") or 0),
    )


def _run(found: dict[str, Any], zone: tzinfo) -> SourceRun:
    columns = {name: found[name] for name in RUN_COLUMNS if name in found}
    columns["status"] = ended(columns["status"])
    started_at = as_time(found.get("started_at"), zone)
    finished_at = as_time(found.get("finished_at"), zone)
    times = {"started_at": started_at} if started_at else {}
    opening = found.get("opening")
    return SourceRun(
        str(found["id"]),
        _word(found.get("branch")) or "",
        {**columns, **times, "finished_at": finished_at or started_at},
        opening=opening and (str(opening["branch"]), int(opening["position"])),
    )


class Broken(Exception):
    """The line is no JSON, or ends too early."""


class TooLong(Broken):
    """A value, or what comes before the items, has more characters than it may."""


class Stream:
    """A file of one JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self.line = 1
        # Characters of the values that were taken.
        self.taken = 0

    def more_lines(self) -> bool:
        """Skip empty lines; return whether another one follows."""
        while (character := self.peek()) == "\n":
            self._at += 1
            self.line += 1
        return bool(character)

    def next_line(self) -> None:
        """Skip the rest of the line."""
        while (end := self._text.find("\n", self._at)) < 0:
            self._at = len(self._text)
            if not self._fill(_CHUNK):
                return
        self._at = end + 1
        self.line += 1

    def position(self) -> int:
        """Return how many bytes were read, about."""
        return self._file.buffer.tell() - len(self._text) + self._at

    def place(self) -> tuple[int, str]:
        """Return where it is, for a later `go_back` within the same line."""
        return self._file.tell(), self._text[self._at :]

    def go_back(self, place: tuple[int, str]) -> None:
        """Go back to a place of the same line."""
        position, self._text = place
        self._file.seek(position)
        self._at = 0

    def peek(self) -> str:
        """Look at the next character that isn't blank; "" at the file's end."""
        while True:
            if found := _NO_BLANK.search(self._text, self._at):
                self._at = found.start()
                return found[0]
            self._at = len(self._text)
            if not self._fill(_CHUNK):
                return ""

    def take(self, wanted: str) -> str:
        """Take the next character, one of those wanted. Raises Broken."""
        found = self.peek()
        if not found or found not in wanted:
            raise Broken
        self._at += 1
        return found

    def value(self, most: int = ITEM_BYTES) -> Any:
        """Take a whole value of up to so many characters. Raises Broken."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise Broken from None
            except ValueError:
                end = len(self._text)
                # A value that a line's end cuts will never be whole.
                if self._text.find("\n", self._at) >= 0:
                    raise Broken from None
            # A number may go on in what hasn't been read.
            if end < len(self._text):
                if end - self._at > most:
                    raise TooLong
                self.taken += end - self._at
                self._at = end
                return value
            if len(self._text) - self._at > most:
                raise TooLong
            size = min(size * 2, most + 1)
            if not self._fill(size):
                raise Broken

    def _fill(self, size: int) -> bool:
        more = self._file.read(size)
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)
