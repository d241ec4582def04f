"""The example of docs/backends.md, as it stands there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, ClassVar

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.remote.base import RemoteBackend, Stretch
from agent_sessions.items import Batch, Item, decode, decode_all


class ListBackend(RemoteBackend):
    """Keep histories as lists of JSON texts in this process, for tests."""

    supports_listing = True
    histories: ClassVar[dict[tuple[Any, str], list[str]]] = {}

    def texts(self, key: SessionKey) -> list[str]:
        return self.histories.setdefault((key.user_id, key.session_id), [])

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        texts = self.texts(key)
        texts.extend(row.data for row in batch.rows)
        return len(texts)

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        items = decode_all(self.texts(key))
        return items if limit is None else items[-limit:]

    async def store_pop(self, key: SessionKey) -> Item | None:
        texts = self.texts(key)
        for index in reversed(range(len(texts))):
            if (item := decode(texts[index])) is not None:
                del texts[index]
                return item
        return None

    async def store_clear(self, key: SessionKey) -> int:
        return len(self.histories.pop((key.user_id, key.session_id), []))

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        return wanted.cut(decode_all(self.texts(key)))

    async def store_ids(self) -> AsyncIterator[str]:
        for user_id, session_id in list(self.histories):
            if user_id is None:
                yield session_id
