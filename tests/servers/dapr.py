"""A sidecar of Dapr: its own gRPC servicer over a store in memory, and its health.

No package brings the real sidecar. What is answered here follows Dapr's rules: an
ETag that differs is ABORTED, a first write without one where there is a record too;
a missing key gives empty data and no ETag; `ttlInSeconds` is kept; keys can't hold
"||".
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any, NoReturn

from tests.servers.process import HOST, free_port

STORE = "statestore"
FIRST_WRITE = 1
MAX_BYTES = 4 * 1024 * 1024  # of a request, as --max-body-size of the real one
HEALTH_PATH = "/v1.0/healthz/outbound"


def missing() -> str | None:
    """Return what the sidecar lacks to run here, if anything."""
    if find_spec("dapr"):
        return None
    return "the dapr package is missing: pip install 'dapr>=1.19,<2'"


@dataclass
class Record:
    """What lies under a key."""

    data: bytes
    version: int
    expires: float | None


@dataclass
class Faults:
    """What goes wrong on purpose.

    `interfere` is asked before a request is carried out and again afterwards, with its
    name, its keys and whether it was carried out; the name of a gRPC code that it gives
    is the answer in place of the real one.
    """

    healthy: bool = True
    unavailable: bool = False
    delay: float = 0
    interfere: Callable[[str, list[str], bool], str | None] | None = None


@dataclass
class Counts:
    """What came in: requests by name, and bytes of messages both ways."""

    requests: Counter[str] = field(default_factory=Counter)
    received: int = 0
    sent: int = 0
    tokens: set[str | None] = field(default_factory=set)


class Refused(Exception):
    """A request breaks one of Dapr's rules; the arguments are the code and why."""


class DaprSidecar:
    """One sidecar with one state store; the records outlive stop() and start()."""

    def __init__(self, port: int | None = None, http_port: int | None = None) -> None:
        self.port = port or free_port()
        self.http_port = http_port or free_port()
        self.records: dict[str, Record] = {}
        self.faults = Faults()
        self.counts = Counts()
        self.max_bytes = MAX_BYTES
        self.late = 0.0  # seconds that the store's clock is ahead
        self._lock = threading.RLock()
        self._server: Any = None
        self._health: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a client finds the sidecar."""
        return {
            "DAPR_RUNTIME_HOST": HOST,
            "DAPR_GRPC_PORT": str(self.port),
            "DAPR_HTTP_PORT": str(self.http_port),
            "DAPR_HEALTH_TIMEOUT": "2",
        }

    def start(self) -> None:
        """Listen, on the same ports as before."""
        import grpc
        from dapr.proto import api_service_v1

        limits = [("grpc.max_receive_message_length", self.max_bytes)]
        self._server = grpc.server(ThreadPoolExecutor(16), options=limits)
        add: Any = api_service_v1.add_DaprServicer_to_server
        add(_servicer(self), self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()
        self._health = ThreadingHTTPServer((HOST, self.http_port), _health(self))
        threading.Thread(target=self._health.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Break every connection; what was written stays."""
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None
        if self._health is not None:
            self._health.shutdown()
            self._health.server_close()
            self._health = None

    def reset(self) -> None:
        """Forget all records, faults and counts."""
        with self._lock:
            self.records.clear()
            self.faults = Faults()
            self.counts = Counts()
            self.late = 0.0

    def reset_faults(self) -> None:
        """Make everything work again."""
        self.faults = Faults()

    # -- the store -------------------------------------------------------------------

    def get(self, key: str) -> Record | None:
        """Return what lies under a key, if it has not expired."""
        with self._lock:
            record = self.records.get(key)
            if record is None:
                return None
            if record.expires is not None and record.expires <= self._now():
                del self.records[key]
                return None
            return record

    def check(self, item: Any) -> None:
        """Refuse an item whose key or ETag is not right."""
        if "||" in item.key:
            raise Refused(
                "INVALID_ARGUMENT",
                f"input key/keyPrefix '{item.key}' can't contain '||'",
            )
        record = self.get(item.key)
        etag = item.etag.value
        if etag:
            if record is None or str(record.version) != etag:
                raise Refused("ABORTED", _mismatch(item.key))
        elif item.options.concurrency == FIRST_WRITE and record is not None:
            raise Refused("ABORTED", _mismatch(item.key))

    def apply(self, item: Any) -> None:
        """Write an item that has been checked."""
        seconds = item.metadata.get("ttlInSeconds")
        old = self.get(item.key)
        self.records[item.key] = Record(
            data=item.value,
            version=1 if old is None else old.version + 1,
            expires=None if seconds is None else self._now() + int(seconds),
        )

    def save(self, items: Sequence[Any]) -> None:
        """Write items one after the other."""
        with self._lock:
            for item in items:
                self.check(item)
                self.apply(item)

    def delete(self, item: Any) -> None:
        with self._lock:
            self.check(item)
            self.records.pop(item.key, None)

    def _now(self) -> float:
        return time.time() + self.late


