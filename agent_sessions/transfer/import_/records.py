"""What every source of an import gives, and whether it can be kept here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from django.core.exceptions import ValidationError
from django.db.models import Model
from django.utils.dateparse import parse_datetime

from agent_sessions.backends.keys import check_session_id, is_text
from agent_sessions.exceptions import AgentSessionError, InvalidItem, InvalidSessionId
from agent_sessions.items import EncodedItem, decode, encode_batch
from agent_sessions.models import (
    LABEL_MARK,
    MAIN_BRANCH,
    AgentRun,
    AgentSession,
    Branch,
)
from agent_sessions.times import stored

# Bytes of an id, a name or a time in a source: many times what one has.
CELL_BYTES = 64 * 1024
# Bytes of one item. What is read into memory is a small multiple of it.
ITEM_BYTES = 32 * 1024 * 1024
# Items and bytes that are read and written at once.
PAGE_ROWS = 500
PAGE_BYTES = 4 * 1024 * 1024
SQLITE_MAGIC = b"SQLite format 3\x00"
NAME_LENGTH = 255
MOST_TURNS = 2**31 - 1
MOST_POSITIONS = 2**63 - 1
# Each is compared with those before it, and a session's row names all of them.
MOST_BRANCHES = 2_000
# Each is held in memory, with its usage.
MOST_RUNS = 100_000
# Lists and objects within each other: writing JSON needs a call for each.
MOST_DEPTH = 100


class ImportProblem(AgentSessionError):
    """One session can't be imported; it is as it was, and others go on."""


class BreaksOff(ImportProblem):
    """A session ends too early in its source; what comes before is imported."""


class UnreadableSource(AgentSessionError):
    """A whole source can't be read, or its options don't fit it."""


class SourceItem(NamedTuple):
    """One item as it is stored here; `position` None means the next one."""

    row: EncodedItem
    created_at: datetime | None = None
    position: int | None = None
    turn: int | None = None
    # Whether it is an item; what isn't one is kept as it is.
    is_readable: bool = True


@dataclass(frozen=True, slots=True)
class SourceRun:
    """What one run has used, with the columns of its row.

    Which turn it was about is told by that turn's number in the branch, or by branch
    and position of the user message that opens it.
    """

    run_id: str
    branch: str
    columns: dict[str, Any]
    turn: int | None = None
    opening: tuple[str, int] | None = None


@dataclass(slots=True)
class SourceBranch:
    """A branch of a source; its items begin after the fork."""

    name: str = MAIN_BRANCH
    parent: str | None = None
    fork_position: int | None = None
    created_at: datetime | None = None
    # Not shown, and its name stays taken.
    archived: bool = False
    # Holds rows that the doctor took out of its parent.
    quarantine: bool = False
    # The last position that was taken, where the items don't tell.
    head: int = 0


@dataclass(slots=True)
class SourceSession:
    """One conversation of a source, with what its row keeps."""

    session_id: Any
    created_at: datetime | None = None
    updated_at: datetime | None = None
    # The owner's name to log in with, where the source knows one.
    owner: str | None = None
    # The alias of the backend it is from, where the source tells.
    backend: str | None = None
    branches: list[SourceBranch] = field(default_factory=lambda: [SourceBranch()])
    current: str = MAIN_BRANCH
    runs: list[SourceRun] = field(default_factory=list)
    # Values of the session's row: title, metadata, agent_name.
    columns: dict[str, Any] = field(default_factory=dict)
    # Whether its items were encrypted where they are from, and are in clear here.
    opened: bool = False
    # What the source itself shows nowhere, and so isn't imported.
    left_out: int = 0
    # Why the source can't give it whole; it is then refused by name.
    problem: str = ""
    # What the source itself knows the session by.
    key: Any = None

    @property
    def shown(self) -> str:
        """Name the branch to go on with: the current one, else the main one."""
        shown = {branch.name for branch in self.branches if not branch.archived}
        return self.current if self.current in shown else MAIN_BRANCH


class Source(Protocol):
    """Where sessions come from."""

    # Names the place, so that a second import knows what the first one made.
    name: str

    def total(self, done: int) -> int:
        """Return how many items there are, perhaps as those that are done tell."""

    def sessions(self) -> Iterator[SourceSession]:
        """Return the sessions one after the other."""

    def items(
        self, session: SourceSession, branch: SourceBranch, after: int = 0
    ) -> Iterator[list[SourceItem]]:
        """Return pages of a branch's own items but for so many of the first ones.

        Those of all branches are asked for in their order, perhaps twice. Raises
        ImportProblem before the first page where one is too long.
        """

    def close(self) -> None:
        """Close files and connections."""


def text_file(path: str) -> Path:
    try:
        # Pipes and devices may never end, or never begin.
        if not Path(path).is_file():
            raise UnreadableSource(f"There is no regular file {path!r}.")
        with Path(path).open("rb") as file:
            head = file.read(100)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise UnreadableSource(f"Can't read {path!r}: {reason}.") from exc
    if head.startswith(SQLITE_MAGIC):
        raise UnreadableSource(
            f"{path!r} is a file of SQLite. Name the KIND whose tables it has."
        )
    if b"\0" in head:
        raise UnreadableSource(
            f"{path!r} is no text in UTF-8. Unpack it, or write it anew in UTF-8."
        )
    return Path(path)


# -- values ----------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """Return a stored text in characters that every database takes.

    What isn't text, NUL and bytes that are no UTF-8, is spelled with backslashes.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    text = "" if value is None else str(value)
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")


