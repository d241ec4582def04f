"""A network of its own: a TCP proxy that holds back what goes to the server.

`python -m benchmarks.delay HOST PORT SECONDS` prints the port that it listens on.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HOST = "127.0.0.1"
_CHUNK = 1 << 16


@contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """Return a port that leads to a port of this machine, a round trip later."""
    command = [sys.executable, "-m", "benchmarks.delay", HOST, str(port), str(seconds)]
    # A process of its own, so that it doesn't compete for the interpreter.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            yield int(proxy.stdout.readline())
        finally:
            proxy.terminate()


async def serve(host: str, port: int, seconds: float) -> None:
    """Pass on what comes, to the server after a delay and back at once."""

    async def connect(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(
            _pass_on(reader, server_writer, seconds), _pass_on(server_reader, writer, 0)
        )

    async with await asyncio.start_server(connect, HOST, 0) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            if seconds:
                # Later chunks come later: the order stays.
                loop.call_later(seconds, writer.write, data)
            else:
                writer.write(data)
    loop.call_later(seconds, writer.close)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
