"""The backend that encrypts what another one stores."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.core import checks

from agent_sessions.backends.base import Page, Sealer, SessionKey
from agent_sessions.backends.encrypted.keyed import KeyedBackend
from agent_sessions.backends.wrapping import innermost
from agent_sessions.concurrency.settle import settle
from agent_sessions.encryption import Vault, adrive, drive, looking, popping, reading
from agent_sessions.encryption.envelopes import id_of, ids_of, may_have_copies
from agent_sessions.encryption.keys import TEXTS
from agent_sessions.encryption.reading import Readable, Steps
from agent_sessions.encryption.vault import Opened
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import Item, StoredItem, encode_texts
from agent_sessions.reports import guarded

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# Items that are looked at to find a turn's end.
_AHEAD = 50
# Items of a step back, to find the originals of copies.
_BACK = 500


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

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        if items:
            # What is no JSON is told before anything is begun.
            texts = encode_texts(items)
            with self.writing(key) as vault:
                self.inner.append(key, vault.seal_encoded(texts))

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        if self._is_threaded:
            await super().aappend(key, items)
        elif items:
            texts = encode_texts(items)
            vault = await self.avault(key)
            await self.inner.aappend(key, vault.seal_encoded(texts))

    def latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        return self._told(self._use(key, lambda vault: reading(vault, limit)))

    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        if self._is_threaded:
            return await super().alatest(key, limit)
        return self._told(await self._ause(key, lambda vault: reading(vault, limit)))

    def _told(self, found: Readable) -> list[Item]:
        if found.passed_over:
            logger.warning(
                "%d rows of a session in %r don't open and were passed over",
                found.passed_over,
                self.alias,
            )
        return found.items

    def pop(self, key: SessionKey) -> Item | None:
        in_one_step = self.inner.supports_pop_if
        return self._use(key, lambda vault: popping(vault, in_one_step))

    async def apop(self, key: SessionKey) -> Item | None:
        if self._is_threaded:
            return await super().apop(key)
        in_one_step = self.inner.supports_pop_if
        return await settle(self._ause(key, lambda vault: popping(vault, in_one_step)))

    def clear(self, key: SessionKey) -> int:
        with self.removing(key):
            return innermost(self).clear(key)

    async def aclear(self, key: SessionKey) -> int:
        if self._is_threaded:
            return await super().aclear(key)
        # From the look at the newest item on: a client may swallow a cancellation there.
        return await settle(self._aclear(key))

    async def _aclear(self, key: SessionKey) -> int:
        if not self.settings.clear_without_key:
            await self._ause(key, looking)
        count = await self.inner.aclear(key)
        self._forget(key)
        return count

    @contextmanager
    def removing(self, key: SessionKey) -> Iterator[None]:
        if not self.settings.clear_without_key:
            self._use(key, looking)
        own = self.settings.session_keys
        destroyed = self.secrets.destroyed(key) if own else nullcontext()
        with destroyed, super().removing(key):
            yield
        self._forget(key)

    def page(self, key: SessionKey, **edges: Any) -> Page:
        def ask(edges: dict[str, Any] | None) -> Page | bool:
            if edges is None:
                return self.source.renew()
            return self.inner.page(key, **edges)

        return drive(self._paging(key, edges), ask)

    async def apage(self, key: SessionKey, **edges: Any) -> Page:
        async def ask(edges: dict[str, Any] | None) -> Page | bool:
            if edges is None:
                return await sync_to_async(self.source.renew)()
            return await self.inner.apage(key, **edges)

        if self._is_threaded:
            return await self.threads.run(self.page, key, **edges)
        await self.source.load()
        return await adrive(self._paging(key, edges), ask)

    def _paging(self, key: SessionKey, edges: dict[str, Any]) -> Steps[Page]:
        """Ask for pages by their edges, and for other keys by None."""
        found = yield edges
        page = yield from open_page(self._page_vault(key), found)
        if is_closed(page) and (yield None):
            page = yield from open_page(self._page_vault(key), found)
        return page

    def _use(self, key: SessionKey, steps: Callable[[Vault], Steps[T]]) -> T:

        def ask(request: tuple[str, Any]) -> Any:
            name, *arguments = request
            return getattr(self.inner, name)(key, *arguments)

        return self.with_keys(key, lambda vault: drive(steps(vault), ask))

    async def _ause(self, key: SessionKey, steps: Callable[[Vault], Steps[T]]) -> T:

        def ask(request: tuple[str, Any]) -> Awaitable[Any]:
            name, *arguments = request
            found: Awaitable[Any] = getattr(self.inner, f"a{name}")(key, *arguments)
            return found

        return await self.awith_keys(key, lambda vault: adrive(steps(vault), ask))

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


# -- pages, opened as far as the keys go -----------------------------------------------


def open_page(vault: Vault, page: Page) -> Steps[Page]:
    """Open a page's items.

    What needs an unknown key stays in its envelope, for readers to tell; what doesn't
    open with its own key, or is a copy, has no item. Other pages are asked for, by the
    arguments of page(), where turns have a lifetime or copies may be there.
    """
    seen = yield from _originals(vault, page)
    pairs = [_open(vault, stored, seen) for stored in page.items]
    if vault.lifetime is not None:
        goes_on = page.has_later and (yield from _goes_on(vault, pairs))
        hidden = vault.count_hidden([each for _, each in pairs], goes_on=goes_on)
        if hidden:
            return Page([stored for stored, _ in pairs[hidden:]], False, page.has_later)
    return Page([stored for stored, _ in pairs], page.has_earlier, page.has_later)


def is_closed(page: Page) -> bool:
    return any(stored.is_closed and stored.item is not None for stored in page.items)


def _originals(vault: Vault, page: Page) -> Steps[set[str]]:
    """Return the ids of a page's envelopes that lie before it, as far as may be."""
    wanted = {id_of(stored.item) for stored in page.items} - {""}
    found: list[Any] = [stored.item for stored in page.items]
    seen: set[str] = set()
    while page.has_earlier and page.items and may_have_copies(ids_of(found)):
        page = yield {"before": page.items[0].position, "limit": _BACK}
        items = [stored.item for stored in page.items]
        found = [*items, *found]
        # What opens nowhere is no original.
        originals = (each for each in items if id_of(each) in wanted)
        seen |= {id_of(each) for each in originals if _opens(vault, each)}
    return seen


