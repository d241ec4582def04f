"""A server that is killed under writers, poppers and a clearer, again and again.

`AGENT_SESSIONS_KILLS` is how often in each test.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.exceptions import StoreUnavailable, UnknownEncryptionKey
from agent_sessions.handler import SessionBackendHandler
from tests.servers.process import HOST, free_port
from tests.servers.redis import kill
from tests.servers.redis import redis as run_redis

pytestmark = [pytest.mark.one_database, pytest.mark.django_db(transaction=True)]

KILLS = int(os.environ.get("AGENT_SESSIONS_KILLS", "2"))
# How many of each kind are at work.
WORKERS = 8
REDIS = "agent_sessions.backends.redis.RedisBackend"
ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"
KEY = SessionKey("s")


@dataclass
class Ledger:
    """What callers were told; `doubtful` is what an error left open."""

    stored: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    popped: list[str] = field(default_factory=list)
    doubtful_pops: int = 0
    cleared: int = 0
    doubtful_clears: int = 0
    refused: int = 0


class Storm:
    """Callers that work on one session while its server is killed."""

    def __init__(self, kind: str, folder: Path, clears: bool) -> None:
        self.kind, self.folder, self.clears = kind, folder, clears
        self.port = free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self.ledger = Ledger()
        self.over = False

    async def run(
        self, backend: BaseSessionBackend, stranger: BaseSessionBackend | None = None
    ) -> list[str]:
        """Kill the server, again and again; return what is there in the end."""
        work: list[Awaitable[None]] = []
        for number in range(WORKERS):
            work.append(self._append(backend, number))
            work.append(self._pop(backend))
            if stranger is not None:
                work.append(self._pop_wrongly(stranger))
        if self.clears:
            work.append(self._clear(backend))
        tasks: list[asyncio.Future[None]] = []
        for _ in range(KILLS):
            with self._server() as server:
                tasks = tasks or [asyncio.ensure_future(each) for each in work]
                await asyncio.sleep(random.uniform(0.2, 0.6))  # noqa: S311
                await asyncio.to_thread(kill, server)
        with self._server():
            await asyncio.sleep(0.3)
            self.over = True
            await asyncio.gather(*tasks)
            return texts(await backend.alatest(KEY, None))

    def _server(self) -> Any:
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        return run_redis(self.kind, *durable, "--dir", str(self.folder), port=self.port)

    async def _append(self, backend: BaseSessionBackend, number: int) -> None:
        count = 0
        while not self.over:
            names = [f"{number}.{count + n}" for n in range(3)]
            count += 3
            batch: list[Any] = [{"role": "user", "content": name} for name in names]
            try:
                await backend.aappend(KEY, batch)
            except StoreUnavailable:
                self.ledger.doubtful += names
            else:
                self.ledger.stored += names

    async def _pop(self, backend: BaseSessionBackend) -> None:
        while not self.over:
            try:
                item = await backend.apop(KEY)
            except StoreUnavailable:
                self.ledger.doubtful_pops += 1
            else:
                self.ledger.popped += texts([item] if item else [])
            # Else nothing would be left.
            await asyncio.sleep(0.005)

    async def _pop_wrongly(self, stranger: BaseSessionBackend) -> None:
        while not self.over:
            try:
                assert await stranger.apop(KEY) is None
            except UnknownEncryptionKey:
                self.ledger.refused += 1
            except StoreUnavailable:
                pass
            await asyncio.sleep(0.005)

    async def _clear(self, backend: BaseSessionBackend) -> None:
        while not self.over:
            await asyncio.sleep(0.05)
            try:
                self.ledger.cleared += await backend.aclear(KEY)
            except StoreUnavailable:
                self.ledger.doubtful_clears += 1


def texts(items: list[Any]) -> list[str]:
    return [item["content"] for item in items]


def assert_true(ledger: Ledger, rest: list[str]) -> None:
    """Assert that each item is where somebody was told that it is, and once."""
    seen = Counter([*ledger.popped, *rest])
    assert seen, "nothing was written"
    assert max(seen.values()) == 1
    assert set(seen) <= {*ledger.stored, *ledger.doubtful}
    lost = set(ledger.stored) - set(seen)
    if not ledger.cleared and not ledger.doubtful_clears:
        assert len(lost) <= ledger.doubtful_pops
    elif not ledger.doubtful_clears and not ledger.doubtful_pops:
        most = len(lost) + len(set(ledger.doubtful) - set(seen))
        assert len(lost) <= ledger.cleared <= most
    for number in range(WORKERS):
        own = [int(name.split(".")[1]) for name in rest if name[0] == str(number)]
        assert own == sorted(own)


def build(settings: dict[str, Any], alias: str) -> BaseSessionBackend:
    return SessionBackendHandler(settings)[alias]


@pytest.mark.parametrize("clears", [False, True], ids=["pops", "clears"])
@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_kills_lose_double_and_disorder_nothing(
    kind: str, clears: bool, tmp_path: Path
) -> None:
    storm = Storm(kind, tmp_path, clears)
    options = {"url": storm.url}
    backend = build({"default": {"BACKEND": REDIS, "OPTIONS": options}}, "default")
    rest = await storm.run(backend)
    assert_true(storm.ledger, rest)
    await asyncio.to_thread(backend.close)


@pytest.mark.parametrize("clears", [False, True], ids=["pops", "clears"])
@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_kills_under_encryption_also_with_a_wrong_key(
    kind: str, clears: bool, tmp_path: Path
) -> None:
    storm = Storm(kind, tmp_path, clears)

    def private(key: str) -> BaseSessionBackend:
        inner = {"BACKEND": REDIS, "OPTIONS": {"url": storm.url}}
        outer = {"backend": "inner", "keys": [key]}
        setting = {"inner": inner, "private": {"BACKEND": ENCRYPTED, "OPTIONS": outer}}
        return build(setting, "private")

    right = private(Fernet.generate_key().decode())
    wrong = private(Fernet.generate_key().decode())
    rest = await storm.run(right, wrong)
    assert_true(storm.ledger, rest)
    assert storm.ledger.refused
    for backend in (right, wrong):
        await asyncio.to_thread(backend.close)
