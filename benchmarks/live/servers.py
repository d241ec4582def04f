"""Server processes of one database, a plain proxy before them, and what they share."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.stress.places import place
from tests.browser.demo import free_port
from tests.servers.valkey import valkey

HOST = "127.0.0.1"
# Slow, loaded machines start a server in tens of seconds.
PATIENCE = 90


@dataclass
class Site:
    """What the servers of one site have in common."""

    environment: dict[str, str]
    log: Path
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> tuple[subprocess.Popen[bytes], int]:
        """Start a server; return it and its port, at which it doesn't answer yet."""
        port = free_port()
        command = ["uvicorn", "benchmarks.live.served:application"]
        process = subprocess.Popen(
            [sys.executable, "-m", *command, f"--port={port}", "--log-level=error"],
            env=os.environ | self.environment,
        )
        self._processes.append(process)
        return process, port

    def close(self) -> None:
        """Kill all servers."""
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def site(database: str, *, redis: bool, pace: float) -> Iterator[Site]:
    """Make an empty database, and a channel layer if one is wanted."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        environment = stack.enter_context(place(database))
        log = Path(folder) / "log"
        log.touch()
        environment |= {"BENCH_LOG": str(log), "BENCH_PACE": str(pace)}
        if redis:
            server = stack.enter_context(valkey())
            url = f"redis://{server.host}:{server.port}/0"
            environment["AGENT_SESSIONS_TEST_LAYER"] = url
        made = Site(environment, log)
        stack.callback(made.close)
        yield made


async def answers(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server listens."""
    async with asyncio.timeout(PATIENCE):
        while True:
            if process.poll() is not None:
                raise RuntimeError("a server ended at its start")
            with suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, port)
                writer.close()
                return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def proxy(ports: list[int]) -> AsyncIterator[int]:
    """Pass each connection on to the next server in turn; return the proxy's port."""
    turns = itertools.cycle(ports)

    async def serve(reader: Any, writer: Any) -> None:
        there, back = await asyncio.open_connection(HOST, next(turns))
        await asyncio.gather(_copy(reader, back), _copy(there, writer))

    server = await asyncio.start_server(serve, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _copy(reader: Any, writer: Any) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
