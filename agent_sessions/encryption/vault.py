"""One session's items, on their way in and out of their envelopes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agent_sessions.encryption.cache import Memory
from agent_sessions.encryption.envelopes import (
    SDK_KEY_ID,
    SDK_VERSION,
    VERSION,
    id_of,
    is_envelope,
    new_ids,
    seal,
    unseal,
    unseal_token,
)
from agent_sessions.encryption.keys import KeyRing, MasterKey, read_sdk_key, session_key
from agent_sessions.exceptions import (
    EncryptionError,
    UnacceptedEnvelope,
    UnknownEncryptionKey,
)
from agent_sessions.items import Item, decode, decode_all, encode_texts
from agent_sessions.items.kinds import opens_turn

if TYPE_CHECKING:
    from cryptography.fernet import Fernet


class Opened(NamedTuple):
    """What was in an envelope, when it was written (Unix seconds), and its id."""

    item: Item
    written: int
    envelope_id: str

    @property
    def begins_turn(self) -> bool:
        """Return whether a turn's lifetime begins here.

        It does with a user's message, and with what stands for turns that were
        compacted: else it would prolong the one before it.
        """
        return opens_turn(self.item) or self.item.get("type") == "compaction"


class Vault:
    """What the keys of one session open and close.

    `context` says which session it is, and `lifetime` for how many seconds a turn is
    shown. `assert_writable` raises where it may not write any more. Its errors name key
    ids, and nothing of the contents.

    It lives for one operation: the keys that it derives go with it.
    """

    # Whether envelopes of the SDK's open, which are bound to the session id alone.
    accepts_sdk_envelopes = False

    def __init__(
        self,
        ring: KeyRing,
        context: bytes,
        session_id: str,
        *,
        lifetime: float | None = None,
        memory: Memory | None = None,
        assert_writable: Callable[[], None] | None = None,
    ) -> None:
        self.ring = ring
        self.context = context
        self.session_id = session_id
        self.lifetime = lifetime
        self._assert_writable = assert_writable
        self._memory = Memory(0) if memory is None else memory
        self._ciphers: dict[str, Fernet] = {}

    def __repr__(self) -> str:
        return f"<Vault {self.session_id!r}>"

    # -- in ------------------------------------------------------------------------

    def seal(self, items: Sequence[Any]) -> list[Item]:
        """Put items into envelopes. Raises InvalidItem, which names the first bad one."""
        return self.seal_encoded(encode_texts(items))

    def seal_encoded(self, items: Sequence[str]) -> list[Item]:
        """Put items that are JSON already into envelopes."""
        key = self._first()
        cipher = self._cipher(key)
        texts = [text.encode() for text in items]
        now = int(time.time())
        envelopes = [
            seal(cipher, key.id, envelope_id, text, now)
            for envelope_id, text in zip(new_ids(len(texts)), texts, strict=True)
        ]
        # The next turn reads them.
        for envelope, text in zip(envelopes, texts, strict=True):
            self._memory.keep(self.context, envelope, text, now)
        return envelopes

    def reseal(self, envelope: Any) -> Item | None:
        """Put an envelope's item under the first key; its id and its time stay.

        None where that is done already, or where the envelope doesn't open. Raises
        UnknownEncryptionKey.
        """
        first = self.ring.first
        if not is_envelope(envelope):
            return None
        if envelope["v"] == VERSION and envelope["kid"] == first.id:
            return None
        found = self._unseal(envelope)
        if found is None or decode(found[0]) is None:
            return None
        return seal(self._cipher(self._first()), first.id, id_of(envelope), *found)

    # -- out -----------------------------------------------------------------------

    def open(self, envelope: Any) -> Opened | None:
        """Return the item of an envelope.

        Return None if there is no envelope, or it doesn't open although its key is known:
        it was changed, or is another session's. Raises UnknownEncryptionKey.
        """
        return self.open_each((envelope,))[0]

    def open_each(self, envelopes: Sequence[Any]) -> list[Opened | None]:
        """Open what one read found, oldest first.

        The second time that an envelope comes it doesn't open: it is a copy.
        """
        find, context, ring = self._memory.find, self.context, self.ring
        known = [find(context, each, ring) for each in envelopes]
        # All at once, which is faster. What was kept has been read before.
        items = iter(decode_all([each.text for each in known if each is not None]))
        opened = [
            self._open(envelope)
            if each is None
            else Opened(next(items), each.written, envelope["id"])
            for envelope, each in zip(envelopes, known, strict=True)
        ]
        if len({one.envelope_id for one in opened if one is not None}) == len(opened):
            return opened
        seen: set[str] = set()
        for index, one in enumerate(opened):
            if one is not None:
                if one.envelope_id in seen:
                    opened[index] = None
                seen.add(one.envelope_id)
        return opened

    def copies(self, stored: Any, found: Iterable[Any]) -> int:
        """Return how often one envelope is among what was found. Raises as open() does.

        Only its own like is opened.
        """
        wanted = id_of(stored)
        return sum(
            id_of(other) == wanted and self.open(other) is not None
            for other in found
            if wanted
        )

    def _open(self, envelope: Any) -> Opened | None:
        if not is_envelope(envelope) or (found := self._unseal(envelope)) is None:
            return None
        if (item := decode(found[0])) is None:
            return None
        if envelope["v"] != VERSION:
            return Opened(item, found[1], id_of(envelope))
        self._memory.keep(self.context, envelope, *found)
        return Opened(item, found[1], envelope["id"])

    def is_over(self, opened: Opened) -> bool:
        """Return whether an item's time is over. A turn's is its newest item's."""
        if self.lifetime is None:
            return False
        return opened.written < time.time() - self.lifetime

    def count_hidden(
        self, opened: Sequence[Opened | None], *, goes_on: bool = False
    ) -> int:
        """Return how many of the oldest are hidden: whole turns, by their newest item.

        `goes_on` says that the last turn has a newer item, whose time isn't over.
        """
        ends_turn = not goes_on
        for index in range(len(opened) - 1, -1, -1):
            each = opened[index]
            if each is None:
                continue
            if ends_turn and self.is_over(each):
                return index + 1
            ends_turn = each.begins_turn
        return 0

    def seal_text(self, text: str) -> str:
        return json.dumps(self.seal([{"text": text}])[0])

    def open_text(self, text: str) -> str:
        envelope = decode(text) or {}
        # The SDK's envelopes hold items, and are bound to a session's id alone.
        opened = None if envelope.get("v") == SDK_VERSION else self.open(envelope)
        if opened is None:
            raise EncryptionError(
                f"A text of session {self.session_id!r} doesn't open: it was changed, "
                "or was written for another session or without encryption."
            )
        return str(opened.item.get("text", ""))

    def drop(self, opened: Opened) -> None:
        """Forget an item: it was removed."""
        self._memory.drop(self.context, opened.envelope_id)

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

    def _unseal_sdk(self, envelope: Item) -> tuple[bytes, int] | None:
        """Open an envelope of the SDK's, which doesn't say which key it needs."""
        if envelope["kid"] != SDK_KEY_ID or "id" in envelope:
            return None
        if not self.accepts_sdk_envelopes:
            raise UnacceptedEnvelope(self.session_id, envelope["kid"])
        for key in self.ring:
            cipher = read_sdk_key(key, self.session_id)
            if (found := unseal_token(cipher, envelope["payload"])) is not None:
                return found
        # Changed or of another key: nothing tells, so nothing is passed over.
        raise UnknownEncryptionKey(self.session_id, envelope["kid"], self.ring.ids)

    def _first(self) -> MasterKey:
        """Return the key to write with. Raises EncryptionError without the right to."""
        if self._assert_writable is not None:
            self._assert_writable()
        return self.ring.first

    def _cipher(self, key: MasterKey) -> Fernet:
        cipher = self._ciphers.get(key.id)
        if cipher is None:
            cipher = self._ciphers[key.id] = session_key(key, self.context)
        return cipher
