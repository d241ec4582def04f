"""Make the connections ready that an event loop awaits."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from agent_sessions import get_session, sessions
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.database.wires import Wires

ITEM: Any = {"role": "user", "content": "Hello"}


def wires() -> Wires:
    backend = sessions["default"]
    assert isinstance(backend, DatabaseBackend)
    assert backend.engine.wires is not None
    return backend.engine.wires


def make_ready(count: int = 1) -> None:
    """Take turns until `count` of the connections serve them."""
    session = get_session("warm")
    deadline = time.monotonic() + 30

    async def turns() -> None:
        await asyncio.gather(*(turn() for _ in range(count)))

    async def turn() -> None:
        await session.get_items(50)
        await session.add_items([ITEM])

    while True:
        for _ in range(20):
            asyncio.run(turns())
        if wires().free >= count:
            break
        assert time.monotonic() < deadline
    asyncio.run(session.clear_session())
