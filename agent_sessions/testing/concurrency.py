"""Concurrent tasks and threads, and callers that are cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agent_sessions.testing.base import (
    ContractBase,
    Item,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)

BATCH = 5
CANCELLED: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "add": lambda session: session.add_items(messages(200, prefix="late")),
    "pop": lambda session: session.pop_item(),
    "clear": lambda session: session.clear_session(),
}


def batch(name: str) -> list[Item]:
    """Make a batch whose items say which they are, to find it again whole."""
    return [
        {**message(f"{name} {number}"), "batch": name, "number": number}
        for number in range(BATCH)
    ]


def assert_whole(found: list[Item]) -> list[str]:
    """Assert that batches lie one after the other, each whole; return their names."""
    names = [found[start]["batch"] for start in range(0, len(found), BATCH)]
    assert_same(found, [item for name in names for item in batch(name)])
    assert len(names) == len(set(names)), "a batch was stored twice"
    return names


def assert_complete(found: list[Item], *, writers: int, batches: int) -> None:
    names = assert_whole(found)
    assert len(names) == writers * batches
    for writer in range(writers):
        own = [name for name in names if name.startswith(f"{writer}.")]
        assert own == [f"{writer}.{number}" for number in range(batches)]


async def write(session: Any, writer: int, batches: int) -> None:
    for number in range(batches):
        await session.add_items(batch(f"{writer}.{number}"))


class ConcurrencyCases(ContractBase):
    async def test_writers_of_one_object(self) -> None:
        """16 tasks on one object: every batch is there, whole and in its order."""
        session = await self.open()
        await asyncio.gather(*(write(session, writer, 3) for writer in range(16)))
        assert_complete(await session.get_items(), writers=16, batches=3)

    @needs("reopen")
    async def test_writers_with_objects_of_their_own(self) -> None:
        """16 objects of one id: their first writes don't collide, none is lost."""
        session_id = self.new_id()
        sessions = [await self.open(session_id) for _ in range(16)]
        await asyncio.gather(*(write(s, n, 3) for n, s in enumerate(sessions)))
        assert_complete(await sessions[0].get_items(), writers=16, batches=3)

    async def test_reader_beside_writers(self) -> None:
        """Each read continues the one before: nothing appears before what was seen."""
        session = await self.open()
        done = asyncio.Event()

        async def read() -> None:
            seen: list[Item] = []
            while not done.is_set():
                found = await session.get_items()
                assert found[: len(seen)] == seen
                assert_whole(found)
                seen = found
                await asyncio.sleep(0)

        reader = asyncio.create_task(read())
        await asyncio.gather(*(write(session, writer, 4) for writer in range(8)))
        done.set()
        await reader

    async def test_pops_beside_writers(self) -> None:
        """What was written is popped or still there, never both and never neither."""
        session = await self.open()

        async def pop() -> list[Item | None]:
            return [await session.pop_item() for _ in range(8)]

        popping = asyncio.gather(*(pop() for _ in range(4)))
        await asyncio.gather(*(write(session, writer, 5) for writer in range(4)))
        popped = [item for items in await popping for item in items if item]
        found = Counter(texts([*popped, *await session.get_items()]))
        written = [batch(f"{w}.{n}") for w in range(4) for n in range(5)]
        assert found == Counter(texts([item for items in written for item in items]))

    async def test_clear_beside_writers(self) -> None:
        """A clear takes whole batches or leaves them."""
        session = await self.open()

        async def clear() -> None:
            for _ in range(3):
                await asyncio.sleep(0.005)
                await session.clear_session()

        await asyncio.gather(
            clear(), *(write(session, writer, 4) for writer in range(6))
        )
        assert_whole(await session.get_items())
        await session.clear_session()
        assert await session.get_items() == []

    @each(CANCELLED)
    async def test_cancelled_call_is_settled(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """A cancelled caller gets its cancellation when the outcome is settled.

        Then all of it has happened or nothing, and nothing happens afterwards. Further
        cancels wait for the outcome as well.
        """
        delays = (None, 0, 0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
        for number, delay in enumerate(delays):
            session = await self.filled(3)
            task = asyncio.ensure_future(operation(session))
            if delay is not None:
                await asyncio.sleep(delay)
            took = task.cancel()
            for _ in range(number % 3):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() is took
            settled = len(await session.get_items())
            assert settled in {3, 203} | {2, 0}
            await asyncio.sleep(0.05)
            assert len(await session.get_items()) == settled
            await session.add_items([message("goes on")])
            assert texts(await session.get_items(limit=1)) == ["goes on"]

    @needs("threads", "reopen")
    @each({"one_object": True, "objects": False})
    def test_several_threads(self, shared: bool) -> None:
        """Loops in six threads share one object, or have one each of the same id."""
        session = self.run_coroutine(self.open)

        async def work(writer: int) -> None:
            async with asyncio.timeout(self.timeout):
                own = session if shared else await self.open(session.session_id)
                for number in range(4):
                    await own.add_items(batch(f"{writer}.{number}"))
                    await own.get_items(limit=3)

        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(asyncio.run, work(n)) for n in range(6)]:
                future.result()
        assert_complete(self.run_coroutine(session.get_items), writers=6, batches=4)

    @needs("owner")
    async def test_first_writers_of_two_owners(self) -> None:
        """Two users write first to one id: one gets it, and nothing is mixed."""
        users = [await self.make_user(name) for name in ("alice", "bob")]
        session_id = self.new_id()
        sessions = [await self.open(session_id, user=user) for user in users * 4]
        outcomes = await asyncio.gather(
            *(s.add_items(batch(f"{n % 2}.{n}")) for n, s in enumerate(sessions)),
            return_exceptions=True,
        )
        lost = [o is not None for o in outcomes]
        errors = {type(outcome) for outcome in outcomes if outcome is not None}
        assert lost in ([False, True] * 4, [True, False] * 4)
        assert all(issubclass(error, self.foreign_error) for error in errors)
        winner = 0 if not lost[0] else 1
        found = await sessions[winner].get_items()
        assert {name.split(".")[0] for name in assert_whole(found)} == {str(winner)}
        assert len(found) == 4 * BATCH
