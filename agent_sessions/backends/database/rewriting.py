"""Put items in the places of others, beside those who write."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from django.db.models import Max

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.removal import rest
from agent_sessions.items import Item, decode, encode_batch
from agent_sessions.models import SessionItem

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

    pass


class Rewriting:
    """One session's items, some at a time, in short transactions.

    Only the text changes, and its size: position, turn and time stay. Each row is
    compared with what was read, so what another process did meanwhile is left alone.
    """

    def __init__(
        self,
        engine: Engine,
        key: SessionKey,
        change: Callable[[Item], Item | None],
        unless: str,
        batch_size: int,
    ) -> None:
        self.engine = engine
        self._change = change
        self._size = batch_size
        rows = SessionItem._base_manager.using(engine.using).filter(
            branch__session__in=engine.directory.rows(key).values("pk")
        )
        self._rows = rows.exclude(data__contains=unless) if unless else rows

    def run(self) -> int:
        """Rewrite what is there now; tell how many items were changed."""
        last = self._rows.aggregate(last=Max("pk"))["last"] or 0
        after = changed = 0
        while after < last and (found := self._read(after)):
            after = found[-1][0]
            new = self._new(found)
            began = time.monotonic()
            changed += self.engine.atomically(partial(self._write, new))
            rest(self.engine.using, began)
        return changed

    def _read(self, after: int) -> list[tuple[int, str]]:
        rows = self._rows.filter(pk__gt=after).order_by("pk")
        return list(rows.values_list("pk", "data")[: self._size])

    def _new(self, found: list[tuple[int, str]]) -> list[tuple[int, str, str]]:
        """Return key, old and new text of the rows to change."""
        new = []
        for pk, data in found:
            item = decode(data)
            changed = None if item is None else self._change(item)
            if changed is not None:
                new.append((pk, data, encode_batch([changed]).rows[0].data))
        return new

    def _write(self, new: list[tuple[int, str, str]]) -> int:
        rows = SessionItem._base_manager.using(self.engine.using)
        return sum(
            rows.filter(pk=pk, data=old).update(data=text, size=len(text))
            for pk, old, text in new
        )
