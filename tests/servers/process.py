"""Start a real server in a directory of its own and stop it again."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_SECONDS = 60.0
ATTEMPTS = 3


class ServerError(Exception):
    """A server did not start; the message ends with its own log."""


@dataclass(frozen=True)
class Server:
    """Where a running server listens."""

    host: str
    port: int
    directory: Path
    pid: int  # of the keeper; the server is its child


@dataclass(frozen=True)
class Recipe:
    """How to run one kind of server.

    `command` gets the directory and the port; `ready` gets the port and tells whether
    the server answers.
    """

    name: str
    command: Callable[[Path, int], Sequence[str]]
    ready: Callable[[int], bool]
    prepare: Callable[[Path], None] = lambda directory: None
    stop: str = "SIGTERM"
    unprivileged: bool = False  # refuses to run as root


@contextmanager
def serve(recipe: Recipe) -> Iterator[Server]:
    """Run a server until the block ends, or the process does."""
    keeper, server = _start(recipe)
    try:
        yield server
    finally:
        _close(keeper)


def nobody() -> tuple[int, int] | None:
    """Return the ids that a server takes which won't run as root."""
    if os.geteuid():
        return None
    entry = pwd.getpwnam("nobody")
    return entry.pw_uid, entry.pw_gid


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def prepare(recipe: Recipe) -> tuple[Path, tuple[int, int] | None]:
    """Make a server's directory; give it, and as whom the server is to run."""
    directory = Path(tempfile.mkdtemp(prefix=f"agent-sessions-{recipe.name}-"))
    identity = nobody() if recipe.unprivileged else None
    if identity is not None:
        os.chown(directory, *identity)
    recipe.prepare(directory)
    return directory, identity


def _start(recipe: Recipe) -> tuple[subprocess.Popen[str], Server]:
    # Somebody else may take the port between its choice and the server's start.
    failure = ServerError(f"{recipe.name} did not start.")
    for _ in range(ATTEMPTS):
        directory, identity = prepare(recipe)
        port = free_port()
        keeper = _keep(recipe, directory, port, identity)
        try:
            _await_ready(recipe, keeper, port)
        except ServerError as exc:
            failure = exc
            continue
        except BaseException:
            _close(keeper)
            raise
        return keeper, Server(HOST, port, directory, keeper.pid)
    raise failure


def _keep(
    recipe: Recipe, directory: Path, port: int, identity: tuple[int, int] | None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", str(Path(__file__).with_name("keeper.py"))]
    command += [f"--directory={directory}", f"--stop={recipe.stop}"]
    if identity is not None:
        command += [f"--uid={identity[0]}", f"--gid={identity[1]}"]
    # A session of its own, so that Ctrl-C reaches pytest and not the server.
    return subprocess.Popen(
        [*command, "--", *recipe.command(directory, port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _await_ready(recipe: Recipe, keeper: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not recipe.ready(port):
        if keeper.poll() is not None:
            log = _close(keeper)
            raise ServerError(f"{recipe.name} ended at its start:\n{log}")
        if time.monotonic() > deadline:
            _close(keeper)
            raise ServerError(f"{recipe.name} didn't answer in {START_SECONDS:g} s.")
        time.sleep(0.02)


def _close(keeper: subprocess.Popen[str]) -> str:
    """Ask the keeper to stop its server; return what it printed."""
    output, _ = keeper.communicate()
    return output
