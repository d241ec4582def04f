"""One session's items, on their way in and out of their envelopes."""

from __future__ import annotations

import json
import marshal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agent_sessions.encryption.carriers import AS_IS, Carrier
from agent_sessions.encryption.envelopes import (
    SDK_VERSION,
    VERSION,
    is_envelope,
    new_id,
    reseal,
    seal,
    unseal,
    unseal_token,
)
from agent_sessions.encryption.keys import (
    KeyRing,
    MasterKey,
    read_sdk_key,
    session_key,
)
from agent_sessions.encryption.memory import Known, Memory
from agent_sessions.exceptions import EncryptionError, UnknownEncryptionKey
from agent_sessions.items import Item, decode, encode_texts

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

    from agent_sessions.encryption.permit import Permit


class Opened(NamedTuple):
    """What was in an envelope, and when it was written, in Unix seconds."""

    item: Item
    written: int

    @property
    def begins_turn(self) -> bool:
        """Tell whether a turn's lifetime begins here.

        It does with a user's message, and with what stands for turns that were
        compacted: else it would prolong the one before it.
        """
        kind = self.item.get("type", "message")
        return kind == "compaction" or (
            kind == "message" and self.item.get("role") == "user"
        )


class Vault:
    """What the keys of one session open and close.

    `context` says which session it is, `lifetime` for how many seconds a turn is shown
    and `carrier` how envelopes lie in the store: what is given and taken here is what
    is stored. With a `permit` it writes while that is valid. Its errors name key ids,
    and nothing of the contents.
    """

    def __init__(
        self,
        ring: KeyRing,
        context: bytes,
        session_id: str,
        *,
        lifetime: float | None = None,
        memory: Memory | None = None,
        carrier: Carrier = AS_IS,
        permit: Permit | None = None,
    ) -> None:
        self.ring = ring
        self.context = context
        self.session_id = session_id
        self.lifetime = lifetime
        self.carrier = carrier
        self._permit = permit
        self._memory = Memory(0) if memory is None else memory
        remembered = self._memory.of(context)
        self._ciphers, self._known = remembered.ciphers, remembered.opened

    def __repr__(self) -> str:
        return f"<Vault {self.session_id!r}>"

    # -- in ------------------------------------------------------------------------

    def seal(self, items: Sequence[Any]) -> list[Item]:
        """Put items into envelopes. Raises InvalidItem, which names the first bad one."""
        key = self._first()
        cipher = self._cipher(key)
        texts = [text.encode() for text in encode_texts(items)]
        now = int(time.time())
        envelopes = [seal(cipher, key.id, text, now) for text in texts]
        if self._memory.max_bytes:
            # The next turn reads them.
            for envelope, text in zip(envelopes, texts, strict=True):
                self._keep(envelope, decode(text) or {}, now)
        return [self.carrier.load(envelope) for envelope in envelopes]

    def reseal(self, stored: Any) -> Item | None:
        """Put an envelope's item under the first key; its id and its time stay.

        None where that is done already, or where the envelope doesn't open. Raises
        UnknownEncryptionKey.
        """
        first, envelope = self.ring.first, self.carrier.unload(stored)
        if not is_envelope(envelope):
            return None
        if envelope["v"] == VERSION and envelope["kid"] == first.id:
            return None
        found = self._unseal(envelope)
        if found is None or decode(found[0]) is None:
            return None
        # The SDK's have no id.
        envelope_id = envelope["id"] if envelope["v"] == VERSION else new_id()
        new = reseal(self._cipher(self._first()), first.id, envelope_id, *found)
        return self.carrier.load(new)

    # -- out -----------------------------------------------------------------------

    def open(self, stored: Any) -> Opened | None:
        """Take an item out of its envelope.

        None where there is no envelope, or it doesn't open although its key is known:
        it was changed, or is another session's. Raises UnknownEncryptionKey.
        """
        envelope = self.carrier.unload(stored)
        envelope_id = envelope.get("id") if isinstance(envelope, dict) else None
        if isinstance(envelope_id, str):
            known = self._known.get(envelope_id)
            # To the last letter: what is the same was found authentic before.
            if (
                known is not None
                and known.envelope == envelope
                and envelope["kid"] in self.ring
            ):
                return Opened(marshal.loads(known.packed), known.written)  # noqa: S302
        if not is_envelope(envelope):
            return None
        found = self._unseal(envelope)
        item = None if found is None else decode(found[0])
        if found is None or item is None:
            return None
        if isinstance(envelope_id, str) and envelope["v"] == VERSION:
            self._keep(envelope, item, found[1])
        return Opened(item, found[1])

    def is_over(self, opened: Opened) -> bool:
        """Tell whether an item's time is over. A turn's is its newest item's."""
        if self.lifetime is None:
            return False
        return opened.written < time.time() - self.lifetime

    def unexpired(self, opened: Sequence[Opened]) -> list[Opened]:
        """Leave out the turns whose newest item's time is over: all of each turn."""
        if self.lifetime is None:
            return list(opened)
        ends_turn = True
        for index in range(len(opened) - 1, -1, -1):
            if ends_turn and self.is_over(opened[index]):
                return list(opened[index + 1 :])
            ends_turn = opened[index].begins_turn
        return list(opened)

    def seal_text(self, text: str) -> str:
        """Put a text into an envelope, for a column of its own."""
        return json.dumps(self.seal([{"text": text}])[0])

    def open_text(self, text: str) -> str:
        """Take a text out again. Raises EncryptionError."""
        opened = self.open(decode(text))
        if opened is None:
            raise EncryptionError(
                f"A text of session {self.session_id!r} doesn't open: it was changed, "
                "or was written for another session or without encryption."
            )
        return str(opened.item.get("text", ""))

    def forget(self) -> None:
        """Forget what is remembered of the session: it was cleared."""
        self._memory.forget(self.context)

    # -- keys ----------------------------------------------------------------------

    def _unseal(self, envelope: Item) -> tuple[bytes, int] | None:
        version, key_id = envelope["v"], envelope["kid"]
        if version == SDK_VERSION:
            return self._unseal_sdk(envelope)
        if version != VERSION:
            raise EncryptionError(
                f"An item of session {self.session_id!r} is encrypted in version "
                f"{version} of the envelope, under key {key_id!r}. Update "
                "django-agent-sessions; nothing was changed."
            )
        key = self.ring.get(key_id)
        if key is None:
            raise UnknownEncryptionKey(self.session_id, key_id, self.ring.ids)
        return unseal(self._cipher(key), envelope)

    def _unseal_sdk(self, envelope: Item) -> tuple[bytes, int]:
        """Open an envelope of the SDK's, which doesn't say which key it needs."""
        for key in self.ring:
            name = f"sdk {key.id}"
            cipher = self._ciphers.get(name)
            if cipher is None:
                cipher = self._ciphers[name] = read_sdk_key(key, self.session_id)
            if (found := unseal_token(cipher, envelope["payload"])) is not None:
                return found
        # Changed or of another key: nothing tells, so nothing is passed over.
        raise UnknownEncryptionKey(self.session_id, envelope["kid"], self.ring.ids)

    def _keep(self, envelope: Item, item: Item, written: int) -> None:
        # Unpacked faster than JSON is read, and into fresh objects each time.
        known = Known(envelope, marshal.dumps(item), written)
        self._memory.keep(self.context, envelope["id"], known)

    def _first(self) -> MasterKey:
        """Give the key to write with. Raises EncryptionError without the right to."""
        if self._permit is not None:
            self._permit.assert_valid()
        return self.ring.first

    def _cipher(self, key: MasterKey) -> Fernet:
        cipher = self._ciphers.get(key.id)
        if cipher is None:
            cipher = self._ciphers[key.id] = session_key(key, self.context)
        return cipher


