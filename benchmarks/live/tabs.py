"""A tab of the chat page: it shows what the frames of its websocket say."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Self

from websockets.asyncio.client import connect

from agent_sessions import get_session
from agent_sessions.agui.content import message_text
from benchmarks.live.servers import HOST
from tests.support.agui_validator import SequenceChecker, validate_event

LAST = {"RUN_FINISHED", "RUN_ERROR"}


class Tab:
    """One socket, and the messages that its page shows."""

    def __init__(self, port: int, place: tuple[Any, str]) -> None:
        self.user, self.session_id = place
        self._address = f"ws://{HOST}:{port}/{self.session_id}/?{self.user.pk}"
        # Ids and texts of the messages, in their order.
        self.shown: dict[str, str] = {}
        self.frame_id = ""
        self.run_id = ""
        self.last: dict[str, Any] = {}
        self._check: Any = SequenceChecker().feed

    async def __aenter__(self) -> Self:
        self._connection = connect(self._address, origin=None, open_timeout=30)
        self._socket = await self._connection.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._connection.__aexit__(*error)

    async def send(self, **frame: Any) -> None:
        await self._socket.send(json.dumps(frame))

    async def sync(self, offset: str = "") -> None:
        await self.send(type="sync", **({"offset": offset} if offset else {}))

    def goes_on(self, offset: str, shown: dict[str, str]) -> None:
        """Take what a tab showed that has lost its connection."""
        self.frame_id, self.shown = offset, shown
        if offset:
            # What follows begins in the middle.
            self._check = validate_event

    async def say(self, run_id: str, text: str) -> None:
        message = {"id": f"u-{run_id}", "role": "user", "content": text}
        await self.send(threadId=self.session_id, runId=run_id, messages=[message])

    async def approve(self, run_id: str, interrupts: list[Any]) -> None:
        given = {"status": "resolved", "payload": {"approved": True}}
        resume = [{"interruptId": each["id"], **given} for each in interrupts]
        await self.send(
            threadId=self.session_id, runId=run_id, messages=[], resume=resume
        )

    async def next(self) -> dict[str, Any]:
        """Return the next event, and show it."""
        while True:
            frame = json.loads(await self._socket.recv())
            if "chunk" in frame:
                break
        event: dict[str, Any] = frame["chunk"]
        if not frame["id"].startswith("refused:"):
            self._check(event)
            self._show(event)
            self.frame_id = frame["id"]
        return event

    async def until(self, *kinds: str) -> dict[str, Any]:
        """Read up to an event of one of some types."""
        async with asyncio.timeout(60):
            while (event := await self.next())["type"] not in kinds:
                pass
        return event

    async def to_end(self) -> dict[str, Any]:
        """Read up to the end of a run, and return that."""
        return await self.until(*LAST)

    def _show(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "RUN_STARTED":
            self.run_id = event["runId"]
            for message in event.get("input", {}).get("messages", []):
                self.shown.setdefault(message["id"], message["content"])
        elif kind == "MESSAGES_SNAPSHOT":
            said = [m for m in event["messages"] if m["role"] in {"user", "assistant"}]
            self.shown = {
                m["id"]: m["content"]
                for m in said
                if m["role"] == "user" or m.get("content")
            }
        elif kind == "TEXT_MESSAGE_START":
            self.shown[event["messageId"]] = ""
        elif kind == "TEXT_MESSAGE_CONTENT":
            self.shown[event["messageId"]] += event["delta"]
        elif kind in LAST:
            self.last = event


async def stored(place: tuple[Any, str]) -> list[Any]:
    """Return the items of a conversation."""
    user, session_id = place
    return list(await get_session(session_id, user=user).get_items())


def texts(items: list[Any]) -> list[str]:
    """Return what is said in items, as a page shows it."""
    return [
        message_text(item)[0]
        for item in items
        if item.get("role") in {"user", "assistant"}
    ]


def new_id(name: str) -> str:
    """Return an id that no run has had."""
    return f"{name}-{time.time_ns()}"
