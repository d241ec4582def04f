"""What pages show: numbers, times and states as words, and the lines of a transcript."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.utils.formats import number_format
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from agent_sessions.items import StoredItem
from agent_sessions.models import AgentRun
from agent_sessions.transcript import Line, join


def grouped(number: int) -> str:
    """Write a count with the language's separators."""
    return number_format(number, use_l10n=True, force_grouping=True)


def in_words(state: str, words: str) -> SafeString:
    """Write a state as text; its class can add a colour, but says nothing by itself."""
    known = state if state.isascii() and state.isalpha() else "unknown"
    return format_html('<span class="as-state as-state-{}">{}</span>', known, words)


def how_long(started: datetime, finished: datetime | None) -> str:
    """Write how long something took: seconds, or minutes and seconds."""
    if finished is None:
        return ""
    seconds = max(finished - started, timedelta()).total_seconds()
    if seconds < 60:
        text = number_format(round(seconds, 1), decimal_pos=1)
        return _("%(seconds)s s") % {"seconds": text}
    minutes, rest = divmod(round(seconds), 60)
    return _("%(minutes)d min %(seconds)d s") % {"minutes": minutes, "seconds": rest}


@dataclass(slots=True)
class Shown:
    """A line with its links, and what stands before and after it.

    `call_url` leads from an output to its call on another page, `agent` names who
    speaks from here on; `ends` are the runs that end here, and what they used.
    """

    line: Line
    raw_url: str
    output_url: str = ""
    call_url: str = ""
    agent: str = ""
    ends: list[dict[str, Any]] = field(default_factory=list)


def lay_out(
    items: Iterable[StoredItem],
    runs: Iterable[AgentRun],
    raw_url: Callable[[int], str],
) -> list[Shown]:
    """Put a page together; `raw_url` gives the address of an item by its position."""
    shown = [
        Shown(
            line,
            raw_url(line.position),
            "" if line.output_position is None else raw_url(line.output_position),
        )
        for line in join(items)
    ]
    agent = ""
    end = max((s.line.output_position or s.line.position for s in shown), default=0)
    for run in runs:
        first, last = run.first_position or 0, run.last_position or 0
        here = next((s for s in shown if s.line.position >= first), None)
        if run.agent_name and run.agent_name != agent and here is not None:
            here.agent = agent = run.agent_name
        here = next((s for s in reversed(shown) if s.line.position <= last), None)
        if here is not None and last <= end:
            here.ends.append(
                {
                    "run": run,
                    "input_tokens": grouped(run.input_tokens),
                    "output_tokens": grouped(run.output_tokens),
                    "duration": how_long(run.started_at, run.finished_at),
                }
            )
    return shown
