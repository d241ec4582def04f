"""Encrypted sessions: around any session object, and those of EncryptedBackend."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast
from weakref import WeakKeyDictionary

from agents.memory import (
    OpenAIConversationsSession,
    OpenAIResponsesCompactionSession,
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
    Vault,
    adrive,
    carrier_for,
    looking,
    popping,
    reading,
    session_context,
)
from agent_sessions.encryption.envelopes import IN_MESSAGES
from agent_sessions.encryption.keys import require_cryptography
from agent_sessions.handler import open_session
from agent_sessions.items import as_sequence, encode_batch
from agent_sessions.memory import sdk, wrapping
from agent_sessions.memory.base import BackendSession
from agent_sessions.reports import guard_public_methods

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.memory import Session

    from agent_sessions.backends.encrypted import EncryptedBackend
    from agent_sessions.memory.base import Settings, Wrapper

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# What reads and writes items of the inner session past the encryption.
_PAST = frozenset({"sync", "fenced"})


class EncryptedBackendSession(wrapping.SealedCompaction, BackendSession):
    """A session of EncryptedBackend."""

    def _stores_plain_items(self) -> bool:
        return wrapping.has_methods_of(BackendSession, self)

    async def _sealed(self) -> tuple[Any, Vault]:
        backend = cast("EncryptedBackend", self.backend)
        inner = open_session(backend.inner, self.key)
        if backend.settings.session_keys:
            # A key that another process may destroy meanwhile: no hook.
            return None, await backend.avault(self.key)
        return inner, await backend.avault(self.key)


@guard_public_methods
class EncryptedSession(wrapping.SealedCompaction, SessionABC):
    """Encrypt what another session object stores: `EncryptedSession(inner, key)`.

    `keys` in the place of `encryption_key` is a list: the first one writes, all read.
    Keys are those of `Fernet.generate_key()`. `lifetime` is a number of seconds after
    which a turn is hidden, whole; by default nothing is. With `accept_sdk_envelopes`
    histories open that the SDK's own EncryptedSession wrote under the same session id;
    those are bound to nothing else, so it is off.

    The SDK's arguments are taken too: `EncryptedSession(session_id, inner, key)`, with
    `underlying_session`, `ttl` for `lifetime` and `max_scan_items`, how many stored
    items a read may look at. Other attributes are the inner session's.

    Raises TypeError around OpenAIResponsesCompactionSession, which would compact
    envelopes: put that one around this.
    """

    inner_session: Session

    def __init__(self, *given: Any, **named: Unpack[wrapping.Arguments]) -> None:
        require_cryptography(type(self).__name__)
        arguments = wrapping.read_arguments(given, dict(named))
        inner_session = self.inner_session = arguments["inner_session"]
        if isinstance(inner_session, OpenAIResponsesCompactionSession):
            raise TypeError(
                "OpenAIResponsesCompactionSession can't read what is encrypted around "
                "it. Put it around EncryptedSession."
            )
        key = arguments.get("encryption_key")
        keys = arguments.get("keys") or ()
        self._ring = KeyRing.parse(keys if key is None else [key])
        self._given_id = arguments.get("session_id")
        self.max_scan_items = arguments.get("max_scan_items")
        self.ttl = arguments.get("lifetime")
        self._accepts_sdk_envelopes = arguments.get("accept_sdk_envelopes", False)
        self._is_conversation = isinstance(inner_session, OpenAIConversationsSession)
        store = getattr(inner_session, "backend", None)
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
    def session_settings(self, value: Settings) -> None:
        self.inner_session.session_settings = (
            None if value is None else coerce_session_settings(value)
        )

    def __getattr__(self, name: str) -> Any:
        # Only asked for what this class doesn't have.
        if name == "inner_session" or name.startswith("__"):
            raise AttributeError(name)
        if name in _PAST:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: that of inner_session goes "
                "past the encryption."
            )
        return getattr(self.inner_session, name)

    @property
    def underlying_session(self) -> Session:
        """The inner session, as the SDK names it."""
        return self.inner_session

    async def get_items(
        self, limit: int | None = None, *, wrapper: Wrapper = None
    ) -> list[TResponseInputItem]:
        """Read the newest `limit` items, oldest first, as BackendSession does.

        Raises UnknownEncryptionKey, EncryptionError where nothing opens, and
        ScanLimitReached.
        """
        limit = check_limit(resolve_session_limit(limit, self.session_settings))
        if limit == 0 or not self._has_id():
            return []
        steps = reading(self._vault(), limit, self.max_scan_items)
        found = await adrive(steps, self._asked(wrapper))
        if found.passed_over:
            logger.warning(
                "%d items don't open and were passed over", found.passed_over
            )
        return cast("list[TResponseInputItem]", found.items)

    async def add_items(
        self, items: list[TResponseInputItem], *, wrapper: Wrapper = None
    ) -> None:
        """Store a batch, each item in an envelope of its own. Raises InvalidItem."""
        async with self._in_turn():
            batch = as_sequence(items)
            if batch and not self._has_id():
                await self._begin(batch)
            sealed = self._vault().seal(batch)
            await self._call(self.inner_session.add_items, wrapper, sealed)

    async def pop_item(self, *, wrapper: Wrapper = None) -> TResponseInputItem | None:
        """Remove and return the newest item.

        Raises EncryptionError where it doesn't open; it then stays.
        """
        async with self._in_turn():
            if not self._has_id():
                return None
            steps = popping(self._vault(), self._pops_in_one_step())
            taken = await settle(adrive(steps, self._asked(wrapper)))
            return cast("TResponseInputItem | None", taken)

    async def clear_session(self, *, wrapper: Wrapper = None) -> None:
        """Remove every item.

        Raises UnknownEncryptionKey where the newest one needs another key: nothing is
        removed then. Clear `inner_session` to do it nevertheless.
        """
        async with self._in_turn():
            if self._has_id():
                await adrive(looking(self._vault()), self._asked(wrapper))
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

    def _asked(self, wrapper: Wrapper) -> Callable[[tuple[str, Any]], Awaitable[Any]]:
        """Return what asks the inner session for what the steps ask of a store."""
        inner: Any = self.inner_session

        def ask(request: tuple[str, Any]) -> Awaitable[Any]:
            match request:
                case "latest", window:
                    return self._read(window, wrapper)
                case "pop_if", asking:
                    popped: Awaitable[Any] = inner.pop_if(asking, wrapper=wrapper)
                    return popped
                case "append", items:
                    return self._call(inner.add_items, wrapper, items)
            return self._call(inner.pop_item, wrapper)

        return ask

    async def _read(self, window: int | None, wrapper: Wrapper) -> Sequence[Any]:
        # Without a limit there is none in the settings either.
        arguments = () if window is None else (window,)
        found: Sequence[Any] = await self._call(
            self.inner_session.get_items, wrapper, *arguments
        )
        return found

    async def _call(
        self, method: Callable[..., Awaitable[T]], wrapper: Wrapper, *arguments: Any
    ) -> T:
        # The SDK's own rule: all four methods take it, or none is given it.
        if wrapper is not None and wrapping.takes_wrapper(self.inner_session):
            return await method(*arguments, wrapper=wrapper)
        return await method(*arguments)

    def _stores_plain_items(self) -> bool:
        return wrapping.has_methods_of(EncryptedSession, self)

    async def _sealed(self) -> tuple[Any, Vault]:
        return self.inner_session, self._vault()

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
        """Return a lock: a clear must not change the id between sealing and storing."""
        if not self._is_conversation:
            return nullcontext()
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())

    def _vault(self) -> Vault:
        owner = getattr(getattr(self.inner_session, "key", None), "user_id", None)
        session_id = self.session_id if self._has_id() else ""
        context = session_context("", None if owner is None else str(owner), session_id)
        vault = Vault(
            self._ring, context, session_id, lifetime=self.ttl, carrier=self._carrier
        )
        vault.accepts_sdk_envelopes = self._accepts_sdk_envelopes
        return vault


EncryptSession = EncryptedSession
