"""Numbers, times and states as words of the reader's language."""

from __future__ import annotations

from datetime import datetime, timedelta

from django.utils.formats import number_format
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _


def grouped(number: int) -> str:
    """Write a count with the language's separators."""
    return number_format(number, use_l10n=True, force_grouping=True)


def in_words(state: str, words: str) -> SafeString:
    """Write a state as text; its class can add a colour, but says nothing by itself."""
    known = state if state.isascii() and state.isalpha() else "unknown"
    return format_html('<span class="as-state as-state-{}">{}</span>', known, words)


def how_long(started: datetime, finished: datetime) -> str:
    """Write how long something took: seconds, or minutes and seconds."""
    seconds = max(finished - started, timedelta()).total_seconds()
    if seconds < 60:
        text = number_format(round(seconds, 1), decimal_pos=1)
        return _("%(seconds)s s") % {"seconds": text}
    minutes, rest = divmod(round(seconds), 60)
    return _("%(minutes)d min %(seconds)d s") % {"minutes": minutes, "seconds": rest}
