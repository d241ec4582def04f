"""What the statements of the hot path answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent_sessions.backends.database.lineage import Segment, family, walk

# A row's JSON, which a driver may give as it came over the wire.
Text = str | bytes


@dataclass(frozen=True, slots=True)
class Own:
    """The newest rows of a branch itself: their texts, newest first.

    Without rows `branch_id` is None. `is_fork` says whether the branch has a parent.
    """

    texts: list[Text]
    branch_id: int | None = None
    is_fork: bool = False

    def is_all(self, limit: int | None) -> bool:
        """Return whether ancestors have nothing to add to this many newest rows."""
        return bool(self.texts) and (len(self.texts) == limit or not self.is_fork)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch goes: the last position and turn that were taken before it."""

    branch_id: int
    head: int
    turn: int


class Held(NamedTuple):
    """A session's row that is held: its primary key and its current branch's."""

    pk: int
    branch_id: int | None


def own_rows(rows: Sequence[Sequence[Any]]) -> Own:
    """Interpret the rows of latest_statement()."""
    if not rows:
        return Own([])
    return Own([row[0] for row in rows], int(rows[0][1]), rows[0][2] is not None)


def read_lineage(rows: Sequence[Sequence[Any]]) -> tuple[Segment, ...] | None:
    """Interpret the rows of lineage_statement(); see lineage()."""
    if not rows:
        return ()
    if rows[0][0] is None:
        return None
    return walk(family(row[1:] for row in rows), rows[0][0])


def held(row: Any) -> Held | None:
    """Interpret the rows of lock()."""
    return None if row is None else Held(*row)
