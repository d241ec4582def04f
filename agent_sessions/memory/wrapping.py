"""What a session around another one has of the SDK's: arguments, attributes, hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from agents.memory import OpenAIResponsesCompactionSession

from agent_sessions.encryption import Vault
from agent_sessions.memory import sdk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agents.items import TResponseInputItem
    from agents.memory import OpenAIResponsesCompactionArgs, Session
    from agents.run_context import RunContextWrapper

# The order of positional arguments: ours, and the SDK's, whose first one is a text.
_OURS = ("inner_session", "encryption_key")
_SDKS = (
    "session_id",
    "underlying_session",
    "encryption_key",
    "ttl",
    "max_scan_items",
)
# What reads and writes items of the inner session past the encryption.
_PAST = frozenset({"sync", "fenced"})


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


def read_arguments(given: Sequence[Any], named: dict[str, Any]) -> Arguments:
    """Put positional arguments under their names, and the SDK's names under ours.

    Raises TypeError, and ValueError where `max_scan_items` is not positive.
    """
    order = _SDKS if given and isinstance(given[0], str) else _OURS
    found = dict(zip(order, given, strict=False))
    if len(given) > len(order) or found.keys() & named.keys():
        raise TypeError(
            "EncryptedSession takes (inner_session, encryption_key) or the SDK's "
            "(session_id, underlying_session, encryption_key, ttl, max_scan_items)."
        )
    found |= named
    if unknown := found.keys() - Arguments.__annotations__.keys():
        raise TypeError(f"EncryptedSession takes no {', '.join(sorted(unknown))}.")
    _rename(found, "underlying_session", "inner_session")
    _rename(found, "ttl", "lifetime")
    if found.get("inner_session") is None:
        raise TypeError("Give the session to encrypt, as inner_session.")
    if (found.get("encryption_key") is None) == (found.get("keys") is None):
        raise TypeError("Give either encryption_key or keys.")
    _check_values(found)
    return found  # type: ignore[return-value]


def _check_values(found: dict[str, Any]) -> None:
    """Refuse what would fail, or hide everything, only when items are read."""
    inner = found["inner_session"]
    if isinstance(inner, type) or not callable(getattr(inner, "get_items", None)):
        name = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        kind = "the class " if isinstance(inner, type) else "a value of type "
        raise TypeError(f"{kind}{name} is no session. Give one, as inner_session.")
    if not isinstance(found.get("session_id"), str | None):
        raise TypeError("session_id is a str, or None for the inner session's own.")
    lifetime = found.get("lifetime")
    if not _is_number(lifetime, int | float):
        raise TypeError("lifetime, or ttl, is a number of seconds, or None.")
    if lifetime is not None and not lifetime >= 0:
        raise ValueError("lifetime, or ttl, must not be negative.")
    budget = found.get("max_scan_items")
    if not _is_number(budget, int):
        raise TypeError("max_scan_items is a whole number, or None.")
    if budget is not None and budget <= 0:
        raise ValueError("max_scan_items must be positive or None.")


def _is_number(value: Any, kinds: Any) -> bool:
    """Return whether a value is None or a number, which True is not."""
    return value is None or (isinstance(value, kinds) and not isinstance(value, bool))


def _rename(found: dict[str, Any], old: str, new: str) -> None:
    value = found.pop(old, None)
    if value is None:
        return
    if found.get(new) is not None:
        raise TypeError(f"Give one of {new} and {old}.")
    found[new] = value


class WrappingSession:
    """Attributes of the inner session, and the compaction that it does.

    The SDK's class gives its compaction the items in the clear by arguments of
    private methods (0.24), as here; a test pins them.
    """

    inner_session: Session

    def __getattr__(self, name: str) -> Any:
        # Only asked for what this class doesn't have.
        if name == "inner_session" or name.startswith("__"):
            raise AttributeError(name)
        if name in _PAST:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: that of inner_session goes "
                "past the encryption."
            )
        if isinstance(self.inner_session, OpenAIResponsesCompactionSession):
            if name == "run_compaction":
                return self._run_compaction
            if name == "_defer_compaction":
                return self._defer_inner_compaction
        return getattr(self.inner_session, name)

    @property
    def underlying_session(self) -> Session:
        """The inner session, as the SDK names it."""
        return self.inner_session

    @property
    def storing_session(self) -> Any:
        """The session that stores what is encrypted: what compacts is passed by."""
        inner = self.inner_session
        if isinstance(inner, OpenAIResponsesCompactionSession):
            return inner.underlying_session
        return inner

    async def _run_compaction(
        self,
        args: OpenAIResponsesCompactionArgs | None = None,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> None:
        """Compact what the inner session holds, read and written in the clear."""
        _, vault = await self._sealed()
        await sdk.run_compaction(
            self.inner_session,
            args,
            wrapper=wrapper,
            read_items=self._reader(wrapper),
            prepare_items=vault.seal,
            read_snapshot=self._get_compaction_snapshot,
        )

    async def _defer_inner_compaction(
        self,
        response_id: str,
        store: bool | None = None,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> None:
        await sdk.defer_compaction(
            self.inner_session, response_id, store, read_items=self._reader(wrapper)
        )

    def _reader(self, wrapper: RunContextWrapper[Any] | None) -> Any:
        async def read(limit: int | None) -> Any:
            return await self._read_compaction_items(limit, wrapper=wrapper)

        return read

    async def _read_compaction_items(
        self, limit: int | None, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> tuple[list[TResponseInputItem], bool]:
        """Read items, and tell whether they are all that is stored.

        They aren't where one doesn't open or is hidden: it would be replaced with them.
        """
        if limit is None:
            return await self.get_items(wrapper=wrapper), False
        stored = await self._read(limit, wrapper)
        if len(stored) >= limit:
            return [], False
        shown = await self.get_items(limit, wrapper=wrapper)
        return shown, len(shown) == len(stored)

    # -- what the class that encrypts has ----------------------------------------------

    async def get_items(
        self,
        limit: int | None = None,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> list[TResponseInputItem]:
        """Return the newest `limit` items in the clear, oldest first."""
        raise NotImplementedError

    async def _read(
        self, window: int | None, wrapper: RunContextWrapper[Any] | None
    ) -> Sequence[Any]:
        raise NotImplementedError

    async def _sealed(self) -> tuple[Any, Vault]:
        raise NotImplementedError

    async def _get_compaction_snapshot(self, limit: int) -> Any:
        raise NotImplementedError
