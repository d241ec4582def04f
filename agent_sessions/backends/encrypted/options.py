"""The OPTIONS of EncryptedBackend, read and refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_sessions.backends.retention import EXAMPLES, parse_age
from agent_sessions.exceptions import InvalidBackend

DEFAULTS: dict[str, Any] = {
    "lifetime": None,
    "session_keys": False,
    "clear_without_key": False,
    "accept_sdk_envelopes": False,
    "name": None,
    "cache_bytes": 8 * 2**20,
    "key_refresh": 20,
}

# A rotation waits for twice as long.
_LONGEST_REFRESH = 3600


@dataclass(frozen=True, slots=True)
class Options:
    """How an alias encrypts."""

    # Seconds for which a turn is shown; None for ever.
    lifetime: float | None
    # Whether each session has a key of its own that clearing destroys.
    session_keys: bool
    # Whether a history may be cleared whose key is missing.
    clear_without_key: bool
    # Whether items open that the SDK's EncryptedSession wrote.
    accept_sdk_envelopes: bool
    # What ciphertexts are bound to in the place of the alias.
    name: str
    # How much opened text a process remembers, for a minute at most.
    cache_bytes: int
    # Seconds for which a process may write without asking for its keys again.
    key_refresh: float


def read_options(alias: str, options: Mapping[str, Any]) -> Options:
    """Read the options but for the keys. Raises InvalidBackend."""
    name, size = options["name"], options["cache_bytes"]
    refresh = options["key_refresh"]
    for flag in ("session_keys", "clear_without_key", "accept_sdk_envelopes"):
        if not isinstance(options[flag], bool):
            raise _invalid(alias, flag, "True or False")
    if name is not None and (not isinstance(name, str) or not name):
        raise _invalid(alias, "name", "a str, such as the alias had before")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise _invalid(alias, "cache_bytes", "a whole number of 0 or more")
    if isinstance(refresh, bool) or not isinstance(refresh, int | float):
        raise _invalid(alias, "key_refresh", "seconds")
    if not 1 <= refresh <= _LONGEST_REFRESH:
        raise _invalid(alias, "key_refresh", f"1 to {_LONGEST_REFRESH} seconds")
    return Options(
        lifetime=_seconds(alias, options["lifetime"]),
        session_keys=options["session_keys"],
        clear_without_key=options["clear_without_key"],
        accept_sdk_envelopes=options["accept_sdk_envelopes"],
        name=alias if name is None else name,
        cache_bytes=size,
        key_refresh=refresh,
    )


def _seconds(alias: str, lifetime: Any) -> float | None:
    try:
        return None if lifetime is None else parse_age(lifetime).total_seconds()
    except ValueError:
        raise _invalid(alias, "lifetime", f"a timedelta, or {EXAMPLES}") from None


def _invalid(alias: str, option: str, wanted: str) -> InvalidBackend:
    return InvalidBackend(
        f"AGENT_SESSIONS[{alias!r}]: the option {option} can't be used.",
        hint=f"Give {wanted}.",
        id="agent_sessions.E019",
    )
