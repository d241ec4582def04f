"""`python -m benchmarks`: our sessions beside others', in one run, as ratios.

All stores of a database are measured in one process, round by round in turns, so that
what disturbs one disturbs all. Each database has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.plans import PLANS

DATABASES = ("postgresql", "sqlite")
WORKLOADS = (
    *("turn", "new-object", "at-once", "read", "pop"),
    *("import", "memory", "fork", "forked-read", "clear"),
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks")
    parser.add_argument(
        "--databases", nargs="+", choices=DATABASES, default=list(DATABASES)
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS)
    )
    parser.add_argument(
        "--stores",
        nargs="+",
        metavar="WORD",
        help="only ours, the SDK's fastest, and those whose name holds a word",
    )
    parser.add_argument(
        "--size",
        choices=tuple(PLANS),
        default="full",
        help="full: 6 minutes; quick: 2; tiny: only whether everything works",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables to a file too"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 where a promise isn't kept"
    )
    # How this module calls itself for one database.
    parser.add_argument("--database", choices=DATABASES, help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure each database in a process of its own, then print."""
    options = arguments(argv)
    if options.database:
        from benchmarks.run import main as run

        run(options)
        return 0
    from benchmarks.bars import bars
    from benchmarks.report import machine, promises, table
    from benchmarks.results import Results
    from benchmarks.stores import left_out

    given = sys.argv[1:] if argv is None else argv
    lines = [machine(), *left_out()]
    kept = True
    for database in options.databases:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "benchmarks", *given]
            command += ["--database", database, "--json", file.name]
            subprocess.run(command, check=True)
            results = Results(**json.loads(Path(file.name).read_text()))
        plan = PLANS[options.size]
        lines += ["", *table(results), "", *promises(results, plan)]
        for bar in bars(results, plan):
            middle, _ = bar.measure(results)
            kept = kept and (middle is None or bar.reached(middle))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return 1 if options.strict and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
