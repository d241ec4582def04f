"""Read and pop one session's items, of which not all may open.

reading(), popping() and looking() are generators. Each yields what it asks of a store, as
a tuple of a method's name and arguments, and is sent the answer. drive() and adrive() ask
for them, whichever way the store is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

from agent_sessions.encryption.envelopes import ids_of, may_have_copies
from agent_sessions.encryption.vault import Vault
from agent_sessions.exceptions import EncryptionError, ScanLimitReached
from agent_sessions.items import Item

T = TypeVar("T")
Steps = Generator[Any, Any, T]

# Items among which a pop looks for copies, at first.
_RECENT = 32
# A limit of the SDK's that means everything.
_ALL = 2**31 - 1
# More envelopes than this are opened in a thread, so that the loop goes on meanwhile.
_MANY = 100


def drive(steps: Steps[T], ask: Callable[[Any], Any]) -> T:
    """Answer what a generator asks until it returns."""
    is_done, value = _step(steps, None)
    while not is_done:
        is_done, value = _step(steps, ask(value))
    result: T = value
    return result


async def adrive(steps: Steps[T], ask: Callable[[Any], Awaitable[Any]]) -> T:
    is_done, value = _step(steps, None)
    while not is_done:
        answer = await ask(value)
        if isinstance(answer, Sequence) and len(answer) > _MANY:
            is_done, value = await asyncio.to_thread(_step, steps, answer)
        else:
            is_done, value = _step(steps, answer)
    result: T = value
    return result


def _step(steps: Steps[Any], answer: Any) -> tuple[bool, Any]:
    """Send an answer. Return whether that was the last one, and what came back."""
    try:
        return False, steps.send(answer)
    except StopIteration as exc:
        return True, exc.value


class Readable(NamedTuple):
    """What was read of a history: its items, and how many rows didn't open."""

    items: list[Item]
    passed_over: int


def reading(
    vault: Vault, limit: int | None, budget: int | None = None
) -> Steps[Readable]:
    """Read the newest `limit` items, and no more than `budget` stored ones.

    It looks at one more than are wanted, after which the first must come in its time.
    Raises UnknownEncryptionKey, ScanLimitReached, and EncryptionError where nothing
    opens: that must not look like an empty history.
    """
    window = limit
    if budget is None and limit is not None and 0 < limit < _ALL:
        window = limit + 1
    while True:
        if budget is not None:
            # No more than is wanted, as in the SDK.
            window = budget if window is None else min(window, budget)
        found = yield "latest", window
        is_whole = window is None or len(found) < window
        if budget is not None:
            budget -= len(found)
            if limit is None and not is_whole:
                raise ScanLimitReached
        opened = vault.open_each(found)
        readable = [each for each in opened if each is not None]
        shown = readable[vault.count_hidden(readable) :]
        # What comes before an expired turn has expired too.
        is_enough = len(shown) < len(readable) or len(shown) >= (limit or 0)
        ids = [each.envelope_id for each in readable]
        if window is None or is_whole or (is_enough and not may_have_copies(ids)):
            break
        if budget is not None and budget <= window:
            raise ScanLimitReached
        # Rows that don't open don't count, and copies are to be known.
        window *= 2
    if found and not readable:
        raise EncryptionError(
            f"None of the {len(found)} items of session {vault.session_id!r} opens: "
            "they were not encrypted, were changed, or were moved here from another "
            "session, owner or alias. Nothing was changed."
        )
    newest = shown if limit is None else shown[-limit:]
    return Readable([each.item for each in newest], len(found) - len(readable))


def popping(vault: Vault, in_one_step: bool) -> Steps[Item | None]:
    """Remove and return the newest item, of a store that pops `in_one_step` if it can.

    Raises EncryptionError where the item doesn't open; it then stays.
    """
    guard = PopGuard(vault)
    while not guard.look((yield "latest", guard.window)):
        pass
    if in_one_step:
        return guard.end((yield "pop_if", guard.begin))
    if not guard.may_take():
        return None
    taken = yield ("pop",)
    try:
        return guard.end(taken)
    except EncryptionError:
        # Somebody was faster, with a key that isn't ours.
        if taken is not None:
            yield "append", [taken]
        raise


def looking(vault: Vault) -> Steps[None]:
    """Read the newest item. Raises UnknownEncryptionKey if its key isn't there."""
    vault.open_each((yield "latest", 1))


class PopGuard:
    """A pop that removes nothing that it can't open, and no copy as if it were new.

    Let it look at the newest `window` items first, until that is enough.
    """

    def __init__(self, vault: Vault) -> None:
        self.window = _RECENT
        self._vault = vault
        self._recent: Sequence[Any] = ()
        self._passed_over = 0
        # How many copies of an envelope were passed over, by its id.
        self._copies: dict[str, int] = {}

    def look(self, found: Sequence[Any]) -> bool:
        """Look at what the store has; return whether that was enough to find copies."""
        self._recent = found
        if len(found) < self.window or not may_have_copies(ids_of(found)):
            return True
        self.window *= 2
        return False

    def begin(self) -> Callable[[Any], bool]:
        """Return what a store asks of its items; it begins anew where others pop too."""
        self._passed_over = 0
        self._copies.clear()
        return self.accepts

    def accepts(self, stored: Any) -> bool:
        """Return whether this is the item to take, asked from the newest back.

        Raises UnknownEncryptionKey, which must leave everything as it is.
        """
        opened = self._vault.open(stored)
        if opened is None or self._is_copy(stored, opened.envelope_id):
            self._passed_over += 1
            return False
        return not self._vault.is_over(opened)

    def may_take(self) -> bool:
        """Return whether a store may pop that can't be told which item to take.

        Raises EncryptionError where its newest item doesn't open.
        """
        if not self._recent:
            return False
        accepted = self.accepts(self._recent[-1])
        if self._passed_over:
            raise self._closed()
        return accepted

    def end(self, taken: Any) -> Item | None:
        """Return what was in the envelope that was taken. Raises EncryptionError."""
        opened = None if taken is None else self._vault.open(taken)
        if opened is not None:
            self._vault.drop(opened)
            return opened.item
        if taken is not None or self._passed_over:
            raise self._closed()
        return None

    def _is_copy(self, stored: Any, envelope_id: str) -> bool:
        copies = self._vault.copies(stored, self._recent)
        passed = self._copies.get(envelope_id, 0)
        self._copies[envelope_id] = passed + 1
        return copies - passed > 1

    def _closed(self) -> EncryptionError:
        return EncryptionError(
            f"The newest items of session {self._vault.session_id!r} don't open: they "
            "were not encrypted, were changed, or were copied or moved here. Nothing "
            "was removed."
        )
