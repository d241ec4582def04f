"""How long writers wait while one long history, or many short ones, are cleared.

Processes of their own append all the time, one of them to the session that is cleared.
Printed is the longest that any of them waited for one append, before and meanwhile, and
the longest transaction of the command. It judges nothing unless --max-wait is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from django.core.management import call_command
from django.db import connections

from benchmarks.database import Database, configure, database

SESSION = "long"
CHUNK = 5_000
# Seconds that nobody should wait.
LONG = 0.2


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.clearing")
    parser.add_argument(
        "--database", choices=("postgresql", "sqlite"), default="postgresql"
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument(
        "--sessions",
        type=int,
        default=0,
        help="clear so many expired sessions instead of one; the items are theirs",
    )
    parser.add_argument("--size", type=int, default=300, help="bytes of an item's text")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.01, help="between two appends")
    parser.add_argument(
        "--before",
        type=float,
        default=30,
        metavar="SECONDS",
        help="how long to look at the writers alone, which shows what else disturbs them",
    )
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--delete", action="store_true", help="the session's row too")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="clear as session.clear() does, in one transaction, for comparison",
    )
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

    def ask(self) -> dict[str, Any]:
        """Return what the writer has seen since it was asked last."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
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
            taken = sorted(waits[:number]) or [0.0]
            del waits[:number]
            told = {
                "count": number,
                "median": taken[len(taken) // 2],
                "p99": taken[int(len(taken) * 0.99)],
                "longest": taken[-1],
                "over": sum(wait > LONG for wait in taken),
            }
            print(json.dumps(told), flush=True)
        ended.set()

    backend.append(key, [item])
    print("ready", flush=True)
    threading.Thread(target=answer, daemon=True).start()
    while not ended.is_set():
        began = time.perf_counter()
        backend.append(key, [item])
        waits.append(time.perf_counter() - began)
        ended.wait(pause)


def fill(options: argparse.Namespace) -> None:
    """Write the long history, or the short ones."""
    from agent_sessions.backends.base import SessionKey
    from agent_sessions.handler import sessions

    if options.sessions:
        fill_short(options)
        return
    backend, key = sessions["default"], SessionKey(SESSION)
    text = "word " * (options.size // 5)
    for start in range(0, options.items, CHUNK):
        count = min(CHUNK, options.items - start)
        backend.append(key, [{"role": "user", "content": text} for _ in range(count)])


def fill_short(options: argparse.Namespace) -> None:
    """Write sessions whose time is over."""
    from django.db.models import OuterRef, Subquery
    from django.utils import timezone

    from agent_sessions.items import encode_batch
    from agent_sessions.models import AgentSession, Branch, SessionItem

    each = options.items // options.sessions
    text = "word " * (options.size // 5)
    (drawn,) = encode_batch([{"role": "user", "content": text}]).rows
    columns = {name: getattr(drawn, name) for name in ("data", "type", "role", "text")}
    over = timezone.now()
    for start in range(0, options.sessions, CHUNK):
        rows = AgentSession.objects.bulk_create(
            AgentSession(session_id=f"short {n}", item_count=each, expires_at=over)
            for n in range(start, min(start + CHUNK, options.sessions))
        )
        branches = Branch.objects.bulk_create(
            Branch(session=row, head=each, turn=each) for row in rows
        )
        SessionItem.objects.bulk_create(
            SessionItem(branch=branch, position=n, turn=n, **columns)
            for branch in branches
            for n in range(1, each + 1)
        )
    main = Branch.objects.filter(session=OuterRef("pk")).values("pk")
    AgentSession.objects.filter(branch=None).update(branch=Subquery(main[:1]))


def timed(transactions: list[float], run: Callable[..., Any]) -> Callable[..., Any]:
    """Note how long each transaction of a function takes."""

    @wraps(run)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            transactions.append(time.perf_counter() - began)

    return wrapper


def measure(made: Database, options: argparse.Namespace) -> bool:
    """Fill, clear beside writers, and print; tell whether nobody waited too long."""
    from agent_sessions.backends.base import SessionKey
    from agent_sessions.handler import sessions
    from agent_sessions.models import SessionItem

    print(f"{made.version}: filling {options.items:,} items …", flush=True)
    fill(options)
    made.settle()
    backend: Any = sessions["default"]
    transactions: list[float] = []
    backend.engine.run = timed(transactions, backend.engine.run)
    with ExitStack() as stack:
        names = [SESSION, *(f"writer {n}" for n in range(1, options.writers))]
        writers = [Writer(name, options) for name in names[: options.writers]]
        for writer in writers:
            stack.callback(writer.close)
        for writer in writers:
            writer.ask()
        time.sleep(options.before)
        report("before", [writer.ask() for writer in writers])
        began = time.perf_counter()
        if options.at_once:
            timed(transactions, backend.clear)(SessionKey(SESSION))
        else:
            call_command(
                *("clear_agent_sessions", "--noinput", "--no-progress"),
                *([] if options.sessions else [SESSION]),
                *(["--delete"] if options.delete else []),
                batch_size=options.batch_size,
            )
        spent = time.perf_counter() - began
        meanwhile = [writer.ask() for writer in writers]
    report("meanwhile", meanwhile)
    left = SessionItem.objects.count()
    transactions.sort()
    print(
        f"  cleared in {spent:.1f} s by {len(transactions):,} transactions: median "
        f"{transactions[len(transactions) // 2] * 1000:.1f} ms, 99 % within "
        f"{transactions[int(len(transactions) * 0.99)] * 1000:.1f} ms, longest "
        f"{transactions[-1] * 1000:.1f} ms; {left:,} items are left, which "
        "the writers wrote"
    )
    longest = max(each["longest"] for each in meanwhile)
    return options.max_wait is None or longest <= options.max_wait


def report(when: str, found: list[dict[str, Any]]) -> None:
    """Print what writers have seen."""
    for number, each in enumerate(found):
        where = "the same session" if number == 0 else "another session"
        print(
            f"  {when}, {where}: {each['count']:,} appends, median "
            f"{each['median'] * 1000:.1f} ms, 99 % within {each['p99'] * 1000:.1f} ms, "
            f"longest {each['longest'] * 1000:.1f} ms, {each['over']} over "
            f"{LONG * 1000:.0f} ms"
        )


def main() -> int:
    """Run the benchmark, or one of its writers."""
    options = arguments()
    if options.writer:
        session_id, databases = options.writer
        write(session_id, databases, options.pause)
        return 0
    with database(options.database) as made:
        return 0 if measure(made, options) else 1


if __name__ == "__main__":
    sys.exit(main())
