"""The names of a session's keys, all of them in one slot of a cluster.

Items lie where the SDK's RedisSession keeps them, so that its histories open and it
can read ours: `<prefix>:<id>:messages`. Whatever else is kept of a session lies beside
it, in keys whose hash tag puts them into the same slot. Names of owned sessions hold
the alias and the owner, and can't be the name of a session without one. Those of a
backend that another one wraps hold that one's alias, also without an owner.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any
from urllib.parse import quote

SLOTS = 16_384
ITEMS = ":messages"
OWNED = "-of:"
WRAPPED = "-in:"
_BESIDE = (b":notes", b":times", b":calls", b":answers")


@dataclass(frozen=True)
class Names:
    """The keys of one session. `prefix` is the SDK's `key_prefix`."""

    prefix: str
    session_id: str
    alias: str = ""
    user_id: Any = None
    # The alias that wraps the backend, and a mark of the directory's database.
    namespace: str = ""

    @cached_property
    def stem(self) -> str:
        """What the key of the items begins with."""
        if self.user_id is None:
            return f"{unowned(self.prefix, self.namespace)}:{self.session_id}"
        # Quoted, so that neither an alias nor a text key runs into what follows.
        alias, user = quote(self.alias, safe=""), quote(str(self.user_id), safe="")
        return f"{self.prefix}{OWNED}{alias}:{user}:{self.session_id}"

    @cached_property
    def items(self) -> bytes:
        """The list with the items, as JSON texts."""
        return f"{self.stem}{ITEMS}".encode()

    @cached_property
    def keys(self) -> tuple[bytes, ...]:
        """The keys that scripts take: items, notes, times, calls and answers."""
        return self.items, *_beside(self.items)

    @property
    def sdk_keys(self) -> tuple[bytes, ...]:
        """What the SDK keeps of a session beside its items; in slots of their own."""
        if self.user_id is not None or self.namespace:
            return ()
        return self.stem.encode(), f"{self.stem}:counter".encode()


def unowned(prefix: str, namespace: str) -> str:
    """Return what the names of sessions without an owner begin with."""
    return f"{prefix}{WRAPPED}{quote(namespace, safe='')}" if namespace else prefix


def pattern(prefix: str) -> bytes:
    """Return the SCAN pattern of all sessions whose names begin so."""
    escaped = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in prefix)
    return f"{escaped}:*{ITEMS}".encode()


def id_of(prefix: str, name: bytes) -> str | None:
    """Return whose items lie under a name; None where it is no session's."""
    head, tail = f"{prefix}:".encode(), ITEMS.encode()
    if not (name.startswith(head) and name.endswith(tail)):
        return None
    try:
        return name[len(head) : -len(tail)].decode() or None
    except UnicodeDecodeError:
        return None


def hash_tag(name: bytes) -> bytes | None:
    """Return the part of a name that a cluster hashes; None where it hashes all."""
    start = name.find(b"{")
    end = name.find(b"}", start + 1)
    return name[start + 1 : end] if 0 <= start < end - 1 else None


def slot_of(name: bytes) -> int:
    """Return the slot of a cluster that a name belongs to."""
    tag = hash_tag(name)
    return binascii.crc_hqx(name if tag is None else tag, 0) % SLOTS


@lru_cache(maxsize=1024)
def _beside(items: bytes) -> tuple[bytes, ...]:
    """Return the names of the other keys; they begin as that of the items does.

    So a rule of the server for the prefix, such as an ACL, is a rule for all of them.
    """
    if hash_tag(items) is not None:
        # The first tag is the one that counts.
        return tuple(items + suffix for suffix in _BESIDE)
    if b"{" not in items and b"}" not in items:
        # Without a tag the whole name is hashed: so is this one's tag.
        return tuple(items + b":{" + items + b"}" + suffix for suffix in _BESIDE)
    slot = slot_of(items)
    return tuple(_numbered(items + suffix + b":", slot) for suffix in _BESIDE)


def _numbered(name: bytes, slot: int) -> bytes:
    """Return a name that is hashed as a whole, with a number that fits the slot."""
    begun = binascii.crc_hqx(name, 0)
    numbers = (b"%d" % number for number in count())
    return name + next(n for n in numbers if binascii.crc_hqx(n, begun) % SLOTS == slot)
