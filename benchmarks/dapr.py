"""What an append costs over Dapr, at 10 and at 10,000 items, and what a read costs.

Our session is measured beside the SDK's, in turns, over one sidecar in a process of its
own: the tests' server, whose store is a dict, so that what is measured is how many
requests are made and how much they carry. Bytes are those of the messages, as the
sidecar counts them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.items import history, turn
from tests.servers.dapr import STORE

if TYPE_CHECKING:
    from dapr.aio.clients import DaprClient

# The SDK reads it when it is imported; nothing is traced here, but nothing asks either.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

LIMIT = 50
READS = 5
Results = dict[tuple[str, str, int], list[tuple[float, float, float]]]
SIZES = (10, 10_000)
# The SDK's one record of 10,000 items is larger than what a sidecar takes by default.
LARGEST = 64 * 1024 * 1024
SERVER = f"from tests.servers.dapr import main; main(['--max-bytes={LARGEST}'])"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.dapr")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--appends", type=int, default=32, help="appends a round")
    parser.add_argument(
        "--max-growth",
        type=float,
        metavar="X",
        help="exit with 1 where an append at 10,000 items costs more than X times as at 10",
    )
    return parser.parse_args(argv)


@contextmanager
def sidecar() -> Iterator[tuple[str, str]]:
    """Run a sidecar in a process of its own; give its gRPC and HTTP ports."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port, http_port = process.stdout.readline().split()
        yield port, http_port
    finally:
        process.stdin.close()
        process.wait()


async def traffic(client: DaprClient) -> tuple[int, int]:
    """Ask the sidecar for the bytes and requests that it has served."""
    found = (await client.get_metadata()).extended_metadata
    return int(found["bytes"]), int(found["requests"])


async def measured(
    client: DaprClient, work: Callable[[], Awaitable[object]], times: int
) -> tuple[float, float, float]:
    """Return seconds, bytes and requests of one piece of work, the mean of several."""
    before = await traffic(client)
    begun = time.perf_counter()
    for _ in range(times):
        await work()
    seconds = time.perf_counter() - begun
    after = await traffic(client)
    return (
        seconds / times,
        (after[0] - before[0]) / times,
        (after[1] - before[1]) / times,
    )


async def fill(session: Any, size: int) -> None:
    """Write a history; the first append after it seals what a batch left open."""
    await session.add_items(history(size))
    await session.add_items(turn(0))


@dataclass
class Append:
    """Append one turn."""

    session: Any

    async def __call__(self) -> None:
        await self.session.add_items(turn(1))


@dataclass
class Read:
    """Read the newest items, as a run does at its start."""

    session: Any

    async def __call__(self) -> None:
        await self.session.get_items(limit=LIMIT)


async def main(options: argparse.Namespace) -> int:
    """Measure and print; give the exit code."""
    from agents.extensions.memory.dapr_session import DaprSession as SDKDaprSession
    from dapr.aio.clients import DaprClient

    from agent_sessions import DaprSession

    kinds: dict[str, Callable[[str], Any]] = {
        "SDK DaprSession": lambda name: SDKDaprSession(
            name, state_store_name=STORE, dapr_client=client
        ),
        "DaprSession": lambda name: DaprSession(name, STORE, client),
    }
    async with DaprClient(max_grpc_message_length=LARGEST) as client:
        results: Results = {}
        for _ in range(options.rounds):
            for size in SIZES:
                for kind, make in kinds.items():
                    session = make(uuid.uuid4().hex)
                    await fill(session, size)
                    found = await measured(client, Append(session), options.appends)
                    results.setdefault(("append", kind, size), []).append(found)
                    found = await measured(client, Read(session), READS)
                    results.setdefault(("read 50", kind, size), []).append(found)
                    await session.clear_session()
    return report(options, results)


def report(
    options: argparse.Namespace,
    results: Results,
) -> int:
    """Print the medians over the rounds, and how an append grows."""
    print(
        f"Python {platform.python_version()}, dapr {version('dapr')}, "
        f"openai-agents {version('openai-agents')}, {options.rounds} rounds of "
        f"{options.appends} appends"
    )
    print(f"{'':24}{'items':>8}{'ms':>10}{'KB':>10}{'requests':>10}")
    medians = {
        key: [median(values) for values in zip(*rounds, strict=True)]
        for key, rounds in results.items()
    }
    for (what, kind, size), (seconds, carried, requests) in sorted(medians.items()):
        print(
            f"{what + ' ' + kind:24}{size:>8}{seconds * 1000:>10.2f}"
            f"{carried / 1000:>10.1f}{requests:>10.1f}"
        )
    growths = {}
    for kind in ("SDK DaprSession", "DaprSession"):
        short, long = (results["append", kind, size] for size in SIZES)
        pairs = list(zip(short, long, strict=True))
        growths[kind] = median(b[0] / a[0] for a, b in pairs)
        bytes_growth = median(b[1] / a[1] for a, b in pairs)
        print(
            f"{kind}: at {SIZES[1]} items an append takes {growths[kind]:.2f} times "
            f"the time and {bytes_growth:.2f} times the bytes"
        )
    too_much = options.max_growth and growths["DaprSession"] > options.max_growth
    return int(bool(too_much))


if __name__ == "__main__":
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")
    chosen = arguments()
    django.setup()
    with sidecar() as (grpc_port, http_port):
        os.environ |= {"DAPR_GRPC_PORT": grpc_port, "DAPR_HTTP_PORT": http_port}
        sys.exit(asyncio.run(main(chosen)))
