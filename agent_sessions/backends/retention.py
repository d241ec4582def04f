"""How long histories are kept: what `max_idle` and `max_age` of OPTIONS say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from agent_sessions.exceptions import InvalidBackend

UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_AGE = re.compile(r"(?:\d+[wdhms])+", re.ASCII)
_PART = re.compile(r"(\d+)([wdhms])", re.ASCII)
EXAMPLES = '"30d", "12h" or "1d12h"; w, d, h, m and s are weeks to seconds'


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
