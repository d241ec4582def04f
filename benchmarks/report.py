"""Tables of what was measured, in Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

from benchmarks.bars import bars
from benchmarks.plans import Plan
from benchmarks.results import Results
from benchmarks.stores import OURS


def machine() -> str:
    """Name what was measured on."""
    return (
        f"Python {platform.python_version()}, Django {version('Django')}, psycopg "
        f"{version('psycopg')}, openai-agents {version('openai-agents')}; "
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    )


def table(results: Results) -> Iterator[str]:
    """Write every workload as ratios to the reference."""
    yield f"### {results.database}"
    yield ""
    yield f"Ratios to {results.reference}, the median of the rounds; of turns/s and"
    yield "pops/s more is better, of everything else less."
    yield ""
    yield "| | " + " | ".join(results.stores) + " |"
    yield "|---" * (len(results.stores) + 1) + "|"
    for workload, values in results.values.items():
        cells = [_cell(results, workload, store) for store in results.stores]
        unit = "" if results.reference in values else ", ms"
        yield f"| {workload}{unit} | " + " | ".join(cells) + " |"
    yield ""
    for name, parts in results.stores.items():
        yield f"- {name}: {parts}"


def _cell(results: Results, workload: str, store: str) -> str:
    if results.reference in results.values[workload]:
        value = results.ratio(workload, store, results.reference)
    else:
        # There is nothing to compare with.
        value = results.middle(workload, store)
        value = None if value is None else value * 1_000
    cell = "" if value is None else f"{value:.2f}"
    return f"**{cell}**" if cell and store == OURS else cell


def promises(results: Results, plan: Plan) -> Iterator[str]:
    """Write what is promised beside what was measured."""
    yield f"| {results.database} | promised | median | best rounds | |"
    yield "|---|---|---|---|---|"
    for bar in bars(results, plan):
        middle, best = bar.measure(results)
        if middle is None:
            continue
        word = "reached" if bar.reached(middle) else "**missed**"
        if word != "reached" and bar.reached(best):
            word = "reached by the best rounds"
        yield (
            f"| {bar.name} | {bar.wanted} | {bar.shown(middle)} | {bar.shown(best)} "
            f"| {word} |"
        )
