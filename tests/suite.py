"""Run all of the suite, as `make test` does: `python -m tests.suite [PYTEST ARGUMENTS]`.

Everything runs on SQLite, the contract on each store in a call of its own. What touches
a database runs again on PostgreSQL and MariaDB. The browser has a call of its own too,
because Playwright leaves a running loop behind. Three calls run at a time, since each
waits for its servers now and then; what the others printed follows the first one's
output. Each runs whatever the others gave; the last line is pytest's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.servers import PARTS

FIRST = "sqlite"
# As they are told; the longest begins first.
OTHERS = ("contract", "postgres", "mariadb", "browser")
BEGUN = ("browser", "contract", "postgres", "mariadb")
# The contract's files, which wait for their servers as long as all others together.
CONTRACT = "tests/**/test_*contract*.py"
# How many of them run beside the first.
BESIDE = 2
NOTHING_CHOSEN = 5
DATABASES = ("postgres", "mariadb")


class Suite:
    """The calls of pytest, with what they gave."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, missing: Mapping[str, str]
    ) -> None:
        """Take pytest's arguments, a folder for reports, and what databases lack."""
        self.arguments = arguments
        self.folder = folder
        self.missing = missing
        self.failed: list[str] = []
        self._report = folder / "not-run"
        self._waiting = deque(BEGUN)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run all calls; give the exit code."""
        lanes = [threading.Thread(target=self._work) for _ in range(BESIDE)]
        for lane in lanes:
            lane.start()
        try:
            _title(FIRST)
            self._call(FIRST, None)
            self._work()
            self._join(lanes)
            self._tell()
        finally:
            self._stop()
            self._join(lanes)
        if self.failed:
            print(f"Failed: {', '.join(self.failed)}; see above.", file=sys.stderr)
        return 1 if self.failed else 0

    @staticmethod
    def _join(lanes: Sequence[threading.Thread]) -> None:
        for lane in lanes:
            lane.join()

    def _tell(self) -> None:
        """Print what the other calls printed, with all that did not run at the end."""
        for name in OTHERS:
            _title(name)
            lines = self._output(name).read_bytes().splitlines(keepends=True)
            if name == OTHERS[-1] and self._report.exists():
                known = set(lines)
                report = self._report.read_bytes().splitlines(keepends=True)
                lines[-1:-1] = [line for line in report if line not in known]
            sys.stdout.buffer.writelines(lines)
            sys.stdout.flush()

    def _work(self) -> None:
        """Make the calls that nobody has begun, one after another."""
        while True:
            with self._lock:
                if self._stopped or not self._waiting:
                    return
                name = self._waiting.popleft()
            with self._output(name).open("wb") as output:
                if name in self.missing:
                    self._leave_out(name, output)
                else:
                    self._call(name, output)

    def _leave_out(self, database: str, output: IO[bytes]) -> None:
        """Say so here and, where it is seen, at the end of the last call."""
        line = (
            f"!!! NOT RUN on {database}: what touches a database, because "
            f"{self.missing[database]}\n"
        )
        output.write(line.encode())
        with self._report.open("a") as report:
            report.write(line)

    def _call(self, name: str, output: IO[bytes] | None) -> None:
        environment = os.environ | {"AGENT_SESSIONS_TEST_NOT_RUN": str(self._report)}
        environment |= {
            "AGENT_SESSIONS_TEST_DATABASE": name if name in DATABASES else FIRST
        }
        paths = []
        if name == "browser":
            paths = ["tests/browser"]
            environment |= {"DJANGO_ALLOW_ASYNC_UNSAFE": "true"}
        elif name == "contract":
            paths = sorted(map(str, Path().glob(CONTRACT)))
        elif name == FIRST:
            paths = [f"--ignore-glob={Path.cwd() / CONTRACT}"]
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *paths, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env=environment,
            )
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code != 0 and not (code == NOTHING_CHOSEN and self.arguments):
            self.failed.append(name)

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def _stop(self) -> None:
        """End what still runs, where a person has had enough."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def _title(name: str) -> None:
    print(f"=== {name}", flush=True)


def _missing() -> dict[str, str]:
    """Return which databases are missing here, and why; CI must have all."""
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        return {}
    reasons = {database: PARTS[f"{database}_server"]() for database in DATABASES}
    return {database: reason for database, reason in reasons.items() if reason}


def main() -> int:
    """Run the suite in a folder for its reports."""
    with tempfile.TemporaryDirectory(prefix="agent-sessions-suite-") as folder:
        return Suite(sys.argv[1:], Path(folder), _missing()).run()


if __name__ == "__main__":
    sys.exit(main())
