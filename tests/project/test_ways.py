"""The main ways through the code lead through few files."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from agent_sessions import get_session, sessions
from agent_sessions.testing.base import say, scripted
from tests.support.chat import Socket, create_conversation, make_user

PACKAGE = f"{Path(__file__).parents[2]}/agent_sessions/"

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]


class Way:
    """Collect the files on the stack whenever a statement is executed or a frame sent.

    The stack is that of the call and of the coroutines that wait. `through` narrows it
    to calls that come through this file.
    """

    def __init__(self, through: str = "") -> None:
        self.files: set[str] = set()
        self._through = through and PACKAGE + through
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine function with a profile, also in the backend's threads."""
        sessions.reset()  # so that threads are made anew
        before = sys.getprofile()
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        try:
            asyncio.run(main())
        finally:
            sys.setprofile(before)
            threading.setprofile(None)

    @contextmanager
    def followed(self) -> Iterator[None]:
        self._loop = asyncio.get_running_loop()
        yield
        self._loop = None

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        is_sql = event == "c_call" and arg.__name__ == "execute"
        is_frame = event == "call" and frame.f_code.co_name == "_send"
        if self._loop is None or not (is_sql or is_frame):
            return
        found = set(_stack(frame))
        if is_frame or any(path.startswith(self._through) for path in found):
            for task in asyncio.all_tasks(self._loop):
                waiting = set(_awaited(task.get_coro()))
                # What the run reads and appends meanwhile goes a way of its own.
                if not self._through or f"{PACKAGE}memory/base.py" not in waiting:
                    found |= waiting
            self.files |= {
                path.removeprefix(PACKAGE) for path in found if path.startswith(PACKAGE)
            }


def _stack(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def _awaited(coroutine: Any) -> Iterator[str]:
    while hasattr(coroutine, "cr_code"):
        yield coroutine.cr_code.co_filename
        coroutine = coroutine.cr_await


def test_an_append_reaches_sql_through_few_files() -> None:
    way = Way()

    async def main() -> None:
        session = get_session("a")
        await session.add_items([{"role": "user", "content": "first"}])
        with way.followed():
            await session.add_items([{"role": "user", "content": "second"}])

    way.run(main)
    assert "memory/base.py" in way.files
    # The guard of every public method leads nowhere.
    way.files.discard("reports.py")
    assert len(way.files) <= 7, sorted(way.files)


def test_a_frame_becomes_a_run_a_row_and_frames_through_few_files() -> None:
    user = make_user()
    session_id = create_conversation(user).session_id
    agent, _ = scripted([say("one"), say("two")])
    way = Way("backends/run_rows.py")

    async def main() -> None:
        async with Socket(session_id, user, agent) as socket:
            await socket.say("r1", "hi")
            await socket.to_end()
            with way.followed():
                await socket.say("r2", "hi again")
                await socket.to_end()

    way.run(main)
    assert {"consumers.py", "runs/active.py", "backends/run_rows.py"} <= way.files
    way.files.discard("reports.py")
    assert len(way.files) <= 15, sorted(way.files)
