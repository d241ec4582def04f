"""The contract suite over a Dapr sidecar: the backend and the standalone class."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import pytest
from agents.memory import Session
from asgiref.sync import sync_to_async
from dapr.aio.clients import DaprClient as AsyncDaprClient
from dapr.clients import DaprClient
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
)
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.memory.dapr import DaprSession
from agent_sessions.testing.base import ContractBase
from agent_sessions.testing.reading import ShapeCases
from agent_sessions.testing.writing import ConcurrencyCases, PoppingCases
from tests.servers.dapr import STORE, DaprSidecar
from tests.support.contract import OnThePool, ProcessCases, StoreContract, SyncCases

T = TypeVar("T")

pytestmark = pytest.mark.one_database


def damage(
    sidecar: DaprSidecar, key: SessionKey, nth: int, data: str, namespace: str = ""
) -> str:
    """Write a text in place of the nth item's, wherever it lies; give the old one."""
    name = head_key(key, namespace)
    head = decode_head(sidecar.records[name].data, 32)
    entries = []
    for end in head.places:
        place = f"{name}:{end}"
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


class DaprHooks(ContractBase):
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_clear_alias = True
    foreign_error = SessionDoesNotExist
    examples = 10

    @pytest.fixture(autouse=True)
    def _sidecar(self, dapr_server: DaprSidecar) -> Iterator[None]:
        self.sidecar = dapr_server
        with override_settings(AGENT_SESSIONS=self.setting()):
            yield

    # Small, so that the cases cross the bounds of segments.
    segment_size: ClassVar[int] = 4

    def setting(self) -> dict[str, Any]:
        options = {"store_name": STORE, "segment_size": self.segment_size}
        backend = "agent_sessions.backends.dapr.DaprBackend"
        return {"default": {"BACKEND": backend, "OPTIONS": options}}

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        return await sync_to_async(create)(f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Any, nth: int, data: str) -> str:
        return damage(self.sidecar, session.key, nth, data)


@pytest.mark.django_db
class TestInATransaction(DaprHooks, StoreContract):
    """The caller holds a transaction of the directory's database."""

    # Other threads have connections of their own, which can't see its rows.
    supports_threads = False


class TestOnThePool(OnThePool, DaprHooks, ConcurrencyCases, ProcessCases):
    supports_second_process = True
    segment_size = 32

    def process_environment(self) -> dict[str, str]:
        return self.environment | self.sidecar.environment

    def process_source(self) -> str:
        return f"""
import django
from django.conf import settings
settings.AGENT_SESSIONS = {self.setting()!r}
django.setup()
from agent_sessions import get_session, sessions

async def make_session(session_id):
    return get_session(session_id)
"""


class Standalone(DaprHooks):
    """The class that needs no settings and no database, over a client of its caller."""

    supports_owner = False

    def run_coroutine(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run(main())


@pytest.mark.another_store
class TestSessionOverTheAsyncClient(Standalone, ShapeCases, PoppingCases):
    supports_threads = False
    known_gaps: ClassVar[dict[str, str]] = {
        "test_serves_event_loops_one_after_another": "An asyncio client serves one "
        "loop: another gets a StorageError that says so."
    }

    def run_coroutine(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def with_client() -> T:
            async with AsyncDaprClient(self.sidecar.address) as self.client:
                return await main()

        return asyncio.run(with_client())

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return DaprSession(session_id, STORE, self.client, **options)


@pytest.mark.another_store
class TestSessionOverTheBlockingClient(Standalone, SyncCases, ConcurrencyCases):
    @pytest.fixture(autouse=True)
    def _client(self, _sidecar: None) -> Iterator[None]:
        with DaprClient(self.sidecar.address) as self.client:
            yield

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return DaprSession(session_id, STORE, self.client, **options)
