"""Encrypted sessions: around any session object, and those of EncryptedBackend."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast
from weakref import WeakKeyDictionary

from agents.memory import (
    OpenAIConversationsSession,
    SessionABC,
    SessionSettings,
)
from agents.memory.session_settings import (
    coerce_session_settings,
    resolve_session_limit,
)

from agent_sessions.backends.keys import check_limit
from agent_sessions.concurrency.settle import settle
from agent_sessions.encryption import (
    KeyRing,
    Reading,
    Vault,
    carrier_for,
    session_context,
)
from agent_sessions.encryption.envelopes import IN_MESSAGES
from agent_sessions.encryption.keys import require_cryptography
from agent_sessions.encryption.reading import Taking
from agent_sessions.exceptions import EncryptionError, ScanLimitReached
from agent_sessions.handler import open_session
from agent_sessions.items import as_sequence, encode_batch
from agent_sessions.memory import sdk
from agent_sessions.memory.base import BackendSession
from agent_sessions.memory.wrapping import (
    Arguments,
    WrappingSession,
    read_arguments,
)
from agent_sessions.reports import guard_public_methods, guarded

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.run_context import RunContextWrapper

    from agent_sessions.backends.encrypted import EncryptedBackend

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

_METHODS = ("get_items", "add_items", "pop_item", "clear_session")
# As in EncryptedBackend.
_MANY = 100


class SealedCompaction:
    """The SDK's compaction hooks over a store that keeps envelopes.

    Without the store's own hooks the SDK reads, clears and adds; that goes through
    the session, and is encrypted too. memory/compaction.py tells what the hooks are.
    """

    async def _sealed(self) -> tuple[Any, Vault]:
        """Return the session that stores envelopes, and what opens them."""
        raise NotImplementedError

    def _stores_plain_items(self) -> bool:
        """Return whether no subclass changes items on their way in or out."""
        raise NotImplementedError

    @guarded
    async def _get_compaction_snapshot(
        self, limit: int, *, prune_prefix: Callable[[Any], bool] | None = None
    ) -> Any:
        """Read the newest `limit` items, and how to replace them.

        Returns None where it can't be done safely.

        What lies before one that doesn't open, or whose time is over, stays where it
        is, and that one too.
        """
        inner, vault = await self._sealed()
        reader = getattr(inner, "_get_compaction_snapshot", None)
        if reader is None or not self._stores_plain_items():
            return None
        found = await reader(limit)
        if found is None:
            return None
        if not found.complete and vault.may_have_copies(found.items):
            return None
        opened = vault.open_each(found.items)
        newest = takewhile(lambda each: each is not None, reversed(opened))
        readable = list(newest)[::-1]
        items = [each for each in readable if each is not None]
        items = items[vault.count_hidden(items) :]
        hidden = len(found.items) - len(items)

        async def replace_suffix(start: int, output: list[Any]) -> bool:
            # The model has summarized meanwhile, and the key may have changed.
            _, newest = await self._sealed()
            replaced = await found.replace_suffix(hidden + start, newest.seal(output))
            return bool(replaced)

        return type(found)(
            [each.item for each in items], found.complete and not hidden, replace_suffix
        )

    @guarded
    async def _atomic_replace_items(self, items: list[TResponseInputItem]) -> bool:
        """Replace the whole history in one step, where the store can."""
        inner, vault = await self._sealed()
        # Looked up on the type, as the SDK does.
        replace = getattr(type(inner), "_atomic_replace_items", None)
        if replace is None or not self._stores_plain_items():
            return False
        return bool(await replace(inner, vault.seal(items)))


class EncryptedBackendSession(SealedCompaction, BackendSession):
    """A session of EncryptedBackend."""

    def _stores_plain_items(self) -> bool:
        return _has_methods_of(BackendSession, self)

    async def _sealed(self) -> tuple[Any, Vault]:
        backend = cast("EncryptedBackend", self.backend)
        inner = open_session(backend.inner, self.key)
        if backend.settings.session_keys:
            # A key that another process may destroy meanwhile: no hook.
            return None, await backend.avault(self.key)
        return inner, await backend.avault(self.key)


@guard_public_methods
class EncryptedSession(SealedCompaction, WrappingSession, SessionABC):
    """Encrypt what another session object stores: `EncryptedSession(inner, key)`.

    `keys` in the place of `encryption_key` is a list: the first one writes, all read.
    Keys are those of `Fernet.generate_key()`. `lifetime` is a number of seconds after
    which a turn is hidden, whole; by default nothing is. With `accept_sdk_envelopes`
    histories open that the SDK's own EncryptedSession wrote under the same session id;
    those are bound to nothing else, so it is off.

    The SDK's arguments are taken too: `EncryptedSession(session_id, inner, key)`, with
    `underlying_session`, `ttl` for `lifetime` and `max_scan_items`, how many stored
    items a read may look at. Other attributes are the inner session's.
    """

    def __init__(self, *given: Any, **named: Unpack[Arguments]) -> None:
        require_cryptography(type(self).__name__)
        arguments = read_arguments(given, dict(named))
        inner_session = self.inner_session = arguments["inner_session"]
        key = arguments.get("encryption_key")
        keys = arguments.get("keys") or ()
        self._ring = KeyRing.parse(keys if key is None else [key])
        self._given_id = arguments.get("session_id")
        self.max_scan_items = arguments.get("max_scan_items")
        self.ttl = arguments.get("lifetime")
        self._accepts_sdk_envelopes = arguments.get("accept_sdk_envelopes", False)
        self._is_conversation = isinstance(inner_session, OpenAIConversationsSession)
        store = getattr(self.storing_session, "backend", None)
        self._carrier = IN_MESSAGES if self._is_conversation else carrier_for(store)
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = (
            WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        name = self.session_id if self._has_id() else "not made yet"
        return f"<{type(self).__name__} {name!r}>"

    @property
    def session_id(self) -> str:
        """The id that was given, else the inner session's."""
        if self._given_id is not None:
            return self._given_id
        return self.inner_session.session_id

    @session_id.setter
    def session_id(self, value: str) -> None:
        if self._given_id is not None:
            self._given_id = value
        else:
            self.inner_session.session_id = value

    @property
    def session_settings(self) -> SessionSettings | None:
        """The inner session's settings."""
        return self.inner_session.session_settings

    @session_settings.setter
    def session_settings(self, value: SessionSettings | dict[str, Any] | None) -> None:
        self.inner_session.session_settings = (
            None if value is None else coerce_session_settings(value)
        )

    async def get_items(
        self,
        limit: int | None = None,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> list[TResponseInputItem]:
        """Read the newest `limit` items, oldest first, as BackendSession does.

        Raises UnknownEncryptionKey, EncryptionError where nothing opens, and
        ScanLimitReached.
        """
        limit = check_limit(resolve_session_limit(limit, self.session_settings))
        if limit == 0 or not self._has_id():
            return []
        reading = Reading(self._vault(), limit)
        left, is_done = self.max_scan_items, False
        if left is not None:
            # No more than is wanted, as in the SDK.
            reading.window = limit
        while not is_done:
            window = _affordable(reading.window, left)
            found = await self._read(window, wrapper)
            if left is not None:
                left -= len(found)
                if limit is None and len(found) == window:
                    raise ScanLimitReached
            was, reading.window = window or 0, window
            if len(found) > _MANY:
                is_done = await asyncio.to_thread(reading.feed, found)
            else:
                is_done = reading.feed(found)
            if not is_done and left is not None and left <= was:
                raise ScanLimitReached
        if reading.passed_over:
            logger.warning(
                "%d items don't open and were passed over", reading.passed_over
            )
        return cast("list[TResponseInputItem]", reading.items)

    async def add_items(
        self,
        items: list[TResponseInputItem],
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> None:
        """Store a batch, each item in an envelope of its own. Raises InvalidItem."""
        async with self._in_turn():
            batch = as_sequence(items)
            if batch and not self._has_id():
                await self._begin(batch)
            sealed = self._vault().seal(batch)
            await self._call(self.inner_session.add_items, wrapper, sealed)

    async def pop_item(
        self, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> TResponseInputItem | None:
        """Remove and return the newest item.

        Raises EncryptionError where it doesn't open; it then stays.
        """
        async with self._in_turn():
            if not self._has_id():
                return None
            taking = Taking(self._vault())
            while not taking.look(await self._read(taking.window, wrapper)):
                pass
            if self._pops_in_one_step():
                store = cast("BackendSession", self.inner_session)
                taken: Any = await store.pop_if(taking.begin, wrapper=wrapper)
                return cast("TResponseInputItem | None", taking.end(taken))
            if not taking.may_take():
                return None
            return await settle(self._take(taking, wrapper))

    async def clear_session(
        self, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> None:
        """Remove every item.

        Raises UnknownEncryptionKey where the newest one needs another key: nothing is
        removed then. Clear `inner_session` to do it nevertheless.
        """
        async with self._in_turn():
            vault = self._vault()
            if self._has_id():
                for envelope in await self._read(1, wrapper):
                    vault.open(envelope)
            await self._call(self.inner_session.clear_session, wrapper)

    async def clear(self) -> None:
        """See clear_session()."""
        await self.clear_session()

    def _pops_in_one_step(self) -> bool:
        inner = self.inner_session
        return (
            isinstance(inner, BackendSession)
            and inner.backend.supports_pop_if
            and type(inner).pop_item is BackendSession.pop_item
        )

    async def _take(
        self, taking: Taking, wrapper: RunContextWrapper[Any] | None
    ) -> TResponseInputItem | None:
        taken: Any = await self._call(self.inner_session.pop_item, wrapper)
        try:
            return cast("TResponseInputItem | None", taking.end(taken))
        except EncryptionError:
            # Somebody was faster, with a key that isn't ours.
            if back := taking.back(taken):
                await self._call(self.inner_session.add_items, wrapper, back)
            raise

    async def _read(
        self, window: int | None, wrapper: RunContextWrapper[Any] | None
    ) -> Sequence[Any]:
        # Without a limit there is none in the settings either.
        arguments = () if window is None else (window,)
        found: Sequence[Any] = await self._call(
            self.inner_session.get_items, wrapper, *arguments
        )
        return found

    async def _call(
        self,
        method: Callable[..., Awaitable[T]],
        wrapper: RunContextWrapper[Any] | None,
        *arguments: Any,
    ) -> T:
        # The SDK's own rule: all four methods take it, or none is given it.
        if wrapper is not None and _takes_wrapper(self.inner_session):
            return await method(*arguments, wrapper=wrapper)
        return await method(*arguments)

    def _stores_plain_items(self) -> bool:
        return _has_methods_of(EncryptedSession, self)

    async def _sealed(self) -> tuple[Any, Vault]:
        return self.storing_session, self._vault()

    # A conversation gets its id, by which its items are bound, from OpenAI with its
    # first item, and another one after each clear.

    def _has_id(self) -> bool:
        if not self._is_conversation:
            return True
        try:
            return bool(self.session_id)
        except ValueError:
            return False

    async def _begin(self, items: Sequence[Any]) -> None:
        """Make the conversation; what is no JSON is told before that."""
        encode_batch(items)
        await sdk.begin_conversation(self.inner_session)

    def _in_turn(self) -> AbstractAsyncContextManager[Any]:
        """Keep a clear from giving another id between sealing and storing."""
        if not self._is_conversation:
            return nullcontext()
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())

    def _vault(self) -> Vault:
        owner = getattr(getattr(self.storing_session, "key", None), "user_id", None)
        session_id = self.session_id if self._has_id() else ""
        context = session_context("", None if owner is None else str(owner), session_id)
        vault = Vault(
            self._ring,
            context,
            session_id,
            lifetime=self.ttl,
            carrier=self._carrier,
        )
        vault.accepts_sdk_envelopes = self._accepts_sdk_envelopes
        return vault


def _affordable(window: int | None, left: int | None) -> int | None:
    """Narrow a window to what may still be looked at."""
    if left is None or window is None:
        return left if window is None else window
    return min(window, left)


def _has_methods_of(base: type[SessionABC], session: SessionABC) -> bool:
    kind = type(session)
    return kind.get_items is base.get_items and kind.add_items is base.add_items


def _takes_wrapper(session: Any) -> bool:
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for name in _METHODS:
        parameters = inspect.signature(getattr(session, name)).parameters
        if "wrapper" not in parameters or parameters["wrapper"].kind not in kinds:
            return False
    return True


EncryptSession = EncryptedSession
