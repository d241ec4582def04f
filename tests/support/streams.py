"""A client of server-sent events for tests: every event is held to AG-UI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any
from urllib.parse import quote

from django.http import HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, override_settings
from django.urls import include, path

from agent_sessions.streams import AgentRunView
from tests.support.agui_validator import SequenceChecker


class Stream:
    """An answer that is read event by event."""

    def __init__(self, response: StreamingHttpResponse) -> None:
        self.response = response
        self.checker = SequenceChecker()
        self.ids: list[str | None] = []
        self.comments = 0
        self._parts: Any = None

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.checker.events

    async def _read(self) -> AsyncIterator[str]:
        buffer = ""
        async for part in self.response:
            buffer += part.decode()
            *blocks, buffer = buffer.split("\n\n")
            for block in blocks:
                yield block
        assert buffer == ""

    async def next(self) -> dict[str, Any] | None:
        """Return the next event; None at the end."""
        async with asyncio.timeout(10):
            return await self._next()

    async def _next(self) -> dict[str, Any] | None:
        self._parts = self._parts or self._read()
        async for block in self._parts:
            if block.startswith(":"):
                self.comments += 1
                continue
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            assert fields.keys() <= {"id", "data"}
            event: dict[str, Any] = json.loads(fields["data"])
            self.checker.feed(event)
            self.ids.append(fields.get("id"))
            return event
        return None

    async def until(self, kind: str) -> dict[str, Any]:
        """Read up to an event of a type."""
        while (event := await self.next()) is not None:
            if event["type"] == kind:
                return event
        raise AssertionError(f"no {kind} in {self.events}")

    async def to_end(self) -> list[dict[str, Any]]:
        """Read until the server ends the stream."""
        while await self.next() is not None:
            pass
        return self.events

    async def close(self) -> None:
        """Go away: the server cancels what is waiting for the next event."""
        reading = asyncio.create_task(self.to_end())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        self.response.close()


class Http:
    """A browser that is logged in, and the routes of an agent."""

    def __init__(
        self,
        session_id: str,
        agent: Any,
        *,
        view: type[AgentRunView] = AgentRunView,
        enforces_csrf: bool = False,
        **options: Any,
    ) -> None:
        urls: Any = ModuleType("urls")
        routes = include(view.as_urls(agent=agent, **options))
        urls.urlpatterns = [path("agents/sessions/<str:session_id>/", routes)]
        self.session_id = session_id
        self.client = AsyncClient(enforce_csrf_checks=enforces_csrf)
        self._settings = override_settings(ROOT_URLCONF=urls)

    async def __aenter__(self) -> Http:
        self._settings.enable()
        return self

    async def __aexit__(self, *args: object) -> None:
        self._settings.disable()

    async def login(self, user: Any) -> Http:
        await self.client.aforce_login(user)
        return self

    def address(self, name: str) -> str:
        return f"/agents/sessions/{quote(self.session_id, safe='')}/{name}/"

    async def post(self, name: str, body: Any = None, **headers: str) -> Any:
        data = body if isinstance(body, str | bytes) else json.dumps(body or {})
        return await self.client.post(
            self.address(name),
            data,
            content_type="application/json",
            headers=headers or None,
        )

    async def run(self, run_id: str, text: str, **more: Any) -> Stream:
        """Send a user's message as a run."""
        message = {"id": f"u-{run_id}", "role": "user", "content": text}
        return await self.send(runId=run_id, messages=[message], **more)

    async def send(self, **body: Any) -> Stream:
        whole = {"threadId": self.session_id, **body}
        return streamed(await self.post("runs", whole))

    async def get(self, name: str, offset: str = "", last: str = "") -> HttpResponse:
        query = {"offset": offset} if offset else {}
        headers = {"Last-Event-ID": last} if last else {}
        response: Any = await self.client.get(
            self.address(name), query, headers=headers
        )
        return response  # type: ignore[no-any-return]

    async def events(self, offset: str = "", last: str = "") -> Stream:
        return streamed(await self.get("events", offset, last))

    async def stop(self, run_id: str, **body: Any) -> HttpResponse:
        name = f"runs/{quote(run_id, safe='')}/stop"
        response: HttpResponse = await self.post(name, body)
        return response


def streamed(response: Any) -> Stream:
    assert response.status_code == 200, (response.status_code, response)
    assert response["Content-Type"] == "text/event-stream"
    return Stream(response)
