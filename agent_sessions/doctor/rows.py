"""The examiner of rows: a branch is read once, from the first row to the last."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from django.utils import timezone

from agent_sessions.backends import run_rows
from agent_sessions.backends.database.branches import next_version
from agent_sessions.backends.database.lineage import (
    Segment,
    read_own,
    read_pages,
    turns_before,
    visible,
)
from agent_sessions.doctor.findings import Quarantined
from agent_sessions.exceptions import InvalidItem
from agent_sessions.items import EncodedItem, Item, decode, encode_batch
from agent_sessions.items.kinds import (
    CALL_OF,
    KINDS,
    call_key,
    is_opening,
    opens_turn,
    own_key,
    type_and_role,
)
from agent_sessions.models import AgentSession, Branch, SessionItem

# A hosted tool's own calls need no output from here.
_ANSWERED_HERE = frozenset(t for t, kind in KINDS.items() if kind.answered_here)
_DRAWN = ("type", "role", "call_id", "tool_name", "text")


# Told the code of what is wrong, the branch and position, what mends it now, and by
# name the values of the code's message.
Found = Callable[..., None]


class Row(NamedTuple):
    """A stored row; the fields are the columns to read."""

    position: int
    pk: Any
    turn: int
    data: str
    type: str
    role: str
    call_id: str
    tool_name: str
    text: str
    size: int


class Reader:
    """Read a branch, remembering only what a later row can depend on.

    Of each call that is a number: 64 bits of its hash, so that a million items need
    some ten megabytes.
    """

    def __init__(
        self,
        using: str,
        branch: Branch,
        inherited: tuple[Segment, ...],
        size: int,
        found: Found,
    ) -> None:
        self.using = using
        self.found = found
        self.branch = branch
        self.size = size
        self.turn = turns_before(using, inherited)
        self._rows = SessionItem._base_manager.using(using)
        self.items = 0
        self.last = 0
        self.wrong_turns = 0
        self.first_wrong_turn: int | None = None
        # Calls without an output so far: their positions.
        self.open: dict[int, int] = {}
        self._calls: set[int] = set()
        # The user's message that comes last, if nothing has followed it.
        self._asked: tuple[Any, Any] | None = None
        if inherited:
            self._inherit(inherited)

    def look(self, progress: Callable[[int], None]) -> None:
        """Report what is wrong with rows; call `progress` with how many a page had."""
        for page in read_own(self.using, self.branch, Row._fields, self.size):
            for values in page:
                self._read(Row(*values))
            progress(len(page))
        branch = self.branch
        if (first := self.first_wrong_turn) is not None:
            self.found("wrong_turn", branch, first, count=self.wrong_turns)
        elif branch.archived_at is None and branch.turn != self.turn:
            code = "wrong_branch_turn"
            self.found(code, branch, found=branch.turn, expected=self.turn)

    def _read(self, row: Row) -> None:
        self.items += 1
        self.last = row.position
        item = decode(row.data)
        drawn = None if item is None else _draw(item)
        said = drawn or row
        asks = is_opening(said.type, said.role)
        self.turn += asks
        if row.turn != self.turn:
            self.wrong_turns += 1
            if self.first_wrong_turn is None:
                self.first_wrong_turn = row.position
        if item is None:
            self._misplaced(_why_unreadable(row.data), row)
            return
        if drawn is not None and (columns := _columns(row, drawn)):
            mend = partial(self._rows.filter(pk=row.pk).update, **columns)
            self.found("wrong_columns", self.branch, row.position, mend)
        if type_and_role(item)[0] in CALL_OF:
            if self._is_orphan(item):
                self._misplaced("orphan_output", row)
                return
            self.open.pop(hash(call_key(item)), None)
        else:
            self._note(item, row.position)
        if not asks:
            self._asked = None
        elif self._asked is not None and self._asked[0] == item.get("content"):
            self._misplaced("duplicate_turn", row, instead=self._asked[1])
        else:
            self._asked = (item.get("content"), row.pk)

    def _misplaced(self, code: str, row: Row, instead: Any = None) -> None:
        """Report a row that has to go; `instead` is the row that it repeats."""

        def mend() -> None:
            put_away(self.using, self.branch, row.pk)
            if instead is not None:
                # What was used to answer the message counts for the one that stays.
                runs = run_rows.runs_of(self.using, self.branch.session_id)
                run_rows.write(runs.filter(turn_item=row.pk), turn_item=instead)

        self.found(code, self.branch, row.position, mend)

    def _is_orphan(self, output: Item) -> bool:
        key = call_key(output)
        # One that names no call, as a hosted tool search's, is sent: windows/links.py.
        return key[1] is not None and hash(key) not in self._calls

    def _note(self, item: Item, position: int) -> None:
        kind, _ = type_and_role(item)
        if kind not in CALL_OF.values():
            return
        key = hash(own_key(item))
        self._calls.add(key)
        if kind in _ANSWERED_HERE and isinstance(item.get("call_id"), str):
            self.open[key] = position

    def _inherit(self, inherited: tuple[Segment, ...]) -> None:
        """Remember the calls that ancestors made, and whether they end with a question."""
        for segment in inherited:
            calls = visible(self.using, (segment,)).filter(
                type__in=set(CALL_OF.values())
            )
            for page in read_pages(calls, ("position", "data"), self.size):
                for _, data in page:
                    if (item := decode(data)) is not None:
                        self._calls.add(hash(own_key(item)))
        rows = visible(self.using, inherited)
        # Not what a repair takes away from there: that does not part two messages.
        for pk, data in rows.order_by("-position").values_list("pk", "data")[:8]:
            item = decode(data)
            if item is None:
                continue
            if type_and_role(item)[0] in CALL_OF and self._is_orphan(item):
                continue
            if opens_turn(item):
                self._asked = (item.get("content"), pk)
            break


def _draw(item: Item) -> EncodedItem | None:
    """Draw an item's columns; None for JSON that is no longer accepted."""
    try:
        return encode_batch([item]).rows[0]
    except InvalidItem:
        return None


