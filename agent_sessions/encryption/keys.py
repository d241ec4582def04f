"""Master keys, rings of them, and what is derived from them."""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from agent_sessions.exceptions import InvalidEncryptionKey, MissingExtra
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

# What each derived key is for; one of them tells nothing about another.
_ID = b"agent_sessions.key-id.v2"
_SESSION = b"agent_sessions.session.v2\x00"
# What is sealed beside items; each kind opens in its own place only.
TEXTS = b"\x00text"
SECRETS = b"\x00secret"
# The SDK's EncryptedSession derives with these, see read_sdk_key().
_SDK_INFO = b"agents.session-store.hkdf.v1"
MIN_LENGTH = 16
GENERATE = (
    'python -c "from cryptography.fernet import Fernet; '
    'print(Fernet.generate_key().decode())"'
)


@dataclass(frozen=True, slots=True)
class MasterKey:
    """A key from which those of sessions are derived.

    `id` is drawn from the secret and tells nothing about it. `is_strong` says that it
    is 32 random bytes, as far as its shape tells, and no password.
    """

    secret: bytes = field(repr=False)
    is_strong: bool = True
    id: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hmac.digest(self.secret, _ID, "sha256")[:10]
        object.__setattr__(self, "id", base64.b32encode(digest).decode().lower())

    @classmethod
    @guarded
    def parse(cls, key: Any) -> MasterKey:
        """Read a key as Fernet.generate_key() makes it, or a long text.

        The bytes are those that the SDK's EncryptedSession takes. Raises
        InvalidEncryptionKey, also for a text that is nearly a key; it doesn't quote it.
        """
        text = _as_text(key)
        if (fault := find_fault(text)) is not None:
            raise InvalidEncryptionKey(fault)
        if text != text.strip():
            raise InvalidEncryptionKey("It has blanks or a line's end around it.")
        if len(text) < MIN_LENGTH:
            raise InvalidEncryptionKey(
                f"It is too short: {len(text)} characters of at least {MIN_LENGTH}."
                if text
                else "It is empty."
            )
        if _KEY.fullmatch(text):
            # Standard and URL-safe spelling are the same key.
            secret = base64.urlsafe_b64decode(text)
            return cls(secret, is_strong=_is_mixed(secret))
        strong = bool(_HEX.fullmatch(text)) and _is_mixed(bytes.fromhex(text))
        return cls(text.encode(), is_strong=strong)


class KeyRing:
    """Master keys: the first one writes, all of them read."""

    def __init__(self, keys: Iterable[MasterKey]) -> None:
        self._keys = {key.id: key for key in keys}
        if not self._keys:
            raise InvalidEncryptionKey("There is none.")
        self.first = next(iter(self._keys.values()))

    @classmethod
    @guarded
    def parse(cls, keys: Any) -> KeyRing:
        """Read a list of keys. Raises InvalidEncryptionKey, which names the bad one."""
        if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
            raise InvalidEncryptionKey(
                f"Keys are a list, the newest first, not a {type(keys).__name__}."
            )
        found: dict[str, MasterKey] = {}
        for number, text in enumerate(keys, 1):
            try:
                key = MasterKey.parse(text)
            except InvalidEncryptionKey as exc:
                raise InvalidEncryptionKey(f"Key {number}: {exc}") from None
            if key.id in found:
                raise InvalidEncryptionKey(f"Key {number}: It is in the list twice.")
            found[key.id] = key
        return cls(found.values())

    def __repr__(self) -> str:
        return f"<KeyRing {', '.join(self._keys)}>"

    def __iter__(self) -> Iterator[MasterKey]:
        return iter(self._keys.values())

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._keys

    @property
    def ids(self) -> list[str]:
        return list(self._keys)

    def get(self, key_id: str) -> MasterKey | None:
        return self._keys.get(key_id)

    def under(self, key: MasterKey) -> KeyRing:
        """Return a ring that writes with another key and reads with all."""
        return KeyRing([key, *self])


