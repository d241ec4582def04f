"""Many writers, poppers and `kill -9` on one session of a real database.

Exits with 1 where anything was lost, doubled, torn or reordered, and tells what.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING

from benchmarks.stress.places import KINDS, place, version

if TYPE_CHECKING:
    from benchmarks.stress.rounds import Outcome


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.stress")
    parser.add_argument("--database", choices=KINDS, default="sqlite")
    parser.add_argument("--writers", type=int, default=32)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--batches", type=int, default=1_000, help="of each writer")
    parser.add_argument("--poppers", type=int, default=8)
    parser.add_argument(
        "--popped", type=int, default=2_000, metavar="N", help="batches to pop"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    return parser.parse_args(argv)


def stress(options: argparse.Namespace, environment: dict[str, str]) -> bool:
    """Run all parts and print what each has found; tell whether all is right."""
    from benchmarks.stress.rounds import stress_kills, stress_poppers, stress_writers

    good = _tell(
        "writers",
        stress_writers(
            environment,
            "writers",
            processes=options.processes,
            writers=options.writers,
            batches=options.batches,
        ),
    )
    good &= _tell(
        "poppers",
        stress_poppers(
            environment, "poppers", poppers=options.poppers, batches=options.popped
        ),
    )
    good &= _tell(
        "kill -9",
        stress_kills(environment, "kills", kills=options.kills, seed=options.seed),
    )
    return good


def _tell(name: str, outcome: Outcome) -> bool:
    verdict = "VIOLATED" if outcome.problems else "held"
    print(f"{name:8} {verdict}")
    for line in outcome.lines:
        print(f"         {line}")
    for problem in outcome.problems:
        print(f"       ! {problem}", flush=True)
    sys.stdout.flush()
    return not outcome.problems


def main(argv: list[str] | None = None) -> int:
    """Make the database, stress it, print."""
    options = arguments(argv)
    began = time.monotonic()
    with place(options.database) as environment:
        print(
            f"{version()}; Python {platform.python_version()}, "
            f"Django {version_of('Django')}",
            flush=True,
        )
        good = stress(options, environment)
    print(f"took {time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