def _columns(row: Row, drawn: EncodedItem) -> dict[str, Any]:
    """Return the columns of a row as its data says; none where all are right."""
    columns = {name: getattr(drawn, name) for name in _DRAWN}
    # Text written by other hands may be longer than ours: its own length counts.
    columns["size"] = len(row.data.encode())
    right = all(getattr(row, name) == value for name, value in columns.items())
    return {} if right else columns


def _why_unreadable(data: str) -> str:
    try:
        # Raw lone surrogates, which are bytes that are no UTF-8, end here.
        json.loads(data.encode().decode())
    except (ValueError, RecursionError):
        return "unreadable_row"
    return "scalar_row"


# -- the quarantine --------------------------------------------------------------------

# Rows taken out of a history lie on an archived branch until they are restored. There
# is one such branch for each that lost rows, its parent, because positions are unique
# within a branch only.


def put_away(using: str, branch: Branch, pk: Any) -> None:
    """Move a row of a branch into its quarantine; the caller holds the session."""
    family = Branch._base_manager.using(using).filter(session_id=branch.session_id)
    place = family.filter(parent_id=branch.pk, is_quarantine=True).first()
    if place is None:
        place = family.create(
            session_id=branch.session_id,
            name=branch.name,
            version=next_version(branch),
            # A fork before everything: nothing of the parent is shown or kept for it.
            parent_id=branch.pk,
            fork_position=0,
            archived_at=timezone.now(),
            is_quarantine=True,
        )
    SessionItem._base_manager.using(using).filter(pk=pk).update(branch=place)


def list_quarantined(using: str, row: AgentSession) -> list[Quarantined]:
    """List what a session has in quarantine."""
    found = _quarantined(using, row.pk).order_by("branch__parent", "position")
    return [
        Quarantined(row.pk, row.session_id, item.branch.parent.label, item.position)
        for item in found.select_related("branch__parent").only(
            "position", "branch__parent__name", "branch__parent__version"
        )
    ]


def _quarantined(using: str, session: Any) -> Any:
    return SessionItem._base_manager.using(using).filter(
        branch__session_id=session, branch__is_quarantine=True
    )


def take_back(
    using: str, session: AgentSession, position: int, branch: str | None
) -> None:
    """Move a row back to the branch that lost it; see restore()."""
    rows = _quarantined(using, session.pk).filter(position=position)
    if branch is not None:
        homes = Branch._base_manager.using(using).filter(**Branch.of_label(branch))
        rows = rows.filter(branch__parent__in=homes.filter(session_id=session.pk))
    found = list(rows.values_list("pk", "branch__parent_id")[:2])
    if not found:
        raise SessionItem.DoesNotExist(
            f"The session has no quarantined row of position {position}. "
            "examine() lists those it has."
        )
    if len(found) > 1:
        raise SessionItem.MultipleObjectsReturned(
            f"Several branches lost a row of position {position}: name the branch."
        )
    ((pk, home),) = found
    SessionItem._base_manager.using(using).filter(pk=pk).update(branch_id=home)
