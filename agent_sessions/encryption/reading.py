"""A read of one session's items, of which not all may open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent_sessions.encryption.envelopes import may_have_copies
from agent_sessions.encryption.vault import Vault
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import Item

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
        shown = self._vault.unexpired(readable)
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
