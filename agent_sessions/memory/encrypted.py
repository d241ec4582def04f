"""Encrypted sessions: around any session object, and those of EncryptedBackend."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

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
    looking,
    popping,
    reading,
    session_context,
)
from agent_sessions.encryption.envelopes import ids_of, may_have_copies
from agent_sessions.encryption.keys import require_cryptography
from agent_sessions.handler import open_session
from agent_sessions.items import as_sequence
from agent_sessions.memory.base import BackendSession, stores_plain_items
from agent_sessions.reports import guard_public_methods, guarded

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.memory import Session

    from agent_sessions.backends.encrypted import EncryptedBackend
    from agent_sessions.memory.base import Settings, Wrapper

T = TypeVar("T")

logger = logging.getLogger("agent_sessions.backends")

# What reads and writes items of the inner session past the encryption.
_PAST = frozenset({"sync", "fenced"})
_METHODS = ("get_items", "add_items", "pop_item", "clear_session")
# The order of positional arguments: ours, and the SDK's, whose first one is a text.
_OURS = ("inner_session", "encryption_key")
_SDKS = ("session_id", "underlying_session", "encryption_key", "ttl", "max_scan_items")


class Arguments(TypedDict, total=False):
    """The arguments of EncryptedSession by their names: ours and the SDK's."""

    inner_session: Session
    encryption_key: str | bytes | None
    keys: Iterable[str | bytes] | None
    lifetime: float | None
    session_id: str | None
    underlying_session: Session
    ttl: float | None
    max_scan_items: int | None
    accept_sdk_envelopes: bool


class SealedCompaction:
    """The SDK's compaction hooks over a store that keeps envelopes.

    Without the store's own hooks the SDK reads, clears and adds; that goes through
    the session, and is encrypted too. memory/django.py tells what the hooks are.
    """

    async def _sealed(self) -> tuple[Any, Vault]:
        """Return the session that stores envelopes, and what opens them."""
        raise NotImplementedError

    @guarded
    async def _get_compaction_snapshot(
        self, limit: int, *, prune_prefix: Callable[[Any], bool] | None = None
    ) -> Any:
        """Read the newest `limit` items, and how to replace them.

        Returns None where it can't be done safely. What lies before one that doesn't
        open, or whose time is over, stays where it is, and that one too.
        """
        inner, vault = await self._sealed()
        reader = getattr(inner, "_get_compaction_snapshot", None)
        if reader is None or not self._stores_plain_items():
            return None
        found = await reader(limit)
        if found is None:
            return None
        if not found.complete and may_have_copies(ids_of(found.items)):
            return None
        opened = vault.open_each(found.items)
        newest = takewhile(lambda each: each is not None, reversed(opened))
        items = [each for each in newest if each is not None][::-1]
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

    def _stores_plain_items(self) -> bool:
        return any(
            stores_plain_items(self, kind)
            for kind in (EncryptedSession, EncryptedBackendSession)
        )


class EncryptedBackendSession(SealedCompaction, BackendSession):
    """A session of EncryptedBackend."""

    async def _sealed(self) -> tuple[Any, Vault]:
        backend = cast("EncryptedBackend", self.backend)
        # A session's own key may be destroyed meanwhile by another process: no hook.
        has_hook = not backend.settings.session_keys
        inner = open_session(backend.inner, self.key) if has_hook else None
        return inner, await backend.avault(self.key)


