"""The contract suite over a Dapr sidecar: the backend and the standalone class."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from agents.memory import Session
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.test import override_settings

from agent_sessions import get_session
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.dapr.records import (
    decode_head,
    decode_segment,
    encode_head,
    encode_segment,
    head_key,
    segment_key,
)
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.testing import SessionContract
from tests.servers.dapr import STORE, DaprSidecar

pytestmark = pytest.mark.one_database


def damage(sidecar: DaprSidecar, key: SessionKey, nth: int, data: str) -> str:
    """Write a text in place of the nth item's, wherever it lies; give the old one."""
    name = head_key(key)
    head = decode_head(sidecar.records[name].data, 32)
    entries = []
    for number in range(head.sealed):
        place = segment_key(name, head.generation_of(number), number)
        found = list(decode_segment(sidecar.records[place].data))
        entries += [(place, found, index) for index in range(len(found))]
    tail = list(head.tail)
    entries += [(name, tail, index) for index in range(len(tail))]
    place, found, index = entries[nth]
    original = found[index].text
    found[index] = replace(found[index], text=data)
    record = sidecar.records[place]
    record.data = (
        encode_head(replace(head, tail=tuple(found)))
        if place == name
        else encode_segment(found)
    )
    record.version += 1
    return original


class DaprContract(SessionContract):
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_sync = True
    supports_clear_alias = True
    foreign_error = SessionDoesNotExist
    examples = 10

    @pytest.fixture(autouse=True)
    def _sidecar(
        self, dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        dapr_server.reset()
        for name, value in dapr_server.environment.items():
            monkeypatch.setenv(name, value)
        self.sidecar = dapr_server
        with override_settings(AGENT_SESSIONS=self.setting()):
            yield

    def setting(self) -> dict[str, Any]:
        return {
            "default": {
                "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
                # Small, so that the cases cross the bounds of segments.
                "OPTIONS": {"store_name": STORE, "segment_size": 4},
            }
        }

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        return await sync_to_async(create)(f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        return damage(self.sidecar, session.key, nth, data)


@pytest.mark.django_db
class TestInATransaction(DaprContract):
    """The caller holds a transaction of the directory's database."""

    # Other threads have connections of their own, which can't see its rows.
    supports_threads = False
