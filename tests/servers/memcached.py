"""Memcached from the machine, or from apt (`tests.servers.provision`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.servers.process import HOST, Recipe, Server, serve

_PLACES = os.pathsep.join(("/usr/bin", "/usr/sbin", "/usr/local/bin"))


def program() -> str | None:
    """Find the server."""
    return shutil.which("memcached") or shutil.which("memcached", path=_PLACES)


def missing() -> str | None:
    """Return what Memcached lacks to run here, if anything."""
    if not program():
        return "Memcached is missing: apt-get install memcached"
    if not find_spec("pymemcache"):
        return "the client of Memcached is missing: pip install pymemcache"
    return None


@contextmanager
def memcached() -> Iterator[Server]:
    """Run a Memcached server."""
    with serve(Recipe(name="memcached", command=_command, ready=_ready)) as server:
        yield server


def _command(directory: Path, port: int) -> list[str]:
    user = [] if os.geteuid() else ["-u", "root"]
    return [program() or "memcached", *user, "-l", HOST, "-p", str(port), "-U", "0"]


def _ready(port: int) -> bool:
    from pymemcache import Client

    try:
        client = Client((HOST, port))
        client.version()
        client.close()
    except OSError:
        return False
    return True
