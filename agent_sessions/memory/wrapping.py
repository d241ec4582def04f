"""What encrypted sessions have of the SDK's: arguments, and the compaction hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypedDict

from agent_sessions.encryption import Vault
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agents.items import TResponseInputItem
    from agents.memory import Session, SessionABC

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


def read_arguments(given: Sequence[Any], named: dict[str, Any]) -> Arguments:
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


class SealedCompaction:
    """The SDK's compaction hooks over a store that keeps envelopes.

    Without the store's own hooks the SDK reads, clears and adds; that goes through
    the session, and is encrypted too. memory/django.py tells what the hooks are.
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


def has_methods_of(base: type[SessionABC], session: SessionABC) -> bool:
    """Return whether no subclass of `base` changes items on their way in or out."""
    kind = type(session)
    return kind.get_items is base.get_items and kind.add_items is base.add_items


def takes_wrapper(session: Any) -> bool:
    """Return whether all four methods of a session take the run's context."""
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for name in _METHODS:
        parameters = inspect.signature(getattr(session, name)).parameters
        if "wrapper" not in parameters or parameters["wrapper"].kind not in kinds:
            return False
    return True
