"""What the child processes do: write, read beside the writers, pop, be killed."""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import django
from django.apps import apps

Pipe = Connection

# How much the reader reads at first; more where more has come since its last look.
_WINDOW = 64
_PAUSE = 0.005


def work(role: str, environment: dict[str, str], pipe: Pipe, *args: Any) -> None:
    """Do what `role` says once told to; then say ("done", result) or ("failed", why)."""
    os.environ.update(environment)
    if not apps.ready:
        django.setup()
    # Whatever goes wrong is a finding, told where the others are.
    try:
        import agent_sessions.memory  # noqa: F401

        pipe.send(("ready", None))
        pipe.recv()
        result = _ROLES[role](pipe, *args)
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
    else:
        pipe.send(("done", result))


def write(pipe: Pipe, session_id: str, writers: range, batches: int) -> None:
    """Append each writer's batches, all writers at the same time in one loop."""
    from agent_sessions import DjangoSession
    from benchmarks.stress.history import batch

    async def one(writer: int) -> None:
        session = DjangoSession(session_id)
        for number in range(batches):
            await session.add_items(batch(writer, number))

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(one(writer))

    asyncio.run(all_of_them())


def read(pipe: Pipe, session_id: str) -> tuple[int, list[Any]]:
    """Read on until told to stop; give the number of reads and the items' order.

    Raises where an item has appeared before one that was read already, is gone, or
    where half a batch was seen.
    """
    from agent_sessions import DjangoSession
    from benchmarks.stress.history import is_last, token

    session = DjangoSession(session_id)
    seen: list[Any] = []

    async def look() -> int:
        limit, looks = _WINDOW, 0
        while True:
            found = [token(item) for item in await session.get_items(limit=limit)]
            looks += 1
            whole = len(found) < limit
            if found and not is_last(found[-1]):
                raise AssertionError(f"half a batch was seen: {found[-3:]}")
            known = 0 if whole else _from(seen, found[0])
            if known is not None:
                break
            limit *= 2
        if seen[known:] != found[: len(seen) - known]:
            raise AssertionError(
                f"after {known} items: {seen[known:][:40]} were read before, "
                f"now {found[:40]}"
            )
        seen.extend(found[len(seen) - known :])
        return looks

    async def until_told() -> int:
        looks = 0
        while not pipe.poll():
            looks += await look()
            await asyncio.sleep(_PAUSE)
        return looks + await look()

    return asyncio.run(until_told()), seen


def _from(seen: list[Any], first: Any) -> int | None:
    """Find where an item was read, from the end."""
    for index in range(len(seen) - 1, -1, -1):
        if seen[index] == first:
            return index
    return None


def pop(pipe: Pipe, session_id: str) -> list[Any]:
    """Pop until nothing is left; give what was popped."""
    from agent_sessions import DjangoSession
    from benchmarks.stress.history import token

    async def until_empty() -> list[Any]:
        session, popped = DjangoSession(session_id), []
        while (item := await session.pop_item()) is not None:
            popped.append(token(item))
        return popped

    return asyncio.run(until_empty())


def append(pipe: Pipe, session_id: str, writer: int) -> None:
    """Append batch after batch until killed; acknowledge each once it is stored."""
    from agent_sessions import DjangoSession
    from benchmarks.stress.history import batch

    session = DjangoSession(session_id)

    async def forever() -> None:
        number = 0
        while True:
            await session.add_items(batch(writer, number))
            os.write(pipe.fileno(), b"+")
            number += 1

    # Both faces in turn: the pool's connection and the caller's own.
    if writer % 2:
        asyncio.run(forever())
    number = 0
    while True:
        session.sync.add_items(batch(writer, number))
        os.write(pipe.fileno(), b"+")
        number += 1


_ROLES: dict[str, Callable[..., Any]] = {
    "append": append,
    "pop": pop,
    "read": read,
    "write": write,
}
