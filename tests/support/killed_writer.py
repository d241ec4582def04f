"""Processes that are killed while they write to encrypted sessions, for tests.

`python -m tests.support.killed_writer SETTING` reads AGENT_SESSIONS as JSON and lets one child
after the other be killed with SIGKILL. It prints a line of JSON for each: the session,
the batches that the child acknowledged, and whether it was killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import django

# Called with a batch's number once it is stored.
Acknowledge = Callable[[int], None]
# Seconds from the first batch on.
LONGEST_LIFE = 0.1
KILLS = 6
# More statements than a write has.
NEVER = 100


def batch(session_id: str, number: int) -> list[Any]:
    """Make a batch of three items."""
    text = f"the treasure of {session_id}, batch {number}"
    return [{"role": "user", "content": f"{text}, item {nth}"} for nth in range(3)]


def main() -> None:
    from agent_sessions import get_session

    get_session("warm", backend="private").sync.get_items()
    dies_at(NEVER, "old", first=0)
    for point in range(NEVER):
        killed = dies_at(point, "old", first=point + 1)
        dies_at(point, f"new-{point}", first=0)
        if not killed:
            break
    chance = random.Random(0)  # noqa: S311
    for number in range(KILLS):
        dies_within(chance.uniform(0, LONGEST_LIFE), f"busy-{number}", number % 2 == 1)


def dies_at(point: int, session_id: str, first: int) -> bool:
    """Run a child that writes one batch and dies before that statement or the commit."""

    def write(acknowledge: Acknowledge) -> None:
        dies_before(point)
        append(session_id, first)
        acknowledge(first)

    return run(session_id, write, None)


def dies_within(seconds: float, session_id: str, is_async: bool) -> bool:
    """Run a child that writes batch after batch, and kill it meanwhile."""

    def write(acknowledge: Acknowledge) -> None:
        from agent_sessions import get_session

        async def forever() -> None:
            session = get_session(session_id, backend="private")
            number = 0
            while True:
                await session.add_items(batch(session_id, number))
                acknowledge(number)
                number += 1

        if is_async:
            asyncio.run(forever())
        number = 0
        while True:
            append(session_id, number)
            acknowledge(number)
            number += 1

    return run(session_id, write, seconds)


def append(session_id: str, number: int) -> None:
    from agent_sessions import get_session

    session = get_session(session_id, backend="private")
    session.sync.add_items(batch(session_id, number))


def dies_before(point: int) -> None:
    """End this process before the statement of that number, or the commit."""
    from django.db import connection
    from django.db.backends.base.base import BaseDatabaseWrapper

    left = point
    commit = BaseDatabaseWrapper._commit  # type: ignore[attr-defined]

    def step() -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def execute(execute: Any, *arguments: Any) -> Any:
        step()
        return execute(*arguments)

    def last(wrapper: Any) -> Any:
        step()
        return commit(wrapper)

    connection.ensure_connection()
    connection.execute_wrappers.append(execute)
    BaseDatabaseWrapper._commit = last  # type: ignore[attr-defined]


def run(
    session_id: str, write: Callable[[Acknowledge], None], seconds: float | None
) -> bool:
    """Write in a child, killed after some seconds; print what became of it."""
    from django.db import connections

    # A child needs connections of its own.
    connections.close_all()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        write(lambda number: _say(writing, number))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = []
        if seconds is not None:
            # However busy the machine is, it is killed among its writes.
            lines.append(pipe.readline())
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        acknowledged = [int(line) for line in [*lines, *pipe]]
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        sys.exit(f"a child failed with status {status}")
    sys.stdout.write(json.dumps([session_id, acknowledged, killed]) + "\n")
    sys.stdout.flush()
    return killed


def _say(pipe: int, number: int) -> None:
    os.write(pipe, f"{number}\n".encode())


if __name__ == "__main__":
    django.setup()
    from django.test import override_settings

    with override_settings(AGENT_SESSIONS=json.loads(sys.argv[1])):
        main()
