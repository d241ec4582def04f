"""AdvancedSQLiteSession: branches that share their messages, and usage by turn."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from typing import Any

from agent_sessions.backends.keys import is_text
from agent_sessions.models import LABEL_MARK, MAIN_BRANCH, AgentRun
from agent_sessions.transfer.import_.records import (
    MOST_BRANCHES,
    MOST_RUNS,
    SourceBranch,
    SourceItem,
    SourceRun,
    SourceSession,
    as_time,
)
from agent_sessions.transfer.import_.tables import TableSource

RUN_ID = "turn-"


class AdvancedSource(TableSource):
    """The tables of AdvancedSQLiteSession.

    There a branch begins with references to the messages before its fork, so where
    two branches name the same messages from the beginning is where one forked.
    """

    kind = "advanced-sqlite"
    more_tables = ("message_structure", "turn_usage")

    def sessions(self) -> Iterator[SourceSession]:
        for session in super().sessions():
            session_id = session.session_id
            if not isinstance(session_id, str) or not is_text(session_id):
                # Refused for its id.
                yield session
                continue
            names = self._names(session_id)
            if problem := _wrong(names):
                yield SourceSession(session_id, problem=problem)
                continue
            histories = self._histories(session_id, names)
            everything = self.ids_of(session_id)
            if not histories:
                # Written by a plain SQLiteSession on the same file.
                yield replace(session, key={MAIN_BRANCH: everything})
                continue
            shown = {pk for ids in histories.values() for pk in ids}
            yield replace(
                session,
                key=histories,
                branches=list(self._branches(session_id, histories)),
                runs=list(self._runs(session_id)),
                left_out=len(everything) - len(shown),
            )

    def items(
        self, session: SourceSession, branch: SourceBranch, after: int = 0
    ) -> Iterator[list[SourceItem]]:
        shown: array[int] = session.key.get(branch.name, array("q"))
        ids = shown[(branch.fork_position or 0) + after :]
        # Writers that came between each other left one twice, or before an older one.
        turns = [n for n in range(1, len(ids)) if ids[n] <= ids[n - 1]]
        for start, end in pairwise([0, *turns, len(ids)]):
            yield from self.pages(ids[start:end])

    def _names(self, session_id: Any) -> list[str]:
        """Name the branches that show something as the source does; main comes first."""
        rows = self.database.rows(
            "SELECT branch_id FROM message_structure WHERE session_id = "
            f"{self.database.mark} GROUP BY branch_id ORDER BY MIN(id)",
            [session_id],
        )
        names = [name for (name,) in rows if name != MAIN_BRANCH]
        return [MAIN_BRANCH, *names] if rows else []

    def _histories(self, session_id: Any, names: list[str]) -> dict[str, array[int]]:
        """Return the ids of the messages that each branch shows, by its name here."""
        database = self.database
        return {
            _own_name(name): database.ids(
                "SELECT m.id FROM message_structure s "
                f"JOIN {self._messages} m ON m.id = s.message_id "
                f"WHERE s.session_id = {database.mark} "
                f"AND s.branch_id = {database.mark} ORDER BY s.sequence_number",
                [session_id, name],
            )
            for name in names
        }

    def _branches(
        self, session_id: Any, histories: dict[str, array[int]]
    ) -> Iterator[SourceBranch]:
        # Rows that a fork copied are as old as the fork.
        rows = self.database.rows(
            "SELECT branch_id, MIN(created_at) FROM message_structure "
            f"WHERE session_id = {self.database.mark} GROUP BY branch_id",
            [session_id],
        )
        created = {_own_name(name): as_time(at, self.zone) for name, at in rows}
        placed: list[str] = []
        for name, ids in histories.items():
            branch = SourceBranch(name, created_at=created.get(name))
            if placed:
                # The first that shares the most: what all of them have is the root's.
                branch.parent = max(
                    placed, key=lambda other: _shared(histories[other], ids)
                )
                branch.fork_position = _shared(histories[branch.parent], ids)
            yield branch
            placed.append(name)

    def _runs(self, session_id: Any) -> Iterator[SourceRun]:
        """Return the usage of each turn as a run: the source keeps no single runs."""
        counts = ("requests", "input_tokens", "output_tokens", "total_tokens")
        for branch, turn, into, out, created_at, *numbers in self.database.rows(
            "SELECT branch_id, user_turn_number, input_tokens_details, "
            f"output_tokens_details, created_at, {', '.join(counts)} FROM turn_usage "
            f"WHERE session_id = {self.database.mark} ORDER BY id LIMIT {MOST_RUNS + 1}",
            [session_id],
        ):
            details = _object(into), _object(out)
            used = dict(zip(counts, (each or 0 for each in numbers), strict=True))
            columns = {
                "status": AgentRun.Status.COMPLETED,
                **used,
                "cached_tokens": _number(details[0].get("cached_tokens")),
                "reasoning_tokens": _number(details[1].get("reasoning_tokens")),
                "usage": {
                    **used,
                    "input_tokens_details": [details[0]],
                    "output_tokens_details": [details[1]],
                    "request_usage_entries": [],
                },
            }
            if ended := as_time(created_at, self.zone):
                columns |= {"started_at": ended, "finished_at": ended}
            key = sha256(f"{turn}\n{branch}".encode("utf-8", "replace")).hexdigest()
            yield SourceRun(RUN_ID + key[:48], _own_name(str(branch)), columns, turn)


def _wrong(names: list[Any]) -> str:
    """Return what is wrong with the names of a session's branches; "" for nothing."""
    if len(names) > MOST_BRANCHES:
        return f"it has more than {MOST_BRANCHES:,} branches. Delete some there."
    if not all(isinstance(name, str) and is_text(name) for name in names):
        return "one of its branches has a name that is no text. Change it there."
    if len({*map(_own_name, names)}) < len(names):
        return (
            f"two of its branches have names that differ only in {LABEL_MARK} and -, "
            f"and {LABEL_MARK} becomes - here. Delete one of them in the source."
        )
    return ""


def _own_name(name: str) -> str:
    return name.replace(LABEL_MARK, "-")


def _shared(one: array[int], other: array[int]) -> int:
    """Count the ids that two histories have in common from the beginning."""
    shortest = min(len(one), len(other))
    # Nearly always all or nothing is the same; slices compare fast.
    low, high = 0, shortest
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _object(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
