"""A server that a test kills and starts again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.servers.process import HOST, START_SECONDS, Recipe, free_port, prepare


class Mortal:
    """A server on a port and in a directory that stay when it is killed."""

    host = HOST

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.directory, identity = prepare(recipe)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {}
        if identity is not None:
            user, group = identity
            self._as = {"user": user, "group": group, "extra_groups": []}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while not (self._process and self.recipe.ready(self.port)):
            assert time.monotonic() < deadline, f"{self.recipe.name} doesn't start"
            if self._process is None or self._process.poll() is not None:
                # What a killed server leaves behind may take a moment to go.
                self._process = subprocess.Popen(
                    self.recipe.command(self.directory, self.port),
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    **self._as,
                )
            time.sleep(0.05)

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        if self._process is not None:
            # PostgreSQL's own processes would go on for a moment.
            children = _children(self._process.pid)
            self._process.kill()
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            self._process.wait(START_SECONDS)
            self._process = None

    def stop(self) -> None:
        """End it for good."""
        if self._process is not None and self.recipe.name == "postgres":
            # Only so does it give back the memory that its processes share.
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_SECONDS)
            self._process = None
        self.kill()


def _children(pid: int) -> list[int]:
    """Return the processes that a process has begun, where the system tells."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return (
        [int(each) for each in children.read_text().split()]
        if children.exists()
        else []
    )


@contextmanager
def mortal(recipe: Recipe) -> Iterator[Mortal]:
    """Run a server that may be killed, and remove what is left of it."""
    server = Mortal(recipe)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.directory, ignore_errors=True)
