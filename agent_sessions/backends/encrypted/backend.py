"""The backend that encrypts what another one stores."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import sync_to_async
from django.core import checks

from agent_sessions.backends.base import Page, Sealer, SessionKey
from agent_sessions.backends.encrypted.keyed import KeyedBackend
from agent_sessions.backends.encrypted.pages import (
    is_closed,
    may_have_copies,
    open_page,
)
from agent_sessions.backends.encrypted.rotation import confirm
from agent_sessions.backends.wrapping import innermost
from agent_sessions.concurrency.settle import settle
from agent_sessions.encryption import Reading, Taking, Vault
from agent_sessions.encryption.keys import TEXTS
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import Item, encode_texts
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    from agent_sessions.backends.keys import PopsIf

logger = logging.getLogger("agent_sessions.backends")

# More envelopes than this are opened in a thread, so that the loop goes on meanwhile.
_MANY = 100


class EncryptedBackend(KeyedBackend):
    """Encrypt what another backend stores.

    OPTIONS: `backend`, the alias of the one that stores; `keys`, a list of keys of
    which the first writes and all read, or the dotted path of a function that gives
    one; `lifetime`, for how long a turn is shown; `session_keys`, whether each session
    has a key of its own that clearing destroys; `clear_without_key`, whether a history
    may be cleared whose key is missing; `accept_sdk_envelopes`, whether items open that
    the SDK's EncryptedSession wrote; `name`, what items are bound to in the place of
    the alias; `cache_bytes`, how much opened text a process remembers for a minute;
    `key_refresh`, for how many seconds it may write without asking for its keys again.
    """

    session_class = "agent_sessions.memory.encrypted.EncryptedBackendSession"

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        self.sealer = EncryptingSealer(self)

    # -- sync --------------------------------------------------------------------

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            # What is no JSON is told before anything is begun.
            texts = encode_texts(items)
            with self.writing(key) as vault:
                self.inner.append(key, vault.seal_encoded(texts))

    def latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        if limit == 0:
            return self.inner.latest(key, 0)

        def read(vault: Vault) -> list[Item]:
            reading = Reading(vault, limit)
            while not reading.feed(self.inner.latest(key, reading.window)):
                pass
            return self._told(reading)

        return self.with_keys(key, read)

    def pop(self, key: SessionKey) -> Item | None:
        return self.with_keys(key, lambda vault: self._pop(vault, key))

    def _pop(self, vault: Vault, key: SessionKey) -> Item | None:
        """Remove and return the newest item. Raises EncryptionError; it then stays."""
        taking = Taking(vault)
        while not taking.look(self.inner.latest(key, taking.window)):
            pass
        if self.inner.supports_pop_if:
            return taking.end(cast("PopsIf", self.inner).pop_if(key, taking.begin))
        if not taking.may_take():
            return None
        taken = self.inner.pop(key)
        try:
            return taking.end(taken)
        except EncryptionError:
            # Somebody was faster, with a key that isn't ours.
            self.inner.append(key, taking.back(taken))
            raise

    def clear(self, key: SessionKey) -> int:
        with self.removing(key):
            return innermost(self).clear(key)

    @contextmanager
    def removing(self, key: SessionKey) -> Iterator[None]:
        if not self.settings.clear_without_key:
            # Raises UnknownEncryptionKey.
            newest = self.inner.latest(key, 1)
            self.with_keys(key, lambda vault: vault.open_each(newest))
        own = self.settings.session_keys
        destroyed = self.secrets.destroyed(key) if own else nullcontext()
        with destroyed, super().removing(key):
            yield
        self._forget(key)

    def page(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        found = self.inner.page(key, before=before, after=after, limit=limit)
        read = partial(self.inner.page, key)
        page = open_page(self._page_vault(key), found, read)
        if is_closed(page) and self.source.renew():
            page = open_page(self._page_vault(key), found, read)
        return page

    # -- async -------------------------------------------------------------------

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if self._is_threaded:
            await super().aappend(key, items)
        elif items:
            texts = encode_texts(items)
            permit = await self.permits.atake(self.threads)
            vault = self._vault(key, permit=permit)
            await self.inner.aappend(key, vault.seal_encoded(texts))
            if permit.is_over or not self.threads.serves_caller():
                await self.threads.run(confirm, self, key, permit)

    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        if self._is_threaded:
            return await super().alatest(key, limit)
        if limit == 0:
            return await self.inner.alatest(key, 0)

        async def read(vault: Vault) -> list[Item]:
            reading, is_done = Reading(vault, limit), False
            while not is_done:
                found = await self.inner.alatest(key, reading.window)
                if len(found) > _MANY:
                    is_done = await asyncio.to_thread(reading.feed, found)
                else:
                    is_done = reading.feed(found)
            return self._told(reading)

        return await self._awith_keys(key, read)

    async def apop(self, key: SessionKey) -> Item | None:
        if self._is_threaded:
            return await super().apop(key)
        return await settle(self._awith_keys(key, lambda vault: self._apop(vault, key)))

    async def _apop(self, vault: Vault, key: SessionKey) -> Item | None:
        taking = Taking(vault)
        while not taking.look(await self.inner.alatest(key, taking.window)):
            pass
        if self.inner.supports_pop_if:
            store = cast("PopsIf", self.inner)
            return taking.end(await store.apop_if(key, taking.begin))
        if not taking.may_take():
            return None
        taken = await self.inner.apop(key)
        try:
            return taking.end(taken)
        except EncryptionError:
            await self.inner.aappend(key, taking.back(taken))
            raise

    async def aclear(self, key: SessionKey) -> int:
        if self._is_threaded:
            return await super().aclear(key)
        # From the look at the newest item on: a client may swallow a cancellation there.
        return await settle(self._aclear(key))

    async def _aclear(self, key: SessionKey) -> int:
        if not self.settings.clear_without_key:
            newest = await self.inner.alatest(key, 1)
            await self._awith_keys(key, partial(_look, newest))
        count = await self.inner.aclear(key)
        self._forget(key)
        return count

    async def apage(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        place: Any = {"before": before, "after": after, "limit": limit}
        if self._is_threaded or self.settings.lifetime is not None:
            return await self.threads.run(self.page, key, **place)
        await self.source.load()
        found = await self.inner.apage(key, before=before, after=after, limit=limit)
        if may_have_copies(self._vault(key), found):
            return await self.threads.run(self.page, key, **place)
        page = open_page(self._vault(key), found, _unasked)
        if is_closed(page) and await sync_to_async(self.source.renew)():
            page = open_page(self._vault(key), found, _unasked)
        return page

    def _told(self, reading: Reading) -> list[Item]:
        if reading.passed_over:
            logger.warning(
                "%d rows of a session in %r don't open and were passed over",
                reading.passed_over,
                self.alias,
            )
        return reading.items

    # -- configuration ---------------------------------------------------------------

    def forget_key(self, key: SessionKey) -> None:
        super().forget_key(key)
        if self.settings.session_keys:
            self.secrets.rows(key).delete()
        self._forget(key)

    def check(self) -> list[checks.CheckMessage]:
        return self.source.check()

    def close(self) -> None:
        self._memory.close()
        super().close()


class EncryptingSealer(Sealer):
    """Texts that are encrypted as the items are, beside which they lie."""

    def __init__(self, backend: EncryptedBackend) -> None:
        super().__init__(backend.alias)
        self._backend = backend

    @guarded
    def seal(self, key: SessionKey, text: str) -> str:
        with self._backend.writing(key, TEXTS) as vault:
            return vault.seal_text(text) if text else ""

    @guarded
    def open(self, key: SessionKey, text: str) -> str:
        if not text:
            return ""
        return self._backend.with_keys(key, lambda vault: vault.open_text(text), TEXTS)

    def open_all(self, texts: Sequence[tuple[SessionKey, str]]) -> list[str | None]:
        backend, known = self._backend, None
        if backend.settings.session_keys:
            known = backend.secrets.read_all([key for key, _ in texts])

        def open_one(key: SessionKey, text: str) -> str | None:
            try:
                return backend.with_keys(
                    key, lambda vault: vault.open_text(text), TEXTS, known
                )
            except EncryptionError:
                return None

        return [open_one(key, text) if text else "" for key, text in texts]


async def _look(newest: list[Item], vault: Vault) -> None:
    vault.open_each(newest)


def _unasked(**place: int) -> Page:
    raise AssertionError("may_have_copies() says when others are looked at")
