"""Backends over the tests' sidecar, and what the tests of Dapr write into them."""

from __future__ import annotations

from typing import Any

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.backends.dapr.records import Head, decode_head, head_key
from tests.servers.dapr import STORE, DaprSidecar

KEY = SessionKey("s")
HEAD = head_key(KEY)
SIZE = 4


def make_backend(**options: Any) -> DaprBackend:
    """Make a backend without a directory, whose segments are small."""
    options = {"store_name": STORE, "segment_size": SIZE, **options}
    return DaprBackend("dapr", options, listed=False)


def says(*texts: object) -> list[dict[str, Any]]:
    """Make messages of a user."""
    return [{"role": "user", "content": str(text)} for text in texts]


def said(backend: DaprBackend, limit: int | None = None) -> list[str]:
    """Return the texts of a history."""
    return [item["content"] for item in backend.latest(KEY, limit)]


def head_of(sidecar: DaprSidecar) -> Head:
    return decode_head(sidecar.records[HEAD].data, SIZE)


def segments_of(sidecar: DaprSidecar) -> list[str]:
    """Return the keys of the sealed segments that lie in the store."""
    return sorted(key for key in sidecar.records if key.rpartition(":")[2].isdigit())


def write_singly(backend: DaprBackend, count: int) -> None:
    for number in range(count):
        backend.append(KEY, says(number))
