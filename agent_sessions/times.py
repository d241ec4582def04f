"""Times as columns and texts hold them: with an offset, and by day; and waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime

from django.conf import settings
from django.utils import timezone


def aware(when: datetime) -> datetime:
    """Return a time with its offset; one that has none is of the project's TIME_ZONE."""
    if timezone.is_aware(when):
        return when
    return timezone.make_aware(when, timezone.get_default_timezone())


def iso(when: datetime, sep: str = "T", timespec: str = "auto") -> str:
    """Return a time as ISO text with its offset."""
    return aware(when).isoformat(sep, timespec)


def moment(when: datetime) -> str:
    """Write a time in UTC, so that a text tells whether two are the same."""
    return aware(when).astimezone(UTC).isoformat()


def stored(when: datetime) -> datetime:
    """Return a time that has an offset as the columns take it, see USE_TZ."""
    if settings.USE_TZ:
        return when
    return timezone.make_naive(when, timezone.get_default_timezone())


def day_of(when: datetime) -> date:
    """Return the day that a time has in `active_on`: UTC's where USE_TZ is on.

    It is there for the indexes alone. Pages and filters count days in the calendar of
    their reader, by the time of last activity.
    """
    return (when.astimezone(UTC) if timezone.is_aware(when) else when).date()


def pauses(wait: float | None) -> Iterator[float | None]:
    """Return how long to wait before each further try; None says that time is over."""
    until, pause = time.monotonic() + (wait or 0), 0.05
    while (left := until - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(2 * pause, 0.5)
    yield None


def today() -> date:
    """Return the day of an activity now, see day_of()."""
    return day_of(timezone.now())
