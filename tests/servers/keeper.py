"""Run one server for as long as standard input stays open.

The test process holds the other end of the pipe. However it ends, by SIGKILL too, the
pipe closes; then the keeper stops the server by its pid and removes its directory.
It runs as a script of its own and imports nothing beyond the standard library.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2
LOG_TAIL = 4000


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--stop", default="SIGTERM")
    parser.add_argument("--uid", type=int)
    parser.add_argument("--gid", type=int)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    identity: dict[str, Any] = {}
    if options.uid is not None:
        identity = {"user": options.uid, "group": options.gid, "extra_groups": []}
    log = options.directory / "server.log"
    try:
        with log.open("wb") as output:
            server = subprocess.Popen(
                options.command,
                cwd=options.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **identity,
            )
        if _wait(server):
            _stop(server, signal.Signals[options.stop])
            return 0
        sys.stdout.write(log.read_text(errors="replace")[-LOG_TAIL:])
        return 1
    finally:
        shutil.rmtree(options.directory, ignore_errors=True)


def _wait(server: subprocess.Popen[bytes]) -> bool:
    """Return whether the owner has gone (True) or the server has ended (False)."""
    while server.poll() is None:
        try:
            if select.select([0], [], [], POLL_SECONDS)[0] and not os.read(0, 1):
                return True
        except OSError:  # SIGTERM closed the pipe
            return True
    return False


def _stop(server: subprocess.Popen[bytes], how: signal.Signals) -> None:
    server.send_signal(how)
    try:
        server.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
