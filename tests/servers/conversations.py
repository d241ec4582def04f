"""A server of OpenAI's Conversations service, with its documented rules.

It runs in threads of the test's own process, so that a test can look into it and ask
for faults. Real clients reach it over HTTP; so do other processes.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from openai.types.responses import ResponseInputItem
from pydantic import TypeAdapter, ValidationError

KEY = "sk-test-of-the-conversations-server"
MOST_ITEMS = 20
PAGE_SIZES = range(1, 101)
DEFAULT_PAGE = 20
# What a message may have.
MESSAGE = {"type", "role", "content", "status", "phase"}


@dataclass
class Fault:
    """What happens instead of an answer, or after the work is done.

    `status` is answered with `headers`; 0 hangs up, and None answers as if nothing
    was. `after` does the work first; `seconds` are let pass before the answer. `stops`
    is the last answer of the server.
    """

    method: str = ""
    path: str = ""
    skip: int = 0
    times: int = 1
    status: int | None = 500
    headers: dict[str, str] = field(default_factory=dict)
    code: str = "fault"
    after: bool = False
    seconds: float = 0
    stops: bool = False


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ConversationsServer(ThreadingHTTPServer):
    """Conversations by id, each a list of items; every request is noted."""

    daemon_threads = True
    # Many clients may come at once.
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.conversations: dict[str, list[dict[str, Any]]] = {}
        self.requests: list[tuple[str, str]] = []
        # The headers of the last one.
        self.headers: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.made = 0
        # Takes items of the API's own types only, as the service does.
        self.knows_types = False
        # Conversations on which another request is at work, until when.
        self.locked: dict[str, float] = {}
        self.locked_status = 400
        # Refuses all connections while it is set, as a stopped server would.
        self.down = False
        self._clients: set[socket.socket] = set()
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reset(self) -> None:
        with self.lock:
            self.conversations.clear()
            self.requests.clear()
            self.faults.clear()
            self.locked.clear()
            self.locked_status = 400
            self.made = 0
            self.knows_types = False
            self.down = False

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if not self.down:
            self._clients.add(request)
        return not self.down

    def shutdown_request(self, request: Any) -> None:
        self._clients.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Break all connections off."""
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def fail(self, **fault: Any) -> None:
        """Make the next request of that method and path fail."""
        self.faults.append(Fault(**fault))

    def due_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method in {"", method} and fault.path in path:
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                return fault
        return None

    def new_id(self, prefix: str) -> str:
        return f"{prefix}_{next(self._numbers):032x}"

    # -- the service -----------------------------------------------------------------

    def answer(self, method: str, parts: list[str], query: Any, body: Any) -> Any:
        if parts == ["conversations"] and method == "POST":
            return self.create(body)
        if len(parts) == 2 and method == "DELETE":
            self.history(parts[1])
            del self.conversations[parts[1]]
            return {
                "id": parts[1],
                "object": "conversation.deleted",
                "deleted": True,
            }
        if len(parts) == 3 and parts[2] == "items":
            if method == "POST":
                return self.add(parts[1], body)
            return self.list_items(parts[1], query)
        if len(parts) == 4 and method == "DELETE":
            history = self.history(parts[1])
            history.remove(history[self.index(history, parts[3])])
            return {"id": parts[1], "object": "conversation", "created_at": 1}
        raise Refused(404, "unknown_url", "Unknown request URL")

    def create(self, body: Any) -> Any:
        conversation = self.new_id("conv")
        self.conversations[conversation] = []
        self.made += 1
        if body.get("items"):
            self.add(conversation, body)
        return {"id": conversation, "object": "conversation", "created_at": 1}

    def add(self, conversation: str, body: Any) -> Any:
        history = self.history(conversation)
        given = body.get("items")
        if not isinstance(given, list) or not 1 <= len(given) <= MOST_ITEMS:
            raise Refused(400, "invalid_value", f"1 to {MOST_ITEMS} items")
        if not all(isinstance(item, dict) for item in given):
            raise Refused(400, "invalid_type", "items are objects")
        if self.knows_types and not all(map(is_known, given)):
            raise Refused(400, "invalid_value", "items are of the API's types")
        made = [self.as_kept(item) for item in given]
        history.extend(made)
        return self.page(made, has_more=False)

    def list_items(self, conversation: str, query: Any) -> Any:
        history = self.history(conversation)
        limit = int(query.get("limit", [DEFAULT_PAGE])[0])
        if limit not in PAGE_SIZES:
            raise Refused(400, "invalid_value", "limit is 1 to 100")
        items = list(history)
        if query.get("order", ["desc"])[0] == "desc":
            items.reverse()
        if after := query.get("after", [""])[0]:
            items = items[self.index(items, after) + 1 :]
        return self.page(items[:limit], has_more=len(items) > limit)

    def hold(self, seconds: float) -> None:
        """Make another request work on every conversation for so long."""
        until = time.monotonic() + seconds
        self.locked = dict.fromkeys(self.conversations, until)

    def history(self, conversation: str) -> list[dict[str, Any]]:
        if time.monotonic() < self.locked.get(conversation, 0):
            raise Refused(
                self.locked_status,
                "conversation_locked",
                "Another process is currently operating on this conversation. Please "
                "retry in a few seconds.",
            )
        try:
            return self.conversations[conversation]
        except KeyError:
            raise Refused(404, "not_found", "Conversation not found") from None

    def index(self, items: list[dict[str, Any]], item_id: str) -> int:
        for number, item in enumerate(items):
            if item["id"] == item_id:
                return number
        raise Refused(404, "not_found", "Item not found")

    def as_kept(self, item: dict[str, Any]) -> dict[str, Any]:
        """Set an item's id, and turn a message's text into parts."""
        kept = {**item, "id": self.new_id("msg")}
        content, role = item.get("content"), item.get("role")
        is_message = item.get("type", "message") == "message"
        if is_message and isinstance(role, str) and isinstance(content, str):
            kept["type"] = "message"
            kept.setdefault("status", "completed")
            part: dict[str, Any] = {"type": "input_text", "text": content}
            if role == "assistant":
                part = {"type": "output_text", "text": content, "annotations": []}
            kept["content"] = [part]
        elif self.knows_types and is_message:
            kept["type"] = "message"
            kept.setdefault("status", "completed")
        return kept

    @staticmethod
    def page(items: list[dict[str, Any]], *, has_more: bool) -> Any:
        return {
            "object": "list",
            "data": items,
            "first_id": items[0]["id"] if items else None,
            "last_id": items[-1]["id"] if items else None,
            "has_more": has_more,
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: ConversationsServer

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            # A client that gave up.
            self.close_connection = True

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_DELETE(self) -> None:
        self.serve()

    def serve(self) -> None:
        url = urlsplit(self.path)
        path = url.path.removeprefix("/v1")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.command, path))
            self.server.headers = {k.lower(): v for k, v in self.headers.items()}
            fault = self.server.due_fault(self.command, path)
            status, answer = 0, None
            if fault is None or fault.after or fault.status is None:
                status, answer = self.work(path, parse_qs(url.query), body)
        if fault is not None:
            if fault.stops:
                # It listens until the server's loop has looked at it once more.
                self.close_connection = True
                self.server.socket.close()
            time.sleep(fault.seconds)
            if fault.status == 0:
                self.close_connection = True
                return
            if fault.status is not None:
                self.say(fault.status, error(fault.code, "As asked."), fault.headers)
                return
        self.say(status, answer, {} if fault is None else fault.headers)

    def work(self, path: str, query: Any, body: bytes) -> tuple[int, Any]:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return 401, error("invalid_api_key", "Incorrect API key provided")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        try:
            given = json.loads(body) if body else {}
            return 200, self.server.answer(self.command, parts, query, given)
        except Refused as exc:
            return exc.status, error(exc.code, str(exc))

    def say(
        self, status: int, answer: Any, headers: dict[str, str] | None = None
    ) -> None:
        text = json.dumps(answer).encode()
        self.send_response_only(status)
        headers = {"Date": self.date_time_string(), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Leave the test's output alone."""


def is_known(item: dict[str, Any]) -> bool:
    """Return whether an item is of one of the API's types and a message has no more."""
    if "type" not in item and "role" not in item:
        return False
    if "role" in item and not item.keys() <= MESSAGE:
        return False
    try:
        known_types().validate_python(item)
    except ValidationError:
        return False
    return True


@cache
def known_types() -> TypeAdapter[Any]:
    return TypeAdapter(ResponseInputItem)


def error(code: str, message: str) -> Any:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


@contextmanager
def conversations_server() -> Iterator[ConversationsServer]:
    """Serve on a free port until the block ends."""
    with ConversationsServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