def as_time(value: Any, zone: tzinfo) -> datetime | None:
    """Read a source's time; one without an offset is of `zone`."""
    if isinstance(value, str):
        try:
            value = parse_datetime(value)
        except ValueError:
            return None
    # Years at the very ends can't be moved to another zone.
    if not isinstance(value, datetime) or not 2 <= value.year <= 9998:
        return None
    aware = value if value.utcoffset() is not None else value.replace(tzinfo=zone)
    return stored(aware.astimezone(UTC))


def read_item(text: str, created_at: datetime | None) -> SourceItem:
    try:
        row = encode_batch([decode(text)]).rows[0]
    except InvalidItem:
        return keep_text(text, created_at)
    return SourceItem(row, created_at)


def keep_text(text: str, created_at: datetime | None) -> SourceItem:
    row = EncodedItem(text, 0, "", "", "", "", "")
    return SourceItem(row, created_at, is_readable=False)


# -- what can be kept ------------------------------------------------------------------


def check_session(session: SourceSession) -> None:
    """Refuse what can't be stored. Raises ImportProblem."""
    if session.problem:
        raise ImportProblem(session.problem)
    try:
        check_session_id(session.session_id)
    except InvalidSessionId as exc:
        raise ImportProblem(str(exc)) from exc
    if len(session.branches) > MOST_BRANCHES:
        raise ImportProblem(
            f"it has more than {MOST_BRANCHES:,} branches. Delete some in the source."
        )
    known: set[str] = set()
    for branch in session.branches:
        _check_branch(branch, known)
        known.add(branch.name)
    if session.shown not in {b.name for b in session.branches if not b.archived}:
        raise ImportProblem(
            "it names no current branch that is shown, and has none called "
            f"{MAIN_BRANCH!r}. Name one of its branches in the source."
        )
    if not _is_storable(session.columns.get("metadata")):
        raise ImportProblem("its metadata can't be kept here. Mend it in the source.")
    _check_runs(session)


def _is_label(branch: SourceBranch) -> bool:
    """Return whether a branch can be what its label says."""
    columns = Branch.of_label(branch.name)
    is_version = 0 < columns["version"] <= MOST_POSITIONS
    return (
        LABEL_MARK not in columns["name"]
        and Branch(**columns).label == branch.name
        and (branch.archived or not is_version)
        and (not branch.quarantine or (is_version and branch.parent is not None))
    )


def _check_branch(branch: SourceBranch, known: set[str]) -> None:
    name = branch.name
    if (branch.parent is not None and branch.parent not in known) or name in known:
        raise ImportProblem(f"its branch {name!r} comes twice, or before its parent.")
    fork = branch.fork_position
    if not (
        1 <= len(name) <= NAME_LENGTH
        and _is_storable(name)
        and _is_label(branch)
        and (branch.parent is None) == (fork is None)
        and all(0 <= each <= MOST_POSITIONS for each in (fork or 0, branch.head))
    ):
        raise ImportProblem(
            f"its branch {name[:NAME_LENGTH]!r} has a name, a fork or a head that can't "
            "be kept here. Mend it in the source."
        )


def _check_runs(session: SourceSession) -> None:
    """Check that rows can be made of the runs, and that their sums fit."""
    runs = session.runs
    if len(runs) > MOST_RUNS:
        raise ImportProblem(
            f"it has more than {MOST_RUNS:,} runs. Delete some in the source."
        )
    if len({run.run_id for run in runs}) < len(runs):
        raise ImportProblem("two of its runs have one id. Mend it in the source.")
    for number, run in enumerate(runs, 1):
        columns = _cleaned(AgentRun, {"run_id": run.run_id, **run.columns}, number)
        run.columns.update((name, columns[name]) for name in run.columns)
        if not _are_ids(run.columns.get("message_ids", [])):
            raise ImportProblem(
                f"its run {number} has message ids that can't be kept here. Mend it "
                "in the source."
            )
    sums = {
        name: value + sum_of(runs, name)
        for name, value in session.columns.items()
        if isinstance(value, int)
    }
    _cleaned(AgentSession, sums)


def _cleaned(
    model: type[Model], columns: dict[str, Any], run: int = 0
) -> dict[str, Any]:
    """Return columns as the model's fields take them. Raises ImportProblem."""
    row = model(**columns)
    others = {field.name for field in model._meta.fields} - columns.keys()
    wrong = [
        name
        for name, value in columns.items()
        if not _is_storable(value)
        or (value is None and not model._meta.get_field(name).null)
    ]
    try:
        row.clean_fields(exclude=others)
    except ValidationError as exc:
        wrong += exc.message_dict
    if wrong:
        of = f"the {wrong[0]} of its run {run}" if run else f"its {wrong[0]}"
        raise ImportProblem(f"{of} can't be kept here. Mend it in the source.")
    return {name: getattr(row, name) for name in columns}


def sum_of(runs: Iterable[SourceRun], name: str) -> int:
    return sum(run.columns.get(name) or 0 for run in runs)


def _are_ids(value: Any) -> bool:
    """Return whether each is a position, a message's id, a time and an agent's name."""
    return isinstance(value, list) and all(
        isinstance(each, list)
        and [type(part) for part in each] == [int, str, str, str]
        and 0 <= each[0] <= MOST_POSITIONS
        and is_text(each[1])
        and is_text(each[3])
        for each in value
    )


def _is_storable(value: Any) -> bool:
    """Return whether every database takes a text, or JSON of such texts."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        within: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                within += [*each, *each.values()]
            elif isinstance(each, list):
                within += each
            elif isinstance(each, float):
                if not math.isfinite(each):
                    return False
            elif isinstance(each, str) and not is_text(each):
                return False
        if not within:
            return True
        level = within
    return False