def _mismatch(key: str) -> str:
    return (
        f"failed saving state in state store {STORE}: possible etag mismatch. error "
        f"from state store: {key} has another version"
    )


def _servicer(sidecar: DaprSidecar) -> Any:
    import grpc
    from dapr.proto import api_service_v1, api_v1
    from google.protobuf.empty_pb2 import Empty

    def refuse(context: Any, code: str, why: str) -> NoReturn:
        context.abort(grpc.StatusCode[code], why)
        raise AssertionError("abort() raises")

    def answer(
        request: Any, context: Any, keys: list[str], work: Callable[[], Any]
    ) -> Any:
        faults, name = sidecar.faults, type(request).__name__.removesuffix("Request")
        sidecar.counts.requests[name] += 1
        sidecar.counts.received += request.ByteSize()
        headers = dict(context.invocation_metadata())
        sidecar.counts.tokens.add(headers.get("dapr-api-token"))
        if faults.delay:
            time.sleep(faults.delay)
        if faults.unavailable:
            refuse(context, "UNAVAILABLE", "the store is down")
        if getattr(request, "store_name", "") or getattr(request, "storeName", ""):
            store = getattr(request, "store_name", "") or request.storeName
            if store != STORE:
                refuse(context, "INVALID_ARGUMENT", f"state store {store} is not found")
        if faults.interfere and (code := faults.interfere(name, keys, False)):
            refuse(context, code, "as the test says, before")
        try:
            reply = work()
        except Refused as exc:
            refuse(context, *exc.args)
        if faults.interfere and (code := faults.interfere(name, keys, True)):
            refuse(context, code, "as the test says, after")
        sidecar.counts.sent += reply.ByteSize()
        return reply

    class Servicer(api_service_v1.DaprServicer):
        def GetMetadata(self, request: Any, context: Any) -> Any:
            counts = sidecar.counts
            return api_v1.GetMetadataResponse(
                id="tests",
                extended_metadata={
                    "bytes": str(counts.received + counts.sent),
                    "requests": str(counts.requests.total()),
                },
            )

        def GetState(self, request: Any, context: Any) -> Any:
            def work() -> Any:
                record = sidecar.get(request.key)
                if record is None:
                    return api_v1.GetStateResponse()
                return api_v1.GetStateResponse(
                    data=record.data, etag=str(record.version)
                )

            return answer(request, context, [request.key], work)

        def GetBulkState(self, request: Any, context: Any) -> Any:
            def work() -> Any:
                found = [(key, sidecar.get(key)) for key in request.keys]
                return api_v1.GetBulkStateResponse(
                    items=[
                        api_v1.BulkStateItem(key=key)
                        if record is None
                        else api_v1.BulkStateItem(
                            key=key, data=record.data, etag=str(record.version)
                        )
                        for key, record in found
                    ]
                )

            return answer(request, context, list(request.keys), work)

        def SaveState(self, request: Any, context: Any) -> Any:
            def work() -> Any:
                sidecar.save(request.states)
                return Empty()

            return answer(request, context, [s.key for s in request.states], work)

        def DeleteState(self, request: Any, context: Any) -> Any:
            def work() -> Any:
                sidecar.delete(request)
                return Empty()

            return answer(request, context, [request.key], work)

    return Servicer()


def _health(sidecar: DaprSidecar) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            healthy = sidecar.faults.healthy and self.path == HEALTH_PATH
            self.send_response(204 if healthy else 500)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing of each request."""

    return Handler


@contextmanager
def dapr() -> Iterator[DaprSidecar]:
    """Run a sidecar in this process."""
    sidecar = DaprSidecar()
    sidecar.start()
    try:
        yield sidecar
    finally:
        sidecar.stop()


def main(argv: list[str] | None = None) -> None:
    """Run a sidecar in a process of its own until standard input closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--http-port", type=int)
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES)
    options = parser.parse_args(argv)
    sidecar = DaprSidecar(options.port, options.http_port)
    sidecar.max_bytes = options.max_bytes
    sidecar.start()
    sys.stdout.write(f"{sidecar.port} {sidecar.http_port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    sidecar.stop()
