"""What encryption costs a turn: `get_items(limit=50)` and `add_items` of two items.

An encrypted alias is measured beside the plain one that it wraps, block by block in
turns, in one process on one server, and once more without the memory of opened items.
Printed are ratios. It judges nothing unless --max-ratio is given.
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
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.database import database
from benchmarks.items import history, turn

if TYPE_CHECKING:
    from agent_sessions.backends.base import BaseSessionBackend

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

LIMIT = 50
PLAIN, SEALED, FORGETFUL, OWN = (
    "plain",
    "encrypted",
    "encrypted, cache_bytes=0",
    "encrypted, session_keys=True",
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.encrypted")
    parser.add_argument(
        "--database", choices=("postgresql", "sqlite"), default="postgresql"
    )
    parser.add_argument("--items", type=int, default=100, metavar="N")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=20, help="turns a round")
    parser.add_argument(
        "--milliseconds", action="store_true", help="print each one's median too"
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        metavar="X",
        help="exit with 1 where an encrypted turn takes more than X times a plain one",
    )
    return parser.parse_args(argv)


def backends() -> dict[str, BaseSessionBackend]:
    """Make the compared backends, each under an alias of its own."""
    from cryptography.fernet import Fernet

    from agent_sessions.backends.database import DatabaseBackend
    from agent_sessions.backends.encrypted import EncryptedBackend

    key = Fernet.generate_key().decode()
    made: dict[str, BaseSessionBackend] = {PLAIN: DatabaseBackend("plain", {})}
    compared: dict[str, dict[str, Any]] = {
        SEALED: {},
        FORGETFUL: {"cache_bytes": 0},
        OWN: {"session_keys": True},
    }
    for number, (name, options) in enumerate(compared.items()):
        alias = f"private{number}"
        backend = EncryptedBackend(
            alias, {"backend": "plain", "keys": [key], **options}
        )
        backend.make_inner = partial(DatabaseBackend, alias, {})
        made[name] = backend
    return made


async def measure(
    made: dict[str, BaseSessionBackend],
    options: argparse.Namespace,
    settle: Callable[[], None],
) -> dict[str, list[float]]:
    """Return the median seconds of a turn for each round, by name.

    `settle` is called when everything is warm, before the first round that counts.
    """
    # Not before Django is set up.
    from agent_sessions.backends.keys import SessionKey
    from agent_sessions.handler import open_session

    times: dict[str, list[float]] = defaultdict(list)
    names = list(made)
    # The first rounds warm connections, statement caches and the interpreter.
    for number in range(-2, options.rounds):
        # Whoever comes first in a round isn't always the same.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            session: Any = open_session(made[name], SessionKey(str(uuid.uuid4())))
            await session.add_items(history(options.items))
            # The first read fills what a session's caches hold.
            await session.get_items(limit=LIMIT)
            spent = [await _turn(session) for _ in range(options.turns)]
            if number >= 0:
                times[name].append(median(spent))
        gc.collect()
        if number == -1:
            # A plan that was made while the tables were empty would be kept by some.
            await asyncio.to_thread(settle)
    return times


async def _turn(session: Any) -> float:
    new = turn(1)
    start = time.perf_counter()
    await session.get_items(limit=LIMIT)
    await session.add_items(new)
    return time.perf_counter() - start


def report(times: dict[str, list[float]], options: argparse.Namespace) -> float:
    """Print the ratios to the plain turn; give that of the encrypted one."""
    ratios = {
        name: median(
            mine / plain for mine, plain in zip(found, times[PLAIN], strict=True)
        )
        for name, found in times.items()
    }
    for name, found in times.items():
        best = min(found) / min(times[PLAIN])
        line = f"  {ratios[name]:6.2f} {best:6.2f}  {name}"
        if options.milliseconds:
            line += f": {median(found) * 1_000:.2f} ms"
        print(line)
    return ratios[SEALED]


def main(argv: list[str] | None = None) -> int:
    """Make the database, measure, print."""
    options = arguments(argv)
    with database(options.database) as made:
        print(
            f"A turn (get_items(limit={LIMIT}), add_items of 2) from {options.items} "
            f"items on, {made.version}; Python {platform.python_version()}, Django "
            f"{version('Django')}, cryptography {version('cryptography')}, "
            f"{options.rounds} rounds of {options.turns} turns.\n"
            "Ratios to the plain turn, the median of the rounds and between the "
            "fastest rounds: smaller is faster."
        )
        compared = backends()
        try:
            times = asyncio.run(measure(compared, options, made.settle))
        finally:
            for backend in compared.values():
                backend.close()
        ratio = report(times, options)
    if options.max_ratio is not None and ratio > options.max_ratio:
        print(f"More than {options.max_ratio} of the plain turn.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
