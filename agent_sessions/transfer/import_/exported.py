"""Read sessions in our own format, agent-sessions/1."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import tzinfo
from pathlib import Path
from typing import Any

from django.utils.timezone import get_default_timezone

from agent_sessions.exceptions import AgentSessionError, InvalidItem
from agent_sessions.handler import sessions
from agent_sessions.items import Item, encode_batch
from agent_sessions.models import MAIN_BRANCH, AgentRun
from agent_sessions.transfer.export import FORMAT, RUN_COLUMNS, TOKENS
from agent_sessions.transfer.import_.checks import MOST_POSITIONS, MOST_TURNS
from agent_sessions.transfer.import_.databases import ITEM_BYTES, as_text, as_time
from agent_sessions.transfer.import_.formats import check_text, read_head
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    Mark,
    Source,
    SourceBranch,
    SourceItem,
    SourceRun,
    SourceSession,
    UnreadableSource,
    changed,
    extend,
)
from agent_sessions.transfer.import_.stream import Broken, Stream, TooMuch

# What is raised by values that aren't of the format.
_WRONG = (KeyError, TypeError, ValueError, OverflowError)
# Characters of a line before its items, with all of its branches and runs.
HEADER_LENGTH = 16 * 1024 * 1024
_KEYS = frozenset({"format", "session", "branches", "runs"})
_PAGE_ROWS = 200
_PAGE_SIZE = 4 * 1024 * 1024
# A run that was going on elsewhere goes on nowhere.
_ENDED = {
    AgentRun.Status.RUNNING: AgentRun.Status.INTERRUPTED,
    AgentRun.Status.WAITING: AgentRun.Status.INTERRUPTED,
}


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
        try:
            self.name = as_text(f"export:{Path(path).resolve()}")
            if not Path(path).is_file():
                # Pipes and devices may never end, or never begin.
                raise UnreadableSource(f"There is no regular file {path!r}.")
            check_text(as_text(path), read_head(path))
            # Closed by close(). A byte that is no UTF-8 breaks its own line only: what
            # it becomes is no JSON.
            self._file = Path(path).open(  # noqa: SIM115
                encoding="utf-8", errors="backslashreplace", newline="\n"
            )
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise UnreadableSource(f"Can't read {path!r}: {reason}.") from exc
        self._stream = Stream(self._file)
        self._next: dict[str, Any] | None = None
        self._first = True

    def total(self) -> int | None:
        return None

    def sessions(self) -> Iterator[SourceSession]:
        while self._stream.more_lines():
            line = self._stream.line
            try:
                session = self._header()
            except TooMuch:
                problem = (
                    f"line {line} has more than {HEADER_LENGTH:,} characters before "
                    "its items."
                )
                yield SourceSession(f"line {line}", problem=problem)
            except (Broken, *_WRONG, AttributeError):
                yield SourceSession(
                    f"line {line}", problem=f"line {line} is no session of {FORMAT}."
                )
            else:
                if not self.only or session.session_id in self.only:
                    yield self._once(session)
            self._stream.next_line()

    def grown(self, session: SourceSession, marks: Mapping[str, Mark]) -> set[str]:
        if not self._file.seekable():
            return set()
        place = self._stream.place()
        positions, digests, is_whole = self._positions(marks)
        self._stream.go_back(place)
        self._first, self._next = True, None
        found = set()
        for branch in session.branches:
            own, mark = positions.get(branch.name, array("q")), marks.get(branch.name)
            if mark is not None and mark.count:
                if len(own) < mark.count and not is_whole:
                    continue
                if len(own) < mark.count or own[mark.count - 1] != mark.last:
                    raise _removed(branch)
                if digests[branch.name] != mark.digest:
                    raise changed(f"branch {branch.name!r}")
            if len(own) > (mark.count if mark else 0):
                found.add(branch.name)
        return found

    def items(
        self, session: SourceSession, branch: SourceBranch, mark: Mark
    ) -> Iterator[list[SourceItem]]:
        seen = 0
        page: list[SourceItem] = []
        size = 0
        for item in self._own(branch):
            seen += 1
            if seen <= mark.count:
                if seen == mark.count and item.id != mark.last:
                    raise _removed(branch)
                continue
            page.append(item)
            size += len(item.data)
            if len(page) == _PAGE_ROWS or size > _PAGE_SIZE:
                yield page
                page, size = [], 0
        if seen < mark.count:
            raise _removed(branch)
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
        self._first = True
        self._next = None
        return _session(found, self.zone)

    def _own(self, branch: SourceBranch) -> Iterator[SourceItem]:
        """Return the items that follow, as long as they are the branch's."""
        while (found := self._look()) is not None and found["branch"] == branch.name:
            self._next = None
            try:
                yield _item(found, self.zone)
            except _WRONG:
                raise self._broken() from None

    def _positions(
        self, marks: Mapping[str, Mark]
    ) -> tuple[dict[str, array[int]], dict[str, str], bool]:
        """Read on to the line's end; tell too whether it was reached.

        With the positions of each branch comes the hash of its items up to its mark.
        """
        positions: dict[str, array[int]] = {}
        digests: dict[str, str] = {}
        try:
            while (found := self._look()) is not None:
                self._next = None
                name = found["branch"]
                own = positions.setdefault(name, array("q"))
                if name in marks and len(own) < marks[name].count:
                    digests[name] = extend(
                        digests.get(name, ""), [_item(found, self.zone)]
                    )
                own.append(int(found["position"]))
        except (ImportProblem, *_WRONG):
            return positions, digests, False
        return positions, digests, True

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
        except TooMuch:
            raise ImportProblem(
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

    def _broken(self) -> ImportProblem:
        return ImportProblem(
            f"line {self._stream.line} breaks off or is no {FORMAT}. What came before "
            "is imported; with a whole file the rest follows."
        )


def _removed(branch: SourceBranch) -> ImportProblem:
    return ImportProblem(
        f"the file no longer has all items of branch {branch.name!r} that were "
        "imported before. Delete the imported session and import again."
    )


def _item(found: dict[str, Any], zone: tzinfo) -> SourceItem:
    position, turn = int(found["position"]), int(found["turn"])
    if position > MOST_POSITIONS or not 0 <= turn <= MOST_TURNS:
        raise ValueError
    item: Item | None = found.get("item")
    if item is None:
        data = as_text(found["raw"])
    else:
        try:
            data = encode_batch([item]).rows[0].data
        except InvalidItem as exc:
            raise ValueError from exc
    created_at = as_time(found.get("created_at"), zone)
    return SourceItem(position, data, created_at, position, turn)


def _session(found: dict[str, Any], zone: tzinfo) -> SourceSession:
    row = found["session"]
    session_id = _word(row["id"])
    if session_id is None:
        raise TypeError
    runs = [_run(run, zone) for run in found.get("runs", ())]
    branches = [_branch(branch, zone) for branch in found["branches"]]
    # The sums hold runs too that are no longer there; those that are add themselves.
    sums = {
        name: max(
            int(row.get(name) or 0) - sum(run.columns.get(name) or 0 for run in runs), 0
        )
        for name in TOKENS
    }
    return SourceSession(
        session_id,
        as_time(row.get("created_at"), zone),
        as_time(row.get("updated_at"), zone),
        _word(row.get("user")),
        # Lines of older releases have none.
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
        opened=row.get("encrypted") is True or _encrypts(row.get("backend")),
    )


def _encrypts(alias: Any) -> bool:
    """Return whether an alias of ours encrypts: lines of older releases don't say."""
    try:
        return isinstance(alias, str) and sessions[alias].encrypts
    except AgentSessionError:
        return False


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
        int(found.get("head") or 0),
        int(found.get("turn") or 0),
    )


def _run(found: dict[str, Any], zone: tzinfo) -> SourceRun:
    columns = {name: found[name] for name in RUN_COLUMNS if name in found}
    status = AgentRun.Status(columns["status"])
    columns["status"] = _ENDED.get(status, status)
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
