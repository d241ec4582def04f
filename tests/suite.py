"""Run all of the suite, as `make test` does: `python -m tests.suite [PYTEST ARGUMENTS]`.

Everything runs on SQLite, what touches a database again on PostgreSQL and MariaDB, then
the browser, in a call of its own because Playwright leaves a running loop behind. The
two other databases have a lane of their own beside SQLite, told when it is through.
Each call runs whatever the others gave; the last line is pytest's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.servers import PARTS

BESIDE = ("postgres", "mariadb")
NOTHING_CHOSEN = 5


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
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run all calls; give the exit code."""
        lane = threading.Thread(target=self._beside)
        lane.start()
        try:
            self._live("sqlite")
            lane.join()
            for database in BESIDE:
                _title(database)
                with self._output(database).open("rb") as output:
                    sys.stdout.buffer.write(output.read())
            self._live("browser", "tests/browser", DJANGO_ALLOW_ASYNC_UNSAFE="true")
        finally:
            self._stop()
            lane.join()
        if self.failed:
            print(f"Failed: {', '.join(self.failed)}; see above.", file=sys.stderr)
        return 1 if self.failed else 0

    def _live(self, name: str, *paths: str, **environment: str) -> None:
        _title(name)
        database = "sqlite" if name == "browser" else name
        self._call(name, database, None, *paths, **environment)

    def _beside(self) -> None:
        for database in BESIDE:
            with self._output(database).open("wb") as output:
                if database in self.missing:
                    self._leave_out(database, output)
                else:
                    self._call(database, database, output)

    def _leave_out(self, database: str, output: IO[bytes]) -> None:
        """Say so here and, where it is seen, at the end of the last call."""
        line = (
            f"!!! NOT RUN on {database}: what touches a database, because "
            f"{self.missing[database]}\n"
        )
        output.write(line.encode())
        with self._report.open("a") as report:
            report.write(line)

    def _call(
        self,
        name: str,
        database: str,
        output: IO[bytes] | None,
        *paths: str,
        **environment: str,
    ) -> None:
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *paths, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env=os.environ
                | {
                    "AGENT_SESSIONS_TEST_DATABASE": database,
                    "AGENT_SESSIONS_TEST_NOT_RUN": str(self._report),
                }
                | environment,
            )
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code != 0 and not (code == NOTHING_CHOSEN and self.arguments):
            self.failed.append(name)

    def _output(self, database: str) -> Path:
        return self.folder / f"{database}.txt"

    def _stop(self) -> None:
        """End what still runs, where a person has had enough."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def _title(name: str) -> None:
    print(f"=== {name}", flush=True)


def _missing() -> dict[str, str]:
    """Tell which databases can't be had here, and why; CI must have all."""
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        return {}
    reasons = {database: PARTS[f"{database}_server"]() for database in BESIDE}
    return {database: reason for database, reason in reasons.items() if reason}


def main() -> int:
    """Run the suite in a folder for its reports."""
    with tempfile.TemporaryDirectory(prefix="agent-sessions-suite-") as folder:
        return Suite(sys.argv[1:], Path(folder), _missing()).run()


if __name__ == "__main__":
    sys.exit(main())
