"""A model provider on HTTP, that streams what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agents import (
    Model,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
)
from openai import AsyncOpenAI


class Provider:
    """Answers each request with the next scripted stream."""

    def __init__(self) -> None:
        self.streams: list[list[dict[str, Any]]] = []
        self.requests: list[dict[str, Any]] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                provider.requests.append(json.loads(body))
                events = provider.streams.pop(0)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for event in events:
                    if "type" in event:
                        self.wfile.write(f"event: {event['type']}\n".encode())
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                if not self.path.endswith("/responses"):
                    self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the tests' output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def serving() -> Iterator[Provider]:
    """Serve in a thread until the block ends."""
    provider = Provider()
    thread = threading.Thread(target=provider.server.serve_forever, args=(0.01,))
    thread.start()
    yield provider
    provider.server.shutdown()
    provider.server.server_close()
    thread.join()


@asynccontextmanager
async def model(
    kind: type[OpenAIChatCompletionsModel] | type[OpenAIResponsesModel],
    provider: Provider,
    *streams: list[dict[str, Any]],
) -> AsyncIterator[Model]:
    provider.streams = list(streams)
    async with AsyncOpenAI(
        base_url=provider.url, api_key="test", max_retries=0
    ) as client:
        yield kind(model="m", openai_client=client)
