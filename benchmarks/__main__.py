"""`python -m benchmarks`: every benchmark, on every database that it has."""

from __future__ import annotations

import subprocess
import sys


def main() -> int:
    """Run each benchmark in a process of its own; arguments go to all of them."""
    worst = 0
    for database in ("postgresql", "sqlite"):
        result = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.turn"),
                *("--database", database, *sys.argv[1:]),
            ],
            check=False,
        )
        worst = max(worst, result.returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
