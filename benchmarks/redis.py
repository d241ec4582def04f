"""What a turn costs on Redis, beside the SDK's RedisSession.

`python -m benchmarks.redis`: a turn is `get_items(limit=50)` and `add_items` of two
items. Blocks of turns alternate in one process on one server; printed are medians over
the rounds of ours divided by the SDK's in the same round. It judges nothing unless
--max-ratio is given.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from statistics import median
from typing import Any

from benchmarks.items import history, turn
from tests.servers.redis import redis, url

# The SDK reads it when it is imported.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

LIMIT = 50
LONG = 1_000
CHUNK = 2_000

Timed = Callable[[Any], Awaitable[None]]


async def take_turn(session: Any) -> None:
    """Read and write as a run does."""
    await session.get_items(limit=LIMIT)
    await session.add_items(turn(1))


async def read_all(session: Any) -> None:
    """Read the whole history."""
    await session.get_items()


async def fill(make: Callable[[str], Any], count: int) -> Any:
    """Make a session that holds `count` items."""
    session = make(uuid.uuid4().hex)
    items = history(count)
    for start in range(0, len(items), CHUNK):
        await session.add_items(items[start : start + CHUNK])
    return session


async def measure(place: str, options: argparse.Namespace) -> float:
    """Measure every size; print as it goes; give the worst ratio of turns."""
    from agents.extensions.memory import RedisSession as SDKSession

    from agent_sessions import RedisSession

    sdk = SDKSession.from_url("owner of the client", url=place)
    makers: dict[str, Callable[[str], Any]] = {
        "ours": lambda name: RedisSession.from_url(name, place),
        "ours, sliding ttl": lambda name: RedisSession.from_url(name, place, ttl=3600),
        "sdk": lambda name: SDKSession(name, redis_client=sdk._redis),
        "sdk, ttl": lambda name: SDKSession(name, redis_client=sdk._redis, ttl=3600),
    }
    worst = 0.0
    for count in options.items:
        timed: dict[str, Timed] = {"turn": take_turn}
        if count <= LONG:
            timed["read all"] = read_all
        for what, use in timed.items():
            spent = await _rounds(makers, use, count, options)
            for ours, theirs in (("ours", "sdk"), ("ours, sliding ttl", "sdk, ttl")):
                pairs = zip(spent[ours], spent[theirs], strict=True)
                ratio = median(mine / other for mine, other in pairs)
                best = min(spent[ours]) / min(spent[theirs])
                if what == "turn":
                    worst = max(worst, ratio)
                print(
                    f"  {count:>7,} items  {what:<8}  {ratio:5.2f} {best:5.2f}  "
                    f"{ours} / {theirs}",
                    flush=True,
                )
    await sdk.close()
    return worst


async def _rounds(
    makers: dict[str, Callable[[str], Any]],
    use: Timed,
    count: int,
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in makers}
    kept = {name: await fill(make, count) for name, make in makers.items()}
    names = list(makers)
    for number in range(-1, options.rounds):
        # Whoever comes first in a round isn't always the same.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times = []
            for _ in range(options.turns):
                start = time.perf_counter()
                await use(kept[name])
                times.append(time.perf_counter() - start)
            if number >= 0:
                spent[name].append(median(times))
    for session in kept.values():
        await session.clear_session()
    return spent


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.redis")
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument(
        "--items", type=int, nargs="+", default=[10, 1_000, 100_000], metavar="N"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=20, help="turns a round")
    parser.add_argument(
        "--max-ratio",
        type=float,
        metavar="X",
        help="exit with 1 where a turn takes more than X times the SDK's",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the server, measure, print."""
    options = arguments(argv)
    with redis(options.server) as server:
        print(
            f"On {options.server}; Python {platform.python_version()}, redis-py "
            f"{version('redis')}, openai-agents {version('openai-agents')}; "
            f"{options.rounds} rounds of {options.turns}.\n"
            "Ratios to the SDK's session, the median of the rounds and between the "
            "fastest rounds: smaller is faster."
        )
        worst = asyncio.run(measure(url(server), options))
    if options.max_ratio is not None and worst > options.max_ratio:
        print(f"More than {options.max_ratio} of the SDK's.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
