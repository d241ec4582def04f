"""Read and pop one session's items, of which not all may open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agent_sessions.encryption.envelopes import may_have_copies
from agent_sessions.encryption.vault import Vault
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import Item

# Items among which a pop looks for copies, at first.
_RECENT = 32
# A limit of the SDK's that means everything.
_ALL = 2**31 - 1


class Reading:
    """A read of the newest `limit` items, whichever way the store is asked.

    Ask it for the newest `window` items (None: all) and feed them, until done. That is
    one more than are wanted, after which the first must come in its time.
    """

    def __init__(self, vault: Vault, limit: int | None) -> None:
        self.window = limit if limit is None or limit >= _ALL else limit + 1
        self.items: list[Item] = []
        # How many rows didn't open.
        self.passed_over = 0
        self._vault = vault
        self._limit = limit

    def feed(self, found: Sequence[Any]) -> bool:
        """Take what the store has; tell whether that was enough.

        Raises UnknownEncryptionKey, and EncryptionError where nothing opens: that must
        not look like an empty history.
        """
        opened = self._vault.open_each(found)
        readable = [each for each in opened if each is not None]
        shown = readable[self._vault.count_hidden(readable) :]
        self.passed_over = len(found) - len(readable)
        if self.window is not None and len(found) >= self.window:
            # What comes before an expired turn has expired too.
            is_enough = len(shown) < len(readable) or len(shown) >= (self._limit or 0)
            ids = [each.envelope_id for each in readable]
            if not is_enough or may_have_copies(ids):
                # Rows that don't open don't count, and copies are to be known.
                self.window *= 2
                return False
        if found and not readable:
            raise EncryptionError(
                f"None of the {len(found)} items of session "
                f"{self._vault.session_id!r} opens: they were not encrypted, were "
                "changed, or were moved here from another session, owner or alias. "
                "Nothing was changed."
            )
        newest = shown if self._limit is None else shown[-self._limit :]
        self.items = [each.item for each in newest]
        return True


class Taking:
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
        """Take what the store has; tell whether that was enough to tell copies."""
        self._recent = found
        if len(found) < self.window or not self._vault.may_have_copies(found):
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
        """Return what was in the envelope that was taken.

        Raises EncryptionError where it doesn't open: back() is to be put back.
        """
        opened = None if taken is None else self._vault.open(taken)
        if opened is not None:
            self._vault.drop(opened)
            return opened.item
        if taken is not None or self._passed_over:
            raise self._closed()
        return None

    def back(self, taken: Item | None) -> list[Item]:
        """Return what is to be put back of what end() refused."""
        return [] if taken is None else [self._vault.carrier.again(taken)]

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