def _opens(vault: Vault, stored: Any) -> bool:
    try:
        return vault.open(stored) is not None
    except EncryptionError:
        return False


def _open(
    vault: Vault, stored: StoredItem, seen: set[str]
) -> tuple[StoredItem, Opened | None]:
    try:
        opened = vault.open(stored.item)
    except EncryptionError:
        key_id = (stored.item or {})["kid"]
        return replace(stored, is_closed=True, missing_key=key_id), None
    if opened is None or opened.envelope_id in seen:
        return replace(stored, item=None, is_closed=True), None
    seen.add(opened.envelope_id)
    opened_item = replace(
        stored,
        item=opened.item,
        raw=encode_texts([opened.item])[0],
        envelope_id=opened.envelope_id,
    )
    return opened_item, opened


def _goes_on(
    vault: Vault, pairs: list[tuple[StoredItem, Opened | None]]
) -> Steps[bool]:
    """Return whether the last turn of a page has later items whose time isn't over."""
    position = pairs[-1][0].position if pairs else 0
    seen = {opened.envelope_id for _, opened in pairs if opened is not None}
    while True:
        page = yield {"after": position, "limit": _AHEAD}
        for stored in page.items:
            opened = _open(vault, stored, seen)[1]
            if opened is None:
                continue
            if opened.begins_turn:
                return False
            if not vault.is_over(opened):
                return True
        if not page.has_later or not page.items:
            return False
        position = page.items[-1].position
