"""Batches that tell where they belong, and what a history of them must be."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from django.db import connections

from agent_sessions import DjangoSession
from agent_sessions.models import AgentSession, SessionItem

# A writer, the number of its batch and the place in that batch.
Token = tuple[int, int, int]

_ROLES = (("user", "assistant"), ("user", "assistant", "user"), ("assistant",) * 2)
_FILL = "Größe 😀 \\ ' \" % %s \x00 " * 4
_SHOWN = 20


def batch(writer: int, number: int) -> list[Any]:
    """Make a writer's batch: two or three items, with none to two user messages."""
    return [
        {"role": role, "content": f"{writer} {number} {index} {_FILL}"}
        for index, role in enumerate(_ROLES[number % len(_ROLES)])
    ]


def token(item: Any) -> Token:
    """Return which item this is."""
    writer, number, index, _ = item["content"].split(" ", 3)
    return int(writer), int(number), int(index)


def is_last(found: Token) -> bool:
    """Return whether a batch ends with this item."""
    return found[2] == len(_ROLES[found[1] % len(_ROLES)]) - 1


class History:
    """A history as it is read from its beginning; `problems` is what is wrong with it."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.problems: list[str] = []
        self.tokens: list[Token] = []
        # How many whole batches there are of each writer.
        self.batches: Counter[int] = Counter()
        self.position = 0
        self.turn = 0

    def read_on(self) -> None:
        """Read what was added, row by row, then compare the counters."""
        rows = (
            SessionItem.objects.filter(
                branch__session__session_id=self.session_id, position__gt=self.position
            )
            .order_by("position", "pk")
            .values_list("position", "turn", "data")
        )
        for position, turn, data in rows.iterator(chunk_size=2_000):
            self._row(position, turn, json.loads(data))
        if self.tokens and not is_last(self.tokens[-1]):
            self._problem(f"the last batch is torn: it ends with {self.tokens[-1]}")
        self._counters()

    def compare_items(self) -> None:
        """Compare what the session itself reads with the rows."""
        items = DjangoSession(self.session_id).sync.get_items()
        if [token(item) for item in items] != self.tokens:
            self._problem("get_items() is not what the rows hold")

    def compare_batches(self, writers: Iterable[int], count: int) -> None:
        """Compare how many batches each writer has."""
        for writer in writers:
            if self.batches[writer] != count:
                self._problem(
                    f"writer {writer} has {self.batches[writer]} of {count} batches"
                )

    def _row(self, position: int, turn: int, item: Any) -> None:
        found = writer, number, index = token(item)
        where = f"position {position}, item {found}"
        if position != self.position + 1:
            self._problem(f"{where}: comes after position {self.position}")
        if item != batch(writer, number)[index]:
            self._problem(f"{where}: has other contents than were written")
        self.turn += item["role"] == "user"
        if turn != self.turn:
            self._problem(f"{where}: has turn {turn}, not {self.turn}")
        previous = self.tokens[-1] if self.tokens else None
        if previous is None or is_last(previous):
            wanted = (writer, self.batches[writer], 0)
        else:
            wanted = (previous[0], previous[1], previous[2] + 1)
        if found != wanted:
            self._problem(f"{where}: comes where {wanted} should be")
        if is_last(found):
            self.batches[writer] += 1
        self.tokens.append(found)
        self.position = position

    def _counters(self) -> None:
        row = AgentSession.objects.select_related("branch").filter(
            session_id=self.session_id
        )
        for session in row:
            if session.branch is None:
                self._problem("the session has no current branch")
                continue
            wanted = (len(self.tokens), len(self.tokens), self.turn)
            found = (session.item_count, session.branch.head, session.branch.turn)
            if found != wanted:
                self._problem(f"(item_count, head, turn) is {found}, not {wanted}")
        if not row and self.tokens:
            self._problem("there are items, but no session")

    def _problem(self, text: str) -> None:
        # A first violation brings thousands more with it.
        if len(self.problems) < _SHOWN:
            self.problems.append(text)


def server_connections() -> set[int]:
    """Return the connections that the server has open to this database."""
    connection = connections["default"]
    queries = {
        "postgresql": "SELECT pid FROM pg_stat_activity "
        "WHERE datname = current_database() AND backend_type = 'client backend'",
        "mysql": "SELECT id FROM information_schema.processlist WHERE db = DATABASE()",
    }
    if connection.vendor not in queries:
        return set()
    with connection.cursor() as cursor:
        cursor.execute(queries[connection.vendor])
        return {number for (number,) in cursor.fetchall()}


def await_end(before: set[int], seconds: float = 30) -> bool:
    """Wait until the server has noticed that its newer clients are gone.

    It still carries out what a killed client had already sent.
    """
    deadline = time.monotonic() + seconds
    while not server_connections() <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
