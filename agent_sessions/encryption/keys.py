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
        if is_key(text):
            # Standard and URL-safe spelling are the same key.
            secret = base64.urlsafe_b64decode(text)
            return cls(secret, is_strong=_is_mixed(secret))
        strong = is_hex(text) and _is_mixed(bytes.fromhex(text))
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
        """The keys' ids, the writing one first."""
        return list(self._keys)

    def get(self, key_id: str) -> MasterKey | None:
        """Find a key by its id."""
        return self._keys.get(key_id)

    def beside(self, other: KeyRing) -> KeyRing:
        """Return a ring that writes as this one and reads with the other's keys too."""
        return KeyRing([*self, *other])

    def under(self, key: MasterKey) -> KeyRing:
        """Return a ring that writes with another key and reads with all."""
        return KeyRing([key, *self])


def session_context(name: str, owner: str | None, session_id: str) -> bytes:
    """Return the bytes that name one session: what its key is bound to."""
    return json.dumps([name, owner, session_id]).encode()


def session_key(key: MasterKey, context: bytes) -> Fernet:
    """Derive the key of one session."""
    return _derive(key.secret, salt=None, info=_SESSION + context)


def read_sdk_key(key: MasterKey, session_id: str) -> Fernet:
    """Derive the key that the SDK's EncryptedSession has for a session.

    agents/extensions/memory/encrypt_session.py, 0.24.
    """
    return _derive(key.secret, salt=session_id.encode(), info=_SDK_INFO)


def require_cryptography(feature: str) -> None:
    """Pass where cryptography is installed, without importing it.

    Raises MissingExtra.
    """
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

_KEY = re.compile(r"[A-Za-z0-9_+/-]{43}=")
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_QUOTES = "\"'`\u00b4\u2018-\u201f\u00ab\u00bb\u2039\u203a"
# What often gets into a key, and what is left without it.
_AROUND = {
    "the b'…' that Python prints around bytes": r"^[bBrRuU]{1,2}(['\"])(?P<key>.*)\1$",
    "quotes around it": f"^[{_QUOTES}]+|[{_QUOTES}]+$",
    # The equals sign at the end of a key is none of a name's.
    "a name in front of it": r"^(?![\w+/-]{43}=)(?:export\s+)?[A-Za-z_][\w.-]*\s*[=:]\s*"
    r"(?=\W?\S{22})",
    "blanks or a line's end in it": r"(?:\s|\\[nrt]|[\u200b-\u200f\u2060\ufeff\u00ad\0])+",
    "an equals sign that is written as a code": "(?:%3D|=3D|&#61;|\uff1d)(?P<key>)",
    "a comma or a bracket around it": r"^[,;:.\[\](){}<>]+|[,;:.\[\](){}<>]+$",
    "0x in front of it": r"^0[xX](?=[0-9A-Fa-f]{60})",
}
# How many characters may be missing, or be too many.
_MOST = 8
# How often neighbours are of another kind in random text; in words they seldom are.
_RANDOM = 0.4


def is_key(text: str) -> bool:
    """Return whether a text is 32 bytes as base64, in either alphabet."""
    return bool(_KEY.fullmatch(text))


def is_hex(text: str) -> bool:
    """Return whether a text is 32 bytes in hexadecimal digits."""
    return bool(_HEX.fullmatch(text))


def find_fault(text: str) -> str | None:
    """Return what is wrong with a text that is nearly a key; None for any other text.

    What is said doesn't quote the text.
    """
    if is_key(text) or is_hex(text):
        return None
    bare, around = _bare(text)
    if around and (is_key(bare) or is_hex(bare)):
        return f"It is a key with {' and '.join(around)}. Remove what isn't the key."
    fault = _length_fault(bare)
    if fault is not None and around:
        return f"{fault} It also has {' and '.join(around)}."
    return fault


def _bare(text: str) -> tuple[str, list[str]]:
    """Take off what isn't part of a key; say what that was."""
    found: list[str] = []
    before = None
    while before != text:
        before = text
        for name, pattern in _AROUND.items():
            changed = re.sub(pattern, _kept, text, flags=re.DOTALL)
            if changed != text and name not in found:
                found.append(name)
            text = changed
    return text, found


def _kept(match: re.Match[str]) -> str:
    if "key" not in match.re.groupindex:
        return ""
    return match["key"] or "="


def _length_fault(text: str) -> str | None:
    letters = text.rstrip("=")
    padding = len(text) - len(letters)
    if len(letters) == 43 and padding != 1 and is_key(f"{letters}="):
        if padding:
            return f"It ends with {padding} equals signs; a key ends with one."
        return "It is a key that has lost its last character, the equals sign ('=')."
    if is_key(text[:44]) or is_key(text[-44:]):
        return "It is a key and something more. Give each key as a text of its own."
    if re.fullmatch(r"[0-9A-Fa-f]+", text):
        if abs(len(text) - 64) > _MOST:
            return None
        return (
            f"It looks like 32 bytes in hexadecimal digits, but has {len(text)} of 64: "
            "some are missing or too many."
        )
    kept = re.sub(r"[^A-Za-z0-9_+/-]", "", letters)
    foreign = len(letters) - len(kept)
    if not foreign and (padding or _is_random(kept)):
        return _wrong_size(len(kept), padding)
    is_near = 1 <= foreign <= 2 and 41 <= len(letters) <= 45
    if is_near and (padding == 1 or (not padding and _is_random(kept))):
        return "It looks like a key with a character in it that no key has."
    return None


def _wrong_size(count: int, padding: int) -> str | None:
    if not padding and count not in {22, 32} and abs(count - 43) > _MOST:
        return None
    size = count * 3 // 4
    if size in {16, 24} and (count + padding) % 4 in {0, 2}:
        return f"It looks like base64 of {size} bytes; a key has 32."
    fault = "there is more than that" if count > 43 else "a part is missing"
    return (
        f"It looks like base64, but not of 32 bytes: {fault}. It has {count} "
        "characters before the equals sign; a key has 43."
    )


def _is_random(text: str) -> bool:
    """Return whether a text looks random: letters of both cases and digits, mixed."""
    kinds = [
        "a" if each.islower() else "A" if each.isupper() else "0" * each.isdigit()
        for each in text
    ]
    changes = sum(one != other for one, other in pairwise(kinds))
    return {"a", "A", "0"} <= set(kinds) and changes >= _RANDOM * (len(kinds) - 1)