class Reading:
    """A read of the newest `limit` items, whichever way the store is asked.

    Ask it for the newest `window` items (None: all) and feed them, until done.
    """

    def __init__(self, vault: Vault, limit: int | None) -> None:
        self.window = limit
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
        opened = [self._vault.open(envelope) for envelope in found]
        readable = [each for each in opened if each is not None]
        shown = self._vault.unexpired(readable)
        self.passed_over = len(found) - len(readable)
        whole = self.window is None or len(found) < self.window
        # What comes before an expired turn has expired too.
        whole = whole or len(shown) < len(readable)
        if self._limit is not None and len(shown) < self._limit and not whole:
            # Rows that don't open don't count: look further back.
            self.window = 2 * (self.window or 1)
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
    """A pop that removes nothing that it can't open."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._passed_over = 0

    def accepts(self, envelope: Item) -> bool:
        """Tell whether this is the item to take, asked from the newest back.

        Raises UnknownEncryptionKey, which must leave everything as it is.
        """
        opened = self._vault.open(envelope)
        if opened is None:
            self._passed_over += 1
        return opened is not None and not self._vault.is_over(opened)

    def may_take(self, newest: Sequence[Item]) -> bool:
        """Tell whether a store may pop that can't be told which item to take.

        Raises EncryptionError where its newest item doesn't open.
        """
        if not newest:
            return False
        accepted = self.accepts(newest[-1])
        if self._passed_over:
            raise self._closed()
        return accepted

    def end(self, taken: Item | None) -> Item | None:
        """Give what was in the envelope that was taken.

        Raises EncryptionError where it doesn't open: back() is to be put back.
        """
        opened = None if taken is None else self._vault.open(taken)
        if opened is not None:
            return opened.item
        if taken is not None or self._passed_over:
            raise self._closed()
        return None

    def back(self, taken: Item | None) -> list[Item]:
        """Give what is to be put back of what end() refused."""
        return [] if taken is None else [self._vault.carrier.again(taken)]

    def _closed(self) -> EncryptionError:
        return EncryptionError(
            f"The newest items of session {self._vault.session_id!r} don't open: they "
            "were not encrypted, were changed, or were moved here from another "
            "session, owner or alias. Nothing was removed."
        )