@guard_public_methods
class EncryptedSession(SealedCompaction, SessionABC):
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
    envelopes: put that one around this. And around OpenAIConversationsSession, whose
    service takes no envelopes.
    """

    inner_session: Session

    def __init__(self, *given: Any, **named: Unpack[Arguments]) -> None:
        require_cryptography(type(self).__name__)
        arguments = _read_arguments(given, dict(named))
        self.inner_session = arguments["inner_session"]
        key = arguments.get("encryption_key")
        keys = arguments.get("keys") or ()
        self._ring = KeyRing.parse(keys if key is None else [key])
        self._given_id = arguments.get("session_id")
        self.max_scan_items = arguments.get("max_scan_items")
        self.ttl = arguments.get("lifetime")
        self._accepts_sdk_envelopes = arguments.get("accept_sdk_envelopes", False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.session_id!r}>"

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
        if limit == 0:
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
        sealed = self._vault().seal(as_sequence(items))
        await self._call(self.inner_session.add_items, wrapper, sealed)

    async def pop_item(self, *, wrapper: Wrapper = None) -> TResponseInputItem | None:
        """Remove and return the newest item.

        Raises EncryptionError where it doesn't open; it then stays.
        """
        inner = self.inner_session
        in_one_step = (
            isinstance(inner, BackendSession)
            and inner.backend.supports_pop_if
            and type(inner).pop_item is BackendSession.pop_item
        )
        steps = popping(self._vault(), in_one_step)
        taken = await settle(adrive(steps, self._asked(wrapper)))
        return cast("TResponseInputItem | None", taken)

    async def clear_session(self, *, wrapper: Wrapper = None) -> None:
        """Remove every item.

        Raises UnknownEncryptionKey where the newest one needs another key: nothing is
        removed then. Clear `inner_session` to do it nevertheless.
        """
        await adrive(looking(self._vault()), self._asked(wrapper))
        await self._call(self.inner_session.clear_session, wrapper)

    async def clear(self) -> None:
        """See clear_session()."""
        await self.clear_session()

    def _asked(self, wrapper: Wrapper) -> Callable[[tuple[str, Any]], Awaitable[Any]]:
        """Return what asks the inner session for what the steps ask of a store."""
        inner: Any = self.inner_session

        def ask(request: tuple[str, Any]) -> Awaitable[Any]:
            match request:
                case "latest", window:
                    # Without a limit there is none in the settings either.
                    arguments = () if window is None else (window,)
                    return self._call(inner.get_items, wrapper, *arguments)
                case "pop_if", asking:
                    popped: Awaitable[Any] = inner.pop_if(asking, wrapper=wrapper)
                    return popped
                case "append", items:
                    return self._call(inner.add_items, wrapper, items)
            return self._call(inner.pop_item, wrapper)

        return ask

    async def _call(
        self, method: Callable[..., Awaitable[T]], wrapper: Wrapper, *arguments: Any
    ) -> T:
        if wrapper is not None and _takes_wrapper(self.inner_session):
            return await method(*arguments, wrapper=wrapper)
        return await method(*arguments)

    async def _sealed(self) -> tuple[Any, Vault]:
        return self.inner_session, self._vault()

    def _vault(self) -> Vault:
        owner = getattr(getattr(self.inner_session, "key", None), "user_id", None)
        name = None if owner is None else str(owner)
        context = session_context("", name, self.session_id)
        vault = Vault(self._ring, context, self.session_id, lifetime=self.ttl)
        vault.accepts_sdk_envelopes = self._accepts_sdk_envelopes
        return vault


EncryptSession = EncryptedSession


def _takes_wrapper(session: Any) -> bool:
    """Return whether all four methods of a session take the run's context.

    That is the SDK's own rule: all of them take it, or none is given it.
    """
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for name in _METHODS:
        parameters = inspect.signature(getattr(session, name)).parameters
        if "wrapper" not in parameters or parameters["wrapper"].kind not in kinds:
            return False
    return True


def _read_arguments(given: Sequence[Any], named: dict[str, Any]) -> Arguments:
    """Put positional arguments under their names, and the SDK's names under ours.

    Raises TypeError, and ValueError if a number is too small.
    """
    order = _SDKS if given and isinstance(given[0], str) else _OURS
    found = dict(zip(order, given, strict=False))
    unknown = named.keys() - Arguments.__annotations__.keys()
    if len(given) > len(order) or found.keys() & named.keys() or unknown:
        raise TypeError(
            "EncryptedSession takes (inner_session, encryption_key) or the SDK's "
            "(session_id, underlying_session, encryption_key, ttl, max_scan_items), "
            "and keys, lifetime and accept_sdk_envelopes by name."
        )
    found = {
        name: value for name, value in (found | named).items() if value is not None
    }
    for theirs, ours in (("underlying_session", "inner_session"), ("ttl", "lifetime")):
        if theirs in found and ours in found:
            raise TypeError(f"Give one of {ours} and {theirs}.")
        if theirs in found:
            found[ours] = found.pop(theirs)
    if ("encryption_key" in found) == ("keys" in found):
        raise TypeError("Give either encryption_key or keys.")
    # What would fail, or hide everything, only when items are read.
    inner = found.get("inner_session")
    if isinstance(inner, type) or not callable(getattr(inner, "get_items", None)):
        raise TypeError("Give the session to encrypt, as inner_session.")
    if isinstance(inner, OpenAIConversationsSession):
        raise TypeError("OpenAI's Conversations take no items that are encrypted.")
    if isinstance(inner, OpenAIResponsesCompactionSession):
        raise TypeError(
            "OpenAIResponsesCompactionSession can't read what is encrypted around "
            "it. Put it around EncryptedSession."
        )
    if not isinstance(found.get("session_id", ""), str):
        raise TypeError("session_id is a str, or None for the inner session's own.")
    _check_number("lifetime (or ttl)", found.get("lifetime", 0), 0, int | float)
    _check_number("max_scan_items", found.get("max_scan_items", 1), 1, int)
    return found  # type: ignore[return-value]


def _check_number(name: str, value: Any, least: int, kinds: Any) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} is a number, or None.")
    if not value >= least:
        raise ValueError(f"{name} must be {least} or more, or None.")
