"""Read what AGENT_SESSIONS says: times, addresses, connections, and misspelt words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.checks import CheckMessage, Warning
from django.utils.module_loading import import_string

from agent_sessions.concurrency.threads import ConnectionPolicy
from agent_sessions.exceptions import InvalidBackend

if TYPE_CHECKING:
    from agent_sessions.backends.base import BaseSessionBackend

# The alias that is meant where none is named, as in DATABASES and CACHES.
DEFAULT_ALIAS = "default"
UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_AGE = re.compile(r"(?:\d+[wdhms])+", re.ASCII)
_PART = re.compile(r"(\d+)([wdhms])", re.ASCII)
EXAMPLES = '"30d", "12h" or "1d12h"; w, d, h, m and s are weeks to seconds'
ENCODE = 'Percent-encode the user name and the password: urllib.parse.quote(password, safe="").'
# What RFC 3986 takes as user information.
_USER_INFO = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:]|%[0-9A-Fa-f]{2})*")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%25\w+)?\]|[^\[\]:@\s]*)(?::[0-9]{1,5})?")
_BLANK = re.compile(r"[\x00-\x20\x7f]")


# -- how long histories are kept ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a backend keeps a history; None keeps it for ever.

    `max_idle` counts from the last activity, `max_age` from the session's creation.
    """

    max_idle: timedelta | None = None
    max_age: timedelta | None = None

    def __bool__(self) -> bool:
        return self.max_idle is not None or self.max_age is not None


def parse_age(value: Any) -> timedelta:
    """Read a length of time: a timedelta, or text such as "30d".

    Raises ValueError for anything else and for what is not longer than nothing.
    """
    age = value if isinstance(value, timedelta) else _from_text(value)
    if age <= timedelta(0):
        raise ValueError("It must be longer than nothing.")
    return age


def read_retention(alias: str, options: Mapping[str, Any]) -> Retention:
    """Read a backend's OPTIONS. Raises InvalidBackend."""
    found: dict[str, timedelta | None] = {}
    for name in ("max_idle", "max_age"):
        value = options.get(name)
        try:
            found[name] = None if value is None else parse_age(value)
        except ValueError:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: {name} is no length of time: {value!r}.",
                hint=f"Give a timedelta that is longer than nothing, or {EXAMPLES}.",
                id="agent_sessions.E016",
            ) from None
    return Retention(**found)


def _from_text(value: Any) -> timedelta:
    if not isinstance(value, str) or not _AGE.fullmatch(value.strip()):
        raise ValueError(f"It must be a length of time such as {EXAMPLES}.")
    age = timedelta(0)
    try:
        for number, unit in _PART.findall(value):
            age += timedelta(**{UNITS[unit]: int(number)})
    except (OverflowError, ValueError):
        # A number of thousands of digits isn't even read.
        raise ValueError("It is longer than time itself.") from None
    return age


# -- misspelt words -------------------------------------------------------------------


def did_you_mean(words: Iterable[str], known: Iterable[str]) -> str:
    """Return a question with the known words that misspelt ones resemble, or ""."""
    folded = {word.lower(): word for word in known}
    # A word that is known is spelt right: something else is wrong with it.
    wrong = [word for word in words if word not in folded.values()]
    near = [get_close_matches(word.lower(), folded, n=1) for word in wrong]
    found = list(dict.fromkeys(folded[match] for each in near for match in each))
    return f"Did you mean {' or '.join(map(repr, found))}? " if found else ""


def did_you_mean_alias(alias: str, known: Iterable[str]) -> str:
    """Return a question with the alias that one resembles, or a hint to rename it."""
    near = get_close_matches(alias, known := list(known), n=1)
    if near and alias == DEFAULT_ALIAS:
        # The one that no project names: where it is missed, the other is wrong.
        return f"If {near[0]!r} is a misspelt {alias!r}, rename it. "
    return did_you_mean([alias], known)


# -- addresses, which hold passwords: read without ever being quoted ------------------


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


def check_run_session(alias: str, wrap: Any) -> None:
    """Refuse an option run_session that is no function and no dotted path."""
    if not (wrap is None or callable(wrap) or (isinstance(wrap, str) and "." in wrap)):
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: run_session is {wrap!r}.",
            hint="Give the dotted path of a function that gets a session and returns "
            "the one that the Runner uses.",
            id="agent_sessions.E008",
        )


# -- connections -----------------------------------------------------------------------

# The options of each backend that has rows in a Django database.
CONNECTION_OPTIONS: dict[str, Any] = {
    "database": None,
    "connections": None,
    "prepare_connection": None,
}
# What paths of packages and of projects' own modules are called that set something on
# the connection of a request: django-tenants, django-pgschemas, django-rls and others.
_PER_REQUEST = re.compile(r"tenant|pgschemas|(?<![a-z])rls(?![a-z])|row_level", re.I)


def read_policy(alias: str, options: dict[str, Any]) -> ConnectionPolicy:
    """Read which connections serve async callers. Raises InvalidBackend."""
    threads = options.get("threads")
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
    ):
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: threads must be a whole number of 1 or "
            f"more, not {threads!r}.",
            hint="Leave it out for 1 on SQLite and 8 on other databases.",
            id="agent_sessions.E012",
        )
    if options["connections"] not in {None, "own", "request"}:
        raise InvalidBackend(
            f'AGENT_SESSIONS[{alias!r}]: connections must be "own" or "request", '
            f"not {options['connections']!r}.",
            hint='Leave it out for "own": connections of a pool serve async callers.',
            id="agent_sessions.E023",
        )
    prepare = options["prepare_connection"]
    if isinstance(prepare, str):
        try:
            prepare = import_string(prepare)
        except ImportError as exc:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: prepare_connection can't be imported: "
                f"{exc}",
                hint="Give the dotted path of a function that takes a connection.",
                id="agent_sessions.E024",
            ) from exc
    if prepare is not None and not callable(prepare):
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: prepare_connection is not a function: "
            f"{prepare!r}.",
            hint="Give a function that takes a connection, or its dotted path.",
            id="agent_sessions.E024",
        )
    return ConnectionPolicy(
        size=threads,
        shared=options["connections"] == "request",
        prepare=prepare,
        routed=options["database"] is None,
    )


def check_policy(backend: BaseSessionBackend, using: str) -> list[CheckMessage]:
    """Report a project that sets something on the connection of each request."""
    options = backend.options
    if options["connections"] is not None or options["prepare_connection"] is not None:
        return []
    engine = str(settings.DATABASES.get(using, {}).get("ENGINE", ""))
    routers = [_path(router) for router in settings.DATABASE_ROUTERS]
    found = [
        path
        for path in (engine, *settings.MIDDLEWARE, *routers)
        if _PER_REQUEST.search(path)
    ]
    if not found:
        return []
    return [
        Warning(
            f"{found[0]} seems to set something on the connection of each request, "
            f"which the connections of AGENT_SESSIONS[{backend.alias!r}] for async "
            "callers don't have: another tenant's sessions may be read, or none.",
            hint=f"Set AGENT_SESSIONS[{backend.alias!r}]['OPTIONS'] to include "
            '"connections": "request", or name a function in "prepare_connection", '
            "which websockets need. "
            'Where neither is needed, set "connections": "own".',
            id="agent_sessions.W009",
        )
    ]


def _path(router: Any) -> str:
    kind = type(router)
    is_path = isinstance(router, str)
    return router if is_path else f"{kind.__module__}.{kind.__qualname__}"
