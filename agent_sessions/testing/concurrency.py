"""Many at once: tasks, threads, processes, callers that give up, and kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    """Assert that batches lie one after the other, each whole; give their names."""
    names = [found[start]["batch"] for start in range(0, len(found), BATCH)]
    assert_same(found, [item for name in names for item in batch(name)])
    assert len(names) == len(set(names)), "a batch was stored twice"
    return names


async def write(session: Any, writer: int, batches: int) -> None:
    for number in range(batches):
        await session.add_items(batch(f"{writer}.{number}"))


class ConcurrencyCases(ContractBase):
    async def test_writers_of_one_object(self) -> None:
        """16 tasks on one object: every batch is there, whole and in its order."""
        session = await self.open()

        await asyncio.gather(*(write(session, writer, 3) for writer in range(16)))
        self._assert_complete(await session.get_items(), writers=16, batches=3)

    @needs("reopen")
    async def test_writers_with_objects_of_their_own(self) -> None:
        """16 objects of one id: their first writes don't collide, none is lost."""
        session_id = self.new_id()

        sessions = [await self.open(session_id) for _ in range(16)]
        await asyncio.gather(*(write(s, n, 3) for n, s in enumerate(sessions)))
        found = await (await self.open(session_id)).get_items()
        self._assert_complete(found, writers=16, batches=3)

    def _assert_complete(
        self, found: list[Item], *, writers: int, batches: int
    ) -> None:
        names = assert_whole(found)
        assert len(names) == writers * batches
        for writer in range(writers):
            own = [name for name in names if name.startswith(f"{writer}.")]
            assert own == [f"{writer}.{number}" for number in range(batches)]

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

    async def test_pops_get_distinct_items(self) -> None:
        """24 pops at once on 20 items: each item once, and None for the others."""
        session = await self.filled(20)
        popped = await asyncio.gather(*(session.pop_item() for _ in range(24)))
        assert popped.count(None) == 4
        contents = texts([item for item in popped if item is not None])
        assert sorted(contents) == sorted(texts(messages(20)))
        assert await session.get_items() == []

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

    async def test_many_sessions_at_once(self) -> None:
        """32 conversations side by side don't mix."""
        sessions = [await self.open() for _ in range(32)]

        async def talk(number: int) -> None:
            for turn in range(3):
                await sessions[number].add_items(batch(f"{number}.{turn}"))
                await sessions[number].get_items(limit=2)

        await asyncio.gather(*(talk(number) for number in range(32)))
        for number, session in enumerate(sessions):
            expected = [f"{number}.{turn}" for turn in range(3)]
            assert assert_whole(await session.get_items()) == expected

    @each(CANCELLED)
    async def test_cancelled_call_is_settled(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> None:
        """A cancelled caller gets its cancellation when the outcome is settled.

        Then all of it has happened or nothing, and nothing happens afterwards.
        """
        for delay in (None, 0, 0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016):
            session = await self.filled(3)
            task = asyncio.ensure_future(operation(session))
            if delay is not None:
                await asyncio.sleep(delay)
            took = task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() is took
            settled = len(await session.get_items())
            assert settled in {3, 203} | {2, 0}
            await asyncio.sleep(0.05)
            assert len(await session.get_items()) == settled
            await session.add_items([message("goes on")])
            assert texts(await session.get_items(limit=1)) == ["goes on"]

    async def test_cancelled_twice(self) -> None:
        """Impatience doesn't help: a second cancel waits for the outcome as well."""
        session = await self.filled(3)
        task = asyncio.ensure_future(session.add_items(messages(200)))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        settled = len(await session.get_items())
        assert settled in {3, 203}
        await asyncio.sleep(0.05)
        assert len(await session.get_items()) == settled

    @needs("threads")
    def test_one_object_in_several_threads(self) -> None:
        """Loops in six threads share one object; batches stay whole."""
        session = self.run_coroutine(self.open)

        async def work(writer: int) -> None:
            for number in range(4):
                await session.add_items(batch(f"{writer}.{number}"))
                await session.get_items(limit=3)

        self._in_threads(work, 6)
        found = self.run_coroutine(session.get_items)
        self._assert_complete(found, writers=6, batches=4)

    @needs("threads", "reopen")
    def test_objects_of_several_threads(self) -> None:
        """Loops in six threads, each with an object of its own for the same id."""
        session = self.run_coroutine(self.open)

        async def work(writer: int) -> None:
            await write(await self.open(session.session_id), writer, 4)

        self._in_threads(work, 6)
        found = self.run_coroutine(session.get_items)
        self._assert_complete(found, writers=6, batches=4)

    def _in_threads(self, main: Callable[[int], Awaitable[None]], count: int) -> None:
        failures: list[BaseException] = []

        async def guarded(number: int) -> None:
            async with asyncio.timeout(self.timeout):
                await main(number)

        def work(number: int) -> None:
            try:
                asyncio.run(guarded(number))
            except BaseException as exc:
                failures.append(exc)

        threads = [
            threading.Thread(target=work, args=(number,)) for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

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


# Goes behind `process_source`. The process says when it has started, waits for the
# word, and then reports one JSON value a line.
SCRIPT = """
import asyncio, json, sys

def say(value):
    print(json.dumps(value), flush=True)

def batch(name):
    return [
        {{"role": "user", "content": f"{{name}} {{n}}", "batch": name, "number": n}}
        for n in range(5)
    ]

async def main():
    session = await make_session({session_id!r})
    await session.get_items(limit=1)
    say("ready")
    sys.stdin.readline()
{body}
    say("done")

asyncio.run(main())
"""

WRITE = """
    async def write(task):
        for number in range(10):
            await session.add_items(batch(f"{name}.{{task}}.{{number}}"))
    await asyncio.gather(*(write(task) for task in range(4)))
    say("written")
    sys.stdin.readline()
"""

POP = """
    async def pop():
        while (item := await session.pop_item()) is not None:
            say(item["content"])
    await asyncio.gather(*(pop() for _ in range(3)))
"""

WRITE_FOR_EVER = """
    number = 0
    while True:
        await session.add_items(batch(f"{name}.{{number}}"))
        say(number)
        number += 1
"""


def _tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the other process ended early; what it had to say is on stderr"
    return json.loads(line)


class ProcessCases(ContractBase):
    def process_environment(self) -> dict[str, str]:
        """Return the environment of the other processes; override to add to it."""
        return dict(os.environ)

    @contextmanager
    def _process(self, session_id: str, body: str) -> Iterator[subprocess.Popen[str]]:
        source = self.process_source() + SCRIPT.format(session_id=session_id, body=body)
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", source],
            env=self.process_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            with process:
                assert _hear(process) == "ready"
                yield process
        finally:
            process.kill()

    @needs("second_process")
    def test_writers_and_pops_of_several_processes(self) -> None:
        """Two processes of four writers each, and then three poppers each.

        Every batch is there and whole, and every item is popped once.
        """
        session = self.run_coroutine(self.open)
        with ExitStack() as stack:
            processes = [
                stack.enter_context(
                    self._process(session.session_id, WRITE.format(name=name) + POP)
                )
                for name in ("a", "b")
            ]
            for process in processes:
                _tell(process, "write")
            assert [_hear(process) for process in processes] == ["written"] * 2
            found = self.run_coroutine(session.get_items)
            for process in processes:
                _tell(process, "pop")
            popped = []
            for process in processes:
                while (said := _hear(process)) != "done":
                    popped.append(said)
        names = assert_whole(found)
        assert len(names) == 2 * 4 * 10
        for writer in {name.rpartition(".")[0] for name in names}:
            own = [name for name in names if name.startswith(f"{writer}.")]
            assert own == [f"{writer}.{number}" for number in range(10)]
        assert sorted(popped) == sorted(texts(found))
        assert self.run_coroutine(session.get_items) == []

    @needs("second_process")
    def test_killed_process_loses_nothing_acknowledged(self) -> None:
        """After kill -9 in mid-write: what was acknowledged is there, all of it whole."""
        session = self.run_coroutine(self.open)
        body = WRITE_FOR_EVER.format(name="a")
        with self._process(session.session_id, body) as process:
            _tell(process, "write")
            acknowledged = [_hear(process) for _ in range(25)]
            process.kill()
            assert process.stdout is not None
            acknowledged += [json.loads(line) for line in process.stdout]
        names = assert_whole(self.run_coroutine(session.get_items))
        assert names == [f"a.{number}" for number in range(len(names))]
        assert len(acknowledged) <= len(names) <= len(acknowledged) + 1
        self.run_coroutine(lambda: session.add_items([message("goes on")]))
        assert texts(self.run_coroutine(lambda: session.get_items(limit=1))) == [
            "goes on"
        ]
        assert batch("a.0")[0] == self.run_coroutine(session.get_items)[0]
