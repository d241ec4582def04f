"""What is asked of the wrapped backend about one session, with the keys at hand."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, cast

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.encryption import Reading, Vault
from agent_sessions.encryption.vault import Taking
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import Item

if TYPE_CHECKING:
    from agent_sessions.backends.keys import PopsIf

logger = logging.getLogger("agent_sessions.backends")

# More envelopes than this are opened in a thread, so that the loop goes on meanwhile.
_MANY = 100


def read(
    inner: BaseSessionBackend, vault: Vault, key: SessionKey, limit: int | None
) -> list[Item]:
    """Read the newest `limit` items that open. Raises EncryptionError."""
    reading = Reading(vault, limit)
    known = _known(inner, vault)
    while not reading.feed(inner.latest(key, reading.window, **known)):
        pass
    return _told(inner, reading)


async def aread(
    inner: BaseSessionBackend, vault: Vault, key: SessionKey, limit: int | None
) -> list[Item]:
    """See read()."""
    reading = Reading(vault, limit)
    known = _known(inner, vault)
    is_done = False
    while not is_done:
        found = await inner.alatest(key, reading.window, **known)
        if len(found) > _MANY:
            is_done = await asyncio.to_thread(reading.feed, found)
        else:
            is_done = reading.feed(found)
    return _told(inner, reading)


def pop(inner: BaseSessionBackend, vault: Vault, key: SessionKey) -> Item | None:
    """Remove and return the newest item. Raises EncryptionError; it then stays."""
    taking = Taking(vault)
    while not taking.look(inner.latest(key, taking.window)):
        pass
    if inner.supports_pop_if:
        return taking.end(cast("PopsIf", inner).pop_if(key, taking.begin))
    if not taking.may_take():
        return None
    taken = inner.pop(key)
    try:
        return taking.end(taken)
    except EncryptionError:
        # Somebody was faster, with a key that isn't ours.
        inner.append(key, taking.back(taken))
        raise


async def apop(inner: BaseSessionBackend, vault: Vault, key: SessionKey) -> Item | None:
    """See pop()."""
    taking = Taking(vault)
    while not taking.look(await inner.alatest(key, taking.window)):
        pass
    if inner.supports_pop_if:
        store = cast("PopsIf", inner)
        return taking.end(await store.apop_if(key, taking.begin))
    if not taking.may_take():
        return None
    taken = await inner.apop(key)
    try:
        return taking.end(taken)
    except EncryptionError:
        await inner.aappend(key, taking.back(taken))
        raise


def look(vault: Vault, stored: list[Item]) -> None:
    """Look at items before they are cleared. Raises UnknownEncryptionKey."""
    for each in stored:
        vault.open(each)


async def alook(vault: Vault, stored: list[Item]) -> None:
    """See look()."""
    look(vault, stored)


def _known(inner: BaseSessionBackend, vault: Vault) -> dict[str, Any]:
    """Return what spares a store the reading of rows that the vault knows."""
    return {"decode": vault.decode} if inner.takes_decoder else {}


def _told(inner: BaseSessionBackend, reading: Reading) -> list[Item]:
    if reading.passed_over:
        # The wrapped backend bears the alias of the one that wraps it.
        logger.warning(
            "%d rows of a session in %r don't open and were passed over",
            reading.passed_over,
            inner.alias,
        )
    return reading.items
