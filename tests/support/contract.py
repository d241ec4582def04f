"""The contract of this project's own stores: with `session.sync`, and by processes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar

import pytest
from django.contrib.auth import get_user_model
from pytest_django import DjangoDbBlocker

from agent_sessions import sessions
from agent_sessions.models import AgentSession
from agent_sessions.testing import SessionContract
from agent_sessions.testing.base import (
    ContractBase,
    assert_same,
    message,
    messages,
    needs,
    texts,
)
from agent_sessions.testing.writing import assert_whole, batch

T = TypeVar("T")


class SyncCases(ContractBase):
    supports_sync: ClassVar[bool] = True

    @needs("sync")
    def test_sync_twins(self) -> None:
        """Each twin does what its coroutine does, without a loop."""
        session = self.run_coroutine(self.open)
        assert session.sync.get_items() == []
        assert session.sync.pop_item() is None
        session.sync.add_items(messages(4))
        assert_same(session.sync.get_items(), messages(4))
        assert texts(session.sync.get_items(2)) == ["item 2", "item 3"]
        assert texts(session.sync.get_items(limit=1)) == ["item 3"]
        assert_same(session.sync.pop_item(), message("item 3"))
        session.sync.clear()
        assert session.sync.get_items() == []

    @needs("sync")
    def test_sync_and_async_share_the_history(self) -> None:
        """What one face writes the other reads."""
        session = self.run_coroutine(self.open)
        session.sync.add_items([message("sync")])
        self.run_coroutine(lambda: session.add_items([message("async")]))
        assert texts(session.sync.get_items()) == ["sync", "async"]
        assert texts(self.run_coroutine(session.get_items)) == ["sync", "async"]
        assert_same(session.sync.pop_item(), message("async"))
        self.run_coroutine(session.clear_session)
        assert session.sync.get_items() == []

    @needs("sync")
    def test_sync_twins_follow_the_settings(self) -> None:
        """The limit of the settings counts here too."""
        session = self.run_coroutine(lambda: self.open(session_settings={"limit": 2}))
        session.sync.add_items(messages(4))
        assert texts(session.sync.get_items()) == ["item 2", "item 3"]
        assert len(session.sync.get_items(limit=3)) == 3

    @needs("sync")
    def test_sync_add_refuses_what_is_not_json(self) -> None:
        """All or nothing, as with the coroutine."""
        session = self.run_coroutine(self.open)
        with pytest.raises((ValueError, TypeError)):
            session.sync.add_items([message("good"), {"score": math.nan}])
        assert session.sync.get_items() == []

    @needs("sync", "owner")
    def test_sync_twins_keep_others_out(self) -> None:
        """A foreign session does not exist through this door either."""
        alice = self.run_coroutine(lambda: self.make_user("alice"))
        bob = self.run_coroutine(lambda: self.make_user("bob"))
        owned = self.run_coroutine(lambda: self.filled(2, user=alice))
        foreign = self.run_coroutine(lambda: self.open(owned.session_id, user=bob))
        for call in (
            foreign.sync.get_items,
            foreign.sync.pop_item,
            foreign.sync.clear,
            lambda: foreign.sync.add_items(messages(1)),
        ):
            with pytest.raises(self.foreign_error):
                call()
        assert_same(owned.sync.get_items(), messages(2))


# Goes behind `process_source`. The process says when it has started, waits for a line
# on stdin, and then reports one JSON value a line.
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
    supports_second_process: ClassVar[bool] = False
    """`process_source` opens the same store in another process."""

    def process_source(self) -> str:
        """Return Python source that opens the same store in a fresh process.

        It must define `async def make_session(session_id)`.
        """
        raise NotImplementedError

    def process_environment(self) -> dict[str, str]:
        """Return the environment of the other processes; override to add to it."""
        return dict(os.environ)

    @contextmanager
    def _process(self, session_id: str, body: str) -> Iterator[subprocess.Popen[str]]:
        source = self.process_source() + SCRIPT.format(session_id=session_id, body=body)
        process = subprocess.Popen(
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


class StoreContract(SyncCases, ProcessCases, SessionContract):
    """All cases of a store of this project."""


class OnThePool:
    """No transaction is open: threads and processes see the rows, several at once."""

    @pytest.fixture(scope="class")
    @classmethod
    def transactional_db(
        cls, django_db_setup: None, django_db_blocker: DjangoDbBlocker
    ) -> Iterator[None]:
        """Keep rows to the end of the class: each case has sessions of its own.

        pytest-django's fixture empties all tables after each case, which takes longer
        than most cases.
        """
        with django_db_blocker.unblock():
            yield
            sessions.reset()
            AgentSession.objects.all().delete()
            get_user_model().objects.all().delete()

    @pytest.fixture(autouse=True)
    def _database(self, database_environment: dict[str, str]) -> None:
        self.environment = database_environment

    def run_coroutine(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run(main())

    def process_environment(self) -> dict[str, str]:
        return self.environment