def session_context(name: str, owner: str | None, session_id: str) -> bytes:
    """Return the bytes that name one session: what its key is bound to."""
    return json.dumps([name, owner, session_id]).encode()


def session_key(key: MasterKey, context: bytes) -> Fernet:
    return _derive(key.secret, salt=None, info=_SESSION + context)


def read_sdk_key(key: MasterKey, session_id: str) -> Fernet:
    """Derive the key that the SDK's EncryptedSession has for a session.

    agents/extensions/memory/encrypt_session.py, 0.24.
    """
    return _derive(key.secret, salt=session_id.encode(), info=_SDK_INFO)


def require_cryptography(feature: str) -> None:
    """Raise MissingExtra unless cryptography is installed; it isn't imported here."""
    if find_spec("cryptography") is None:
        raise MissingExtra(feature, "encrypt")


def _derive(secret: bytes, *, salt: bytes | None, info: bytes) -> Fernet:
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived = HKDF(SHA256(), length=32, salt=salt, info=info).derive(secret)
    return Fernet(base64.urlsafe_b64encode(derived))


def _is_mixed(secret: bytes) -> bool:
    return len(set(secret)) >= 8


def _as_text(key: Any) -> str:
    if isinstance(key, bytes):
        try:
            return key.decode()
        except UnicodeDecodeError:
            raise InvalidEncryptionKey(
                "It is bytes that are no text; encode them with "
                "base64.urlsafe_b64encode."
            ) from None
    if not isinstance(key, str):
        raise InvalidEncryptionKey(f"It is a {type(key).__name__}, not a str.")
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise InvalidEncryptionKey("It has characters that can't be encoded.")
    return key


# -- texts that are nearly a key ------------------------------------------------------

# Such a text is no pass phrase. Taken as one it would be another key: what the right
# key has written would not open, and what is written would open with the cut text only.

_LETTER = "[A-Za-z0-9_+/-]"
_KEY = re.compile(f"{_LETTER}{{43}}=")
_HEX = re.compile("[0-9A-Fa-f]{64}")
_NEARLY_HEX = re.compile("(?<![0-9A-Fa-f])[0-9A-Fa-f]{56,72}(?![0-9A-Fa-f])")
# Letters of a text that is nearly a key: 8 too few or too many, or of 16 or 24 bytes.
_NEARLY = {22, 32, *range(35, 52)}
# How often neighbours are of another kind in random text; in words they seldom are.
_RANDOM = 0.4


def find_fault(text: str) -> str | None:
    """Return what is wrong with a text that is nearly a key; None for any other text.

    What is said doesn't quote the text.
    """
    if _KEY.fullmatch(text) or _HEX.fullmatch(text):
        return None
    if _KEY.search(text):
        return (
            "It is a key and something more, such as quotes, blanks, a line's end, a "
            "name in front of it or another key. Remove what isn't the key."
        )
    if _NEARLY_HEX.search(text):
        return (
            "It looks like 32 bytes in hexadecimal digits, but not like 64 digits and "
            "nothing else."
        )
    runs = re.findall(f"{_LETTER}+", text)
    nearly = [max(runs, key=len, default=""), "".join(runs)]
    if _KEY.fullmatch(f"{text}=") or any(
        len(each) in _NEARLY and _is_random(each) for each in nearly
    ):
        return (
            "It looks like a key that was cut or changed: a key has 43 characters of "
            "base64 and an equals sign ('=') at its end."
        )
    return None


def _is_random(text: str) -> bool:
    """Return whether a text looks random: letters of both cases and digits, mixed."""
    kinds = [
        "a" if each.islower() else "A" if each.isupper() else "0" * each.isdigit()
        for each in text
    ]
    changes = sum(one != other for one, other in pairwise(kinds))
    return {"a", "A", "0"} <= set(kinds) and changes >= _RANDOM * (len(kinds) - 1)
