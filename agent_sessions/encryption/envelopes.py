"""The envelopes in which items lie encrypted."""

from __future__ import annotations

import hashlib
import os
import re
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agent_sessions.items import Item

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

# The SDK's own envelopes are of version 1.
VERSION = 2
SDK_VERSION = 1
SDK_KEY_ID = "hkdf-v1"
_ID_BYTES = 12
# Of which the first say when it was made, in microseconds.
_TIME_BYTES = 7
# Microseconds by which the clocks of writers may differ.
_SKEW = 10_000_000
_last = 0
_SDK_KEYS = frozenset({"__enc__", "v", "kid", "payload"})
_KEYS = _SDK_KEYS | {"id"}
# Base64 as it is written, and in no other way: decoders skip foreign characters and
# the last bits of what is padded. Its length is a multiple of four besides.
_TOKEN = re.compile(r"[A-Za-z0-9_-]*(?:[A-Za-z0-9_-]|[AEIMQUYcgkosw048]=|[AQgw]==)")

_ID = re.compile(f"[0-9a-f]{{{2 * _ID_BYTES}}}")


def is_envelope(item: Any) -> bool:
    """Return whether an item has the form of an envelope, ours or one of the SDK's.

    There is one form: no further keys, and numbers that are whole numbers.
    """
    return (
        isinstance(item, dict)
        and item.get("__enc__") == 1
        and item.keys() in (_KEYS, _SDK_KEYS)
        and isinstance(item["kid"], str)
        and isinstance(item["payload"], str)
        # No other numbers that equal these.
        and type(item["__enc__"]) is type(item["v"]) is int
    )


def new_ids(count: int) -> list[str]:
    """Make the ids of a batch's envelopes: they rise, and begin with the time."""
    global _last
    # Threads at the same microsecond differ in what is random.
    first = max(time.time_ns() // 1_000, _last + 1)
    _last = first + count - 1
    return [_id(first + n, os.urandom(_ID_BYTES - _TIME_BYTES)) for n in range(count)]


def id_of(envelope: Any) -> str:
    """Return an envelope's id, "" where it has none; nothing says that it opens.

    The SDK's get one that is always the same.
    """
    if not is_envelope(envelope):
        return ""
    if envelope["v"] != SDK_VERSION:
        found = envelope.get("id")
        return found if isinstance(found, str) and _ID.fullmatch(found) else ""
    token = envelope["payload"]
    if not _is_token(token):
        return ""
    digest = hashlib.sha256(token.encode()).digest()
    made = min(_written(token) * 1_000_000, 2 ** (8 * _TIME_BYTES) - 1)
    return _id(made, digest[: _ID_BYTES - _TIME_BYTES])


def ids_of(found: Iterable[Any]) -> list[str]:
    """Return the ids of the envelopes among what was found."""
    return [each for each in map(id_of, found) if each]


def may_have_copies(ids: list[str]) -> bool:
    """Return whether copies may be in a stretch of a history, with originals before it.

    Ids rise, but for writers side by side: one that is lower than one before it may be
    that of a copy. Its original would be in sight too if the stretch began well before
    the time in its id.
    """
    if sorted(ids) == ids:
        return False
    highest = lowest = ""
    for each in ids:
        if each >= highest:
            highest = each
        elif not lowest or each < lowest:
            lowest = each
    return bool(lowest) and _time(ids[0]) + _SKEW > _time(lowest)


def seal(
    cipher: Fernet, key_id: str, envelope_id: str, data: bytes, written: int
) -> Item:
    """Put an item's text into an envelope; `written` in Unix seconds.

    Under another key it keeps its id and time.
    """
    token = cipher.encrypt_at_time(bytes.fromhex(envelope_id) + data, written)
    return {
        "__enc__": 1,
        "v": VERSION,
        "kid": key_id,
        "id": envelope_id,
        "payload": token.decode(),
    }


def unseal(cipher: Fernet, envelope: Item) -> tuple[bytes, int] | None:
    """Return the text and the time of writing (Unix seconds) of an envelope.

    Return None if another cipher made it, or the text is another envelope's.
    """
    found = unseal_token(cipher, envelope["payload"])
    if found is None:
        return None
    data, written = found
    if data[:_ID_BYTES].hex() != envelope.get("id"):
        return None
    return data[_ID_BYTES:], written


def unseal_token(cipher: Fernet, token: str) -> tuple[bytes, int] | None:
    """Open a Fernet token, whatever it holds.

    Its time is read from the bytes that were authenticated: Fernet.decrypt() doesn't
    tell it, and Fernet.extract_timestamp() would authenticate them once more.
    """
    from cryptography.fernet import InvalidToken

    if not _is_token(token):
        return None
    try:
        data = cipher.decrypt(token)
    except (InvalidToken, ValueError):
        return None
    return data, _written(token)


def _is_token(token: str) -> bool:
    return len(token) % 4 == 0 and _TOKEN.fullmatch(token) is not None


def _written(token: str) -> int:
    # One byte of version, eight of time. Nothing is skipped in what is canonical.
    return int.from_bytes(urlsafe_b64decode(token[:12])[1:9], "big")


def _id(microseconds: int, tail: bytes) -> str:
    return (microseconds.to_bytes(_TIME_BYTES, "big") + tail).hex()


def _time(envelope_id: str) -> int:
    return int(envelope_id[: 2 * _TIME_BYTES], 16)
