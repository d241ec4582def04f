"""Read sessions in our own format, agent-sessions/1."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import tzinfo
from itertools import islice
from pathlib import Path
from typing import Any

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

# What is raised by lines and values that aren't of the format.
_WRONG = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    RecursionError,
)
# How a session's first line begins.
_HEAD = b'{"format"'
_CHUNK = 256 * 1024


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
        self._file = Path(path).open("rb")  # noqa: SIM115 - closed by close()
        self._size = Path(path).stat().st_size
        # Where the last line that was taken begins and ends, and its number.
        self._begin = self._end = self._line = 0
        # Whether lines of a session follow.
        self._is_inside = False
        # Items that follow, and the first of them once it was looked at.
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._next: dict[str, Any] | None = None

    def total(self, done: int) -> int:
        # As many items to a byte as there were so far.
        return max(done, round(done * self._size / self._end)) if self._end else done

    def sessions(self) -> Iterator[SourceSession]:
        while text := self._take():
            if self._is_inside and not text.startswith(_HEAD):
                # Of a session that was refused or broke off.
                self._is_inside = not text.startswith(b'{"items"')
                continue
            self._is_inside, line = text.startswith(_HEAD), self._line
            try:
                session = _session(_read(text), self.zone)
            except _WRONG:
                problem = f"line {line} is no session of {FORMAT}."
                if len(text) > ITEM_BYTES:
                    problem = f"line {line} has more than {ITEM_BYTES:,} bytes."
                yield SourceSession(f"line {line}", problem=problem)
                continue
            session.key = self._end, line
            if not self.only or session.session_id in self.only:
                yield self._once(session)

    def items(
        self, session: SourceSession, branch: SourceBranch, after: int = 0
    ) -> Iterator[list[SourceItem]]:
        if branch is session.branches[0]:
            self._end, self._line = session.key
            self._file.seek(self._end)
            self._rows, self._next = self._read_rows(), None
            self._is_inside = True
        page: list[SourceItem] = []
        size = 0
        try:
            for item in islice(self._own(branch), after, None):
                page.append(item)
                size += len(item.row.data)
                if len(page) == PAGE_ROWS or size > PAGE_BYTES:
                    yield page
                    page, size = [], 0
        except BreaksOff:
            yield page
            raise
        if branch is session.branches[-1] and self._next is not None:
            raise ImportProblem(
                f"line {self._line}: its items aren't in its branches' order."
            )
        yield page

    def close(self) -> None:
        self._file.close()

    def _once(self, session: SourceSession) -> SourceSession:
        line = self._line
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

    def _take(self) -> bytes:
        """Take the next line that isn't blank; b"" at the file's end.

        One that is too long is skipped, but for what shows that it is.
        """
        while text := self._file.readline(ITEM_BYTES + 1):
            self._line += 1
            self._begin, self._end = self._end, self._end + len(text)
            rest = text
            while rest and not rest.endswith(b"\n"):
                rest = self._file.readline(_CHUNK)
                self._end += len(rest)
            if text.strip():
                return text
        return b""

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        """Return a session's items up to its last line, which counts them."""
        first = self._line
        while text := self._take():
            if text.startswith(_HEAD):
                # It is taken once more, as the next session's.
                self._file.seek(self._begin)
                self._end, self._line = self._begin, self._line - 1
                break
            if len(text) > ITEM_BYTES:
                raise BreaksOff(
                    f"line {self._line} has an item of more than {ITEM_BYTES:,} bytes. "
                    "What came before is imported."
                )
            try:
                found = _read(text)
            except _WRONG:
                break
            if "branch" not in found:
                self._is_inside = "items" not in found
                if found.get("items") == self._line - first - 1:
                    return
                break
            yield found
        raise self._broken()

    def _own(self, branch: SourceBranch) -> Iterator[SourceItem]:
        """Return the items that follow, as long as they are the branch's."""
        while True:
            found = self._next = self._next or next(self._rows, None)
            if found is None:
                return
            try:
                if found["branch"] != branch.name:
                    return
                item = _item(found, self.zone)
            except _WRONG:
                raise self._broken() from None
            self._next = None
            yield item

    def _broken(self) -> BreaksOff:
        return BreaksOff(
            f"line {self._line} breaks off, or is no {FORMAT}. What came before is "
            "imported; with a whole file the rest follows."
        )


def _read(text: bytes) -> dict[str, Any]:
    if len(text) > ITEM_BYTES:
        raise ValueError
    found = json.loads(text.decode())
    if not isinstance(found, dict):
        raise TypeError
    return found


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
    if found["format"] != FORMAT:
        raise ValueError
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
