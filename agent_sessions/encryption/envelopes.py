"""The envelopes in which items lie encrypted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from agent_sessions.items import Item

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

# The SDK's own envelopes are of version 1.
VERSION = 2
SDK_VERSION = 1
_ID_BYTES = 12


def is_envelope(item: Any) -> bool:
    """Tell whether an item is an envelope, ours or one of the SDK's."""
    return (
        isinstance(item, dict)
        and item.get("__enc__") == 1
        and isinstance(item.get("kid"), str)
        and isinstance(item.get("payload"), str)
        and isinstance(item.get("v"), int)
    )


def new_id() -> str:
    """Make an envelope's id."""
    return os.urandom(_ID_BYTES).hex()


def seal(cipher: Fernet, key_id: str, data: bytes, written: int) -> Item:
    """Put an item's text into an envelope of its own; `written` in Unix seconds."""
    return reseal(cipher, key_id, new_id(), data, written)


def reseal(
    cipher: Fernet, key_id: str, envelope_id: str, data: bytes, written: int
) -> Item:
    """Put it into the same envelope under another key; its id and time stay."""
    token = cipher.encrypt_at_time(bytes.fromhex(envelope_id) + data, written)
    return {
        "__enc__": 1,
        "v": VERSION,
        "kid": key_id,
        "id": envelope_id,
        "payload": token.decode(),
    }


def unseal(cipher: Fernet, envelope: Item) -> tuple[bytes, int] | None:
    """Take the text and the time of writing (Unix seconds) out of an envelope.

    None where the cipher isn't the one that made it, or it is another envelope's.
    """
    found = unseal_token(cipher, envelope["payload"])
    if found is None:
        return None
    data, written = found
    if data[:_ID_BYTES].hex() != envelope.get("id"):
        return None
    return data[_ID_BYTES:], written


def unseal_token(cipher: Fernet, token: str) -> tuple[bytes, int] | None:
    """Open a Fernet token, whatever it holds."""
    from cryptography.fernet import InvalidToken

    try:
        data = cipher.decrypt(token)
        # Authentic by now, so that its head needn't be looked at twice.
        return data, _written(token)
    except (InvalidToken, ValueError):
        return None


def _written(token: str) -> int:
    from base64 import urlsafe_b64decode

    # One byte of version, eight of time.
    return int.from_bytes(urlsafe_b64decode(token[:12])[1:9], "big")
