"""What one turn costs: `get_items(limit=50)` and `add_items` of two items.

Our session is measured beside the SDK's own and the bare driver, block by block in
turns, in one process on one server. Printed are ratios: the median over the rounds of
ours divided by theirs in the same round. It judges nothing unless --max-ratio is given.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import sys
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.database import Database, database
from benchmarks.items import history, turn

if TYPE_CHECKING:
    from benchmarks.stores import Store

# The SDK reads it when it is imported; nothing is traced here, but nothing asks either.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

LIMIT = 50
# The first turns of a session object fill its caches.
WARM_TURNS = 2
LONG = 1_000
CHUNK = 2_000


@dataclass
class Times:
    """Seconds of turns by store, one list a round."""

    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def ratio(self, ours: str, theirs: str) -> float:
        """Give the median over the rounds of ours divided by theirs."""
        pairs = zip(self.rounds[ours], self.rounds[theirs], strict=True)
        return median(mine / other for mine, other in pairs)

    def best_ratio(self, ours: str, theirs: str) -> float:
        """Give the ratio of the fastest rounds, which a busy machine disturbs least."""
        return min(self.rounds[ours]) / min(self.rounds[theirs])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.turn")
    parser.add_argument(
        "--database", choices=("postgresql", "sqlite"), default="postgresql"
    )
    parser.add_argument(
        "--items", type=int, nargs="+", default=[10, 100_000], metavar="N"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=20, help="turns a round")
    parser.add_argument(
        "--milliseconds",
        action="store_true",
        help="print each store's own median too; it says as much of the machine",
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        metavar="X",
        help="exit with 1 where DjangoSession takes more than X times the SDK's session",
    )
    return parser.parse_args(argv)


async def measure(made: Database, options: argparse.Namespace) -> bool:
    """Measure every size with kept and with new session objects; print as it goes."""
    from benchmarks.stores import postgresql_stores, sqlite_stores

    make = postgresql_stores if made.kind == "postgresql" else sqlite_stores
    compared = await make(made)
    sdk = next(store for store in compared if store.name.startswith("SDK"))
    good = True
    try:
        for count in options.items:
            for fresh in (False, True):
                times = await _rounds(made, compared, count, fresh, options)
                objects = "a new object a turn" if fresh else "a kept object"
                print(f"\nFrom {count:,} items on, {objects}")
                _report(compared, sdk, times, options)
                ratio = times.ratio(compared[0].name, sdk.name)
                good &= options.max_ratio is None or ratio <= options.max_ratio
    finally:
        for store in compared:
            await store.close()
    return good


async def _rounds(
    made: Database,
    compared: list[Store],
    count: int,
    fresh: bool,
    options: argparse.Namespace,
) -> Times:
    # A long history is hardly changed by the turns; a short one begins anew each round.
    kept = {store.name: await _fill(store, count) for store in compared if count > LONG}
    await asyncio.to_thread(made.settle)
    times = Times()
    # The first rounds warm connections, statement caches and the interpreter.
    for number in range(-2, options.rounds):
        # Whoever comes first in a round isn't always the same.
        shift = number % len(compared)
        for store in compared[shift:] + compared[:shift]:
            session = kept.get(store.name) or await _fill(store, count)
            spent = [
                await _turn(store, session, fresh)
                for _ in range(WARM_TURNS + options.turns)
            ]
            if number >= 0:
                times.rounds[store.name].append(median(spent[WARM_TURNS:]))
            if store.name not in kept:
                store.release(session)
        gc.collect()
    for store in compared:
        if store.name in kept:
            store.release(kept[store.name])
    return times


async def _turn(store: Store, kept: Any, fresh: bool) -> float:
    new = turn(1)
    start = time.perf_counter()
    session = store.open(kept.session_id) if fresh else kept
    await session.get_items(limit=LIMIT)
    await session.add_items(new)
    spent = time.perf_counter() - start
    if fresh:
        store.release(session)
    return spent


async def _fill(store: Store, count: int) -> Any:
    """Make a session that has `count` items when the turns begin to be timed."""
    session = store.open(str(uuid.uuid4()))
    items = history(max(count - 2 * WARM_TURNS, 0))
    for start in range(0, len(items), CHUNK):
        await session.add_items(items[start : start + CHUNK])
    if len(await session.get_items()) != len(items):
        raise RuntimeError(f"{store.name} doesn't hold what it was given.")
    return session


def _report(
    compared: list[Store], sdk: Store, times: Times, options: argparse.Namespace
) -> None:
    ours = compared[0]
    for store in compared:
        pair = (store.name, sdk.name)
        line = f"  {times.ratio(*pair):6.2f} {times.best_ratio(*pair):6.2f}  "
        line += store.name
        if options.milliseconds:
            line += f": {median(times.rounds[store.name]) * 1_000:.2f} ms"
        print(line)
    raw = next(store for store in compared if store.name.startswith("raw"))
    pair = (ours.name, raw.name)
    print(
        f"  {times.ratio(*pair):6.2f} {times.best_ratio(*pair):6.2f}  "
        f"{ours.name} / {raw.name}"
    )


def main(argv: list[str] | None = None) -> int:
    """Make the database, measure, print."""
    options = arguments(argv)
    with database(options.database) as made:
        print(
            f"A turn (get_items(limit={LIMIT}), add_items of 2) on {made.version}; "
            f"Python {platform.python_version()}, Django {version('Django')}, "
            f"{options.rounds} rounds of {options.turns} turns.\n"
            "Ratios to the SDK's session, the median of the rounds and between the "
            "fastest rounds: smaller is faster."
        )
        good = asyncio.run(measure(made, options))
    if not good:
        print(f"More than {options.max_ratio} of the SDK's session.", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
