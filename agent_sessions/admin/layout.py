"""The lines of a transcript page: entries, who speaks, what runs used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent_sessions.admin.formatting import grouped, how_long
from agent_sessions.items import StoredItem
from agent_sessions.models import AgentRun
from agent_sessions.transcript import Line, join


@dataclass(frozen=True, slots=True)
class RunEnd:
    """A run that ends here, and what it used."""

    run: AgentRun
    input_tokens: str
    output_tokens: str
    duration: str

    @classmethod
    def of(cls, run: AgentRun) -> RunEnd:
        return cls(
            run,
            grouped(run.input_tokens),
            grouped(run.output_tokens),
            ""
            if run.finished_at is None
            else how_long(run.started_at, run.finished_at),
        )


@dataclass(slots=True)
class Shown:
    """A line with its links, and what stands before and after it.

    `call_url` leads from an output to its call on another page, `agent` names who speaks from here on; `ends` are the runs that end here.
    """

    line: Line
    raw_url: str
    output_url: str = ""
    call_url: str = ""
    agent: str = ""
    ends: list[RunEnd] = field(default_factory=list)


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
    if not shown:
        return shown
    agent = ""
    for run in runs:
        first = _at_or_after(shown, run.first_position or 0)
        if run.agent_name and run.agent_name != agent and first is not None:
            first.agent = agent = run.agent_name
        last = _at_or_before(shown, run.last_position or 0)
        if last is not None and _ends_here(run, shown):
            last.ends.append(RunEnd.of(run))
    return shown


def _ends_here(run: AgentRun, shown: list[Shown]) -> bool:
    last = max(s.line.output_position or s.line.position for s in shown)
    return run.last_position is not None and run.last_position <= last


def _at_or_after(shown: list[Shown], position: int) -> Shown | None:
    return next((s for s in shown if s.line.position >= position), None)


def _at_or_before(shown: list[Shown], position: int) -> Shown | None:
    return next((s for s in reversed(shown) if s.line.position <= position), None)
