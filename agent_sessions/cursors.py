"""Cursors of pages, which come back from outside."""

from __future__ import annotations

from datetime import UTC, datetime

from django.conf import settings
from django.utils.timezone import is_aware

# What a column of 64 bits holds.
LARGEST = 2**63 - 1
# Dates that every database and each time zone takes.
_YEARS = range(1000, 9999)


def read_number(text: str) -> int | None:
    """Read a whole number of 0 or more that a column holds; None for all else."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(LARGEST)):
        return None
    number = int(text)
    return number if number <= LARGEST else None


def write_moment(when: datetime, pk: int) -> str:
    """Return the cursor of a row by its time and primary key."""
    if is_aware(when):
        when = when.astimezone(UTC)
    return f"{when.isoformat()}~{pk}"


def read_moment(cursor: str) -> tuple[datetime, int] | None:
    """Read what write_moment() has given; None for all else."""
    text, _, number = cursor.partition("~")
    pk = read_number(number)
    try:
        when = datetime.fromisoformat(text)
        if pk is None or write_moment(when, pk) != cursor:
            return None
    except (ValueError, OverflowError):
        return None
    usable = is_aware(when) == settings.USE_TZ and when.year in _YEARS
    return (when, pk) if usable else None
