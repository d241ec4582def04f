"""Addresses in the settings, which hold passwords: read without ever being quoted."""

from __future__ import annotations

import re
from typing import Any

ENCODE = 'Percent-encode the user name and the password: urllib.parse.quote(password, safe="").'
# What RFC 3986 takes as user information.
_USER_INFO = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:]|%[0-9A-Fa-f]{2})*")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%25\w+)?\]|[^\[\]:@\s]*)(?::[0-9]{1,5})?")
_BLANK = re.compile(r"[\x00-\x20\x7f]")


def is_address(value: Any) -> bool:
    """Return whether a value is meant as a URL."""
    return isinstance(value, str) and "://" in value


def is_misread(url: str) -> bool:
    """Return whether a URL has what its readers take for something else.

    A "#" or "/" in a password ends the server's name, for example, and "%41" is an A.
    Readers differ in what they do with the rest; several quote it in their errors.
    """
    authority, rest = _parts(url)
    user, at, hosts = authority.rpartition("@")
    if _BLANK.search(url) or "#" in rest:
        return True
    if not at and ":" in authority and "@" in rest:
        # The server's name stands behind what ended it.
        return True
    return not (
        _USER_INFO.fullmatch(user)
        and all(_HOST.fullmatch(host) for host in hosts.split(","))
    )


def has_password(url: str) -> bool:
    """Return whether a URL holds a password."""
    user, _, _ = _parts(url)[0].rpartition("@")
    return bool(user.partition(":")[2])


def is_printable(secret: Any) -> bool:
    """Return whether a key or token can be sent in a header."""
    return isinstance(secret, str) and re.fullmatch(r"[\x21-\x7e]+", secret) is not None


def _parts(url: str) -> tuple[str, str]:
    """Split a URL into its authority and what follows."""
    _, _, rest = url.partition("://")
    end = re.search(r"[/?#]", rest)
    return (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
