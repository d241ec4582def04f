"""How long writers wait while long and short sessions are removed, and what it costs.

Three deeds on a database with very many sessions: the long session is cleared, a person
with 2,000 sessions is erased, and all short sessions are cleared. Processes of their own
append all the time. Printed are the command's time, rate, transactions and statements,
the rows and buffers that PostgreSQL touched, writers' ones among them, and how long
writers waited. It judges nothing unless --max-wait is given.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from django.core.management import call_command
from django.db import connection, connections

from benchmarks.crowd import HEAVY, LONG, Crowd, fill, parsed, settle
from benchmarks.database import configure, database

# Seconds that nobody should wait.
WAIT = 0.2


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parsed(__doc__, "benchmarks.clearing")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.01, help="between two appends")
    parser.add_argument(
        "--before",
        type=float,
        default=5,
        metavar="SECONDS",
        help="how long to look at the writers alone, which shows what else disturbs them",
    )
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument(
        "--max-wait",
        type=float,
        metavar="SECONDS",
        help="exit with 1 where a writer waited longer",
    )
    # How this script calls itself for a writer.
    parser.add_argument("--writer", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Writer:
    """A process that appends to one session until it is told to stop."""

    def __init__(self, session_id: str, options: argparse.Namespace) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.clearing"),
                *("--pause", str(options.pause)),
                *("--writer", session_id, json.dumps(connections.settings)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def ask(self) -> list[float]:
        """Return how long each append took since the writer was asked last."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: list[float] = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def write(session_id: str, databases: str, pause: float) -> None:
    """Append until standard input ends; answer each line of it."""
    configure(json.loads(databases))
    from agent_sessions.backends.base import SessionKey
    from agent_sessions.handler import sessions

    backend, key = sessions["default"], SessionKey(session_id)
    item = {"role": "user", "content": "Hello"}
    waits: list[float] = []
    ended = threading.Event()

    def answer() -> None:
        for _ in sys.stdin:
            number = len(waits)
            print(json.dumps(waits[:number]), flush=True)
            del waits[:number]
        ended.set()

    backend.append(key, [item])
    print("ready", flush=True)
    threading.Thread(target=answer, daemon=True).start()
    while not ended.is_set():
        began = time.perf_counter()
        backend.append(key, [item])
        waits.append(time.perf_counter() - began)
        ended.wait(pause)


@dataclass
class Deed:
    """What a command took."""

    seconds: float = 0.0
    transactions: list[float] = field(default_factory=list)
    statements: int = 0
    # Of PostgreSQL alone.
    rows: int = 0
    buffers: int = 0

    def timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Note how long each transaction of a function takes."""

        @wraps(run)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.transactions.append(time.perf_counter() - began)

        return wrapper

    def __call__(self, execute: Any, *given: Any) -> Any:
        self.statements += 1
        return execute(*given)


def counters() -> tuple[int, int]:
    """Return how many rows and buffers PostgreSQL has touched so far."""
    if connection.vendor != "postgresql":
        return 0, 0
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute(
            "SELECT tup_returned + tup_fetched, blks_hit + blks_read "
            "FROM pg_stat_database WHERE datname = current_database()"
        )
        rows, buffers = cursor.fetchone()
        return int(rows), int(buffers)


def do(command: str, *args: str, **options: Any) -> Deed:
    """Run a command, and count what it does."""
    from agent_sessions.handler import sessions

    deed, engine = Deed(), sessions.database().in_database.engine  # type: ignore[union-attr]
    run, engine.run = engine.run, deed.timed(engine.run)  # type: ignore[method-assign]
    before = counters()
    began = time.perf_counter()
    try:
        with connection.execute_wrapper(deed):
            out: Any = {"stdout": io.StringIO(), "verbosity": 0}
            call_command(command, *args, "--noinput", **out, **options)
    finally:
        engine.run = run  # type: ignore[method-assign]
    deed.seconds = time.perf_counter() - began
    after = counters()
    deed.rows, deed.buffers = (
        new - old for new, old in zip(after, before, strict=True)
    )
    return deed


def report(name: str, sessions: int, items: int, deed: Deed) -> None:
    """Print what a command took."""
    each = sorted(deed.transactions) or [0.0]
    print(
        f"{name}: {sessions:,} sessions, {items:,} items in {deed.seconds:.1f} s "
        f"({sessions / deed.seconds:,.0f} sessions/s, {items / deed.seconds:,.0f} "
        f"items/s), {len(deed.transactions):,} transactions of {sum(each):.1f} s "
        f"(longest {each[-1] * 1000:.0f} ms), {deed.statements:,} statements, "
        f"{deed.rows:,} rows, {deed.buffers:,} buffers"
    )


def report_waits(when: str, found: list[list[float]]) -> float:
    """Print how long writers waited; return the longest time."""
    waits = sorted(wait for waits in found for wait in waits) or [0.0]
    over = sum(wait > WAIT for wait in waits)
    print(
        f"  {when}: {len(waits):,} appends, median {waits[len(waits) // 2] * 1000:.1f} "
        f"ms, 99 % within {waits[int(len(waits) * 0.99)] * 1000:.1f} ms, longest "
        f"{waits[-1] * 1000:.0f} ms, {over} over {WAIT * 1000:.0f} ms",
        flush=True,
    )
    return waits[-1]


def measure(crowd: Crowd, options: argparse.Namespace) -> bool:
    """Do it all; tell whether nobody waited too long."""
    from agent_sessions.models import AgentSession

    size = {"batch_size": options.batch_size}
    heavy = AgentSession.objects.filter(user_id=HEAVY).exclude(pk=LONG).count()
    deeds: list[tuple[str, tuple[str, ...], int]] = [
        ("the long session", ("clear_agent_sessions", f"session-{LONG}"), 1),
        ("a person", ("erase_agent_user", f"user{HEAVY}"), heavy),
        ("short ones", ("clear_agent_sessions", "--all"), crowd.sessions - heavy - 1),
    ]
    longest = 0.0
    with ExitStack() as stack:
        names = (f"writer {n}" for n in range(options.writers))
        writers = [Writer(name, options) for name in names]
        for writer in writers:
            stack.callback(writer.close)
        time.sleep(options.before)
        report_waits("writers alone", [writer.ask() for writer in writers])
        for name, command, sessions in deeds:
            for writer in writers:
                writer.ask()
            deed = do(*command, **size)
            items = crowd.items if sessions == 1 else sessions * 10
            report(name, sessions, items, deed)
            waits = [writer.ask() for writer in writers]
            longest = max(longest, report_waits("meanwhile", waits))
    return options.max_wait is None or longest <= options.max_wait


def main() -> int:
    """Run the benchmark, or one of its writers."""
    options = arguments()
    if options.writer:
        session_id, databases = options.writer
        write(session_id, databases, options.pause)
        return 0
    crowd = Crowd.scaled(options.scale)
    with database(options.database) as made:
        print(f"{made.version}: {crowd},", end=" ", flush=True)
        began = time.perf_counter()
        fill(crowd)
        settle()
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
        return 0 if measure(crowd, options) else 1


if __name__ == "__main__":
    sys.exit(main())
