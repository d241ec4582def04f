"""A websocket client for tests: every frame is held to AG-UI, in legal order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

from asgiref.testing import ApplicationCommunicator
from channels.routing import URLRouter
from channels.testing.websocket import WebsocketCommunicator
from django.contrib.auth import get_user_model
from django.urls import path

from agent_sessions.consumers import AgentConsumer
from agent_sessions.runs.failures import MESSAGES, REFUSALS
from agent_sessions.runs.setup import create_conversation
from tests.support.agui_validator import SequenceChecker, validate_event

_names = itertools.count(1)


def make_user(name: str | None = None) -> Any:
    """Make a user of its own."""
    return get_user_model()._default_manager.create_user(
        name or f"user{next(_names)}", password="secret"
    )


class Closed(AssertionError):
    """The server closed where a frame was expected."""

    def __init__(self, code: int) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


class _Communicator(WebsocketCommunicator):
    """A client that leaves Channels as it is.

    Channels' own patches it while it sends and waits, and so undoes the patch of another
    one that does so at the same time; the suite has a patch for all, in conftest.py.
    """

    send_input: Any = ApplicationCommunicator.send_input
    receive_output: Any = ApplicationCommunicator.receive_output


class Socket:
    """One tab: sends frames, receives checked ones.

    `user` goes into the scope as a middleware's would, `around` wraps the routes in
    middleware.
    """

    def __init__(
        self,
        session_id: str,
        user: Any,
        agent: Any,
        *,
        consumer: type[AgentConsumer] = AgentConsumer,
        headers: Iterable[tuple[bytes, bytes]] = (),
        scope: dict[str, Any] | None = None,
        around: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        consumer_app: Any = consumer.as_asgi(agent=agent, **options)
        routes: Any = [path("ws/<str:session_id>/", consumer_app)]
        application: Any = URLRouter(routes)
        self.communicator = _Communicator(
            application if around is None else around(application),
            f"/ws/{session_id}/",
            headers=list(headers),
        )
        full_scope: Any = self.communicator.scope
        if user is not None:
            full_scope["user"] = user
        full_scope.update(scope or {})
        self.session_id = session_id
        self.frames: list[dict[str, Any]] = []
        self.checker = SequenceChecker()
        # The newest interrupts, by their calls.
        self.asked: dict[str, str] = {}

    async def __aenter__(self) -> Socket:
        connected, _ = await self.communicator.connect()
        assert connected
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.communicator.disconnect()

    async def send(self, frame: Any) -> None:
        text = frame if isinstance(frame, str) else json.dumps(frame)
        await self.communicator.send_to(text_data=text)

    async def say(self, run_id: str, text: str, **more: Any) -> None:
        """Send a user's message as a run."""
        await self.send(
            {
                "threadId": self.session_id,
                "runId": run_id,
                "messages": [{"id": f"u-{run_id}", "role": "user", "content": text}],
                **more,
            }
        )

    async def answer(self, run_id: str, *entries: dict[str, Any]) -> None:
        """Answer approvals; `interruptId` may name the call that was asked about last."""
        for entry in entries:
            entry["interruptId"] = self.asked.get(
                entry["interruptId"], entry["interruptId"]
            )
        await self.send(
            {
                "threadId": self.session_id,
                "runId": run_id,
                "messages": [],
                "resume": list(entries),
            }
        )

    async def sync(self, offset: str | None = None) -> None:
        await self.send({"type": "sync", **({"offset": offset} if offset else {})})

    async def frame(self, within: float = 20) -> dict[str, Any]:
        """Receive one frame; a ping is no frame of a run."""
        while True:
            output = await self.communicator.receive_output(within)
            if output["type"] == "websocket.close":
                raise Closed(output["code"])
            assert output["type"] == "websocket.send", output
            frame: dict[str, Any] = json.loads(output["text"])
            if frame != {"type": "ping"}:
                break
        assert set(frame) == {"id", "chunk"}
        assert isinstance(frame["id"], str)
        if frame["id"].startswith("refused:"):
            # It belongs to no run, so it stands anywhere.
            validate_event(frame["chunk"])
        else:
            self.checker.feed(frame["chunk"])
        self.frames.append(frame)
        for asked in frame["chunk"].get("outcome", {}).get("interrupts", ()):
            self.asked[asked["toolCallId"]] = asked["id"]
        return frame

    async def until(self, *kinds: str, within: float = 20) -> list[dict[str, Any]]:
        """Receive events up to one of these types, that one included."""
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] not in kinds:
            events.append((await self.frame(within))["chunk"])
        return events

    async def to_end(self, within: float = 20) -> list[dict[str, Any]]:
        """Receive a run's events to its end."""
        return await self.until("RUN_FINISHED", "RUN_ERROR", within=within)

    async def closed(self, within: float = 20) -> int:
        """Wait for the server to close; give the code."""
        while True:
            try:
                await self.frame(within)
            except Closed as closed:
                return closed.code

    async def silent(self, within: float = 0.2) -> bool:
        """Whether nothing comes for a while."""
        return await self.communicator.receive_nothing(within, 0.01)


def text_of(events: Iterable[dict[str, Any]]) -> str:
    """Join the text that events stream."""
    return "".join(
        event["delta"] for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"
    )


__all__ = ["Closed", "Socket", "create_conversation", "make_user", "text_of"]


def refusal_of(code: str) -> dict[str, str]:
    """Return what HTTP answers in English where it refuses something."""
    return {"code": code, "message": str(REFUSALS.get(code) or MESSAGES[code])}
