"""A server that a test kills and starts again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
            # PostgreSQL's own processes die with it by this one, without a last word.
            is_many = self.recipe.name == "postgres"
            self._process.send_signal(signal.SIGQUIT if is_many else signal.SIGKILL)
            self._process.wait(START_SECONDS)
            self._process = None


@contextmanager
def mortal(recipe: Recipe) -> Iterator[Mortal]:
    """Run a server that may be killed, and remove what is left of it."""
    server = Mortal(recipe)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.directory, ignore_errors=True)
