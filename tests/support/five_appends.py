"""A process that appends five times and ends, for tests.

`python -m tests.support.five_appends SETTING HOW SESSION_ID …` reads AGENT_SESSIONS as JSON.
HOW is `sync`, `async`, `forked` or `killed`; several sessions are for the last one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import django


def main(how: str, *session_ids: str) -> None:
    from agent_sessions import get_session

    opened = [get_session(each, backend="tried") for each in session_ids]
    session = opened[0]
    items: list[Any] = [{"role": "user", "content": "hello"}]
    if how == "async":

        async def write() -> None:
            for _ in range(5):
                await session.add_items(items)

        asyncio.run(write())
        return
    for each in opened * 5:
        each.sync.add_items(items)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "forked" and not (child := os.fork()):
        sys.exit(0)
    if how == "forked":
        os.waitpid(child, 0)
        session.sync.add_items(items)


if __name__ == "__main__":
    from django.conf import settings

    django.setup()
    settings.AGENT_SESSIONS = json.loads(sys.argv[1])
    main(*sys.argv[2:])
