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
# A history longer than this doesn't change noticeably by the turns that are measured.
_LONG = 1_000
_CHUNK = 2_000


@dataclass
class Times:
    """Seconds of turns by store, one list a round."""

    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def ratio(self, ours: str, theirs: str) -> float:
        """Give the median over the rounds of ours divided by theirs."""
        pairs = zip(self.rounds[ours], self.rounds[theirs], strict=True)
        return median(mine / other for mine, other in pairs)


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
                print(f"\n{count:,} items, {objects}")
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
    # A long history isn't changed by the turns, a short one is: it gets a new session
    # for each.
    filled = {
        store.name: await _fill(store, count) for store in compared if count > _LONG
    }
    await asyncio.to_thread(made.settle)
    times = Times()
    # The first rounds warm connections, statement caches and the interpreter.
    for number in range(-2, options.rounds):
        # Whoever comes first in a round isn't always the same.
        shift = number % len(compared)
        for store in compared[shift:] + compared[:shift]:
            spent = [
                await _turn(store, count, fresh, filled.get(store.name))
                for _ in range(options.turns)
            ]
            if number >= 0:
                times.rounds[store.name].append(median(spent))
        gc.collect()
    for store in compared:
        if store.name in filled:
            store.release(filled[store.name])
    return times


async def _turn(store: Store, count: int, fresh: bool, kept: Any) -> float:
    session = filled = kept or await _fill(store, count)
    new = turn(count)
    start = time.perf_counter()
    if fresh:
        session = store.open(filled.session_id)
    read = await session.get_items(limit=LIMIT)
    await session.add_items(new)
    spent = time.perf_counter() - start
    if len(read) != min(count, LIMIT):
        raise RuntimeError(f"{store.name} read {len(read)} items")
    for used in {session, filled} - {kept}:
        store.release(used)
    return spent


async def _fill(store: Store, count: int) -> Any:
    """Make a session of `count` items; its object has then done its first work."""
    session = store.open(str(uuid.uuid4()))
    items = history(count)
    for start in range(0, count, _CHUNK):
        await session.add_items(items[start : start + _CHUNK])
    await session.get_items(limit=1)
    return session


def _report(
    compared: list[Store], sdk: Store, times: Times, options: argparse.Namespace
) -> None:
    ours = compared[0]
    for store in compared:
        line = f"  {times.ratio(store.name, sdk.name):6.2f}  {store.name}"
        if options.milliseconds:
            line += f": {median(times.rounds[store.name]) * 1_000:.2f} ms"
        print(line)
    raw = next(store for store in compared if store.name.startswith("raw"))
    print(f"  {ours.name} / {raw.name}: {times.ratio(ours.name, raw.name):.2f}")


def main(argv: list[str] | None = None) -> int:
    """Make the database, measure, print."""
    options = arguments(argv)
    with database(options.database) as made:
        print(
            f"A turn (get_items(limit={LIMIT}), add_items of 2) on {made.version}; "
            f"Python {platform.python_version()}, Django {version('Django')}, "
            f"{options.rounds} rounds of {options.turns} turns.\n"
            "Ratios to the SDK's session: smaller is faster."
        )
        good = asyncio.run(measure(made, options))
    if not good:
        print(f"More than {options.max_ratio} of the SDK's session.", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
