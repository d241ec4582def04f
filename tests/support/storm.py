"""Appenders, poppers, a reader and a clearer on one session, while its server dies.

As a program it takes a `Plan` in JSON. It works until its standard input ends; it tells
that it does, so that the server dies in the midst, and prints what happened.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import django

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.exceptions import UnknownEncryptionKey
from agent_sessions.handler import SessionBackendHandler
from tests.servers.mortal import Mortal
from tests.support.ledger import APPEND, CLEAR, POP, READ, Call, Ledger, violations

ROOT = Path(__file__).parents[2]
# How often the server is killed in each test.
KILLS = int(os.environ.get("AGENT_SESSIONS_KILLS", "2"))
# How many appenders, and how many poppers.
WORKERS = 8
# So many items are appended at once, and read at once.
BATCH = 3
READ_LIMIT = 50
# After so many calls a line says that work goes on.
MARK = 50
ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"


@dataclass
class Plan:
    """What a storm rages on: a backend's setting, and whether somebody clears.

    With keys, the first encrypts and the second is a stranger's.
    """

    session_id: str
    setting: dict[str, Any]
    clears: bool
    keys: tuple[str, ...] = ()


def rage(plan: Plan, server: Mortal, environment: dict[str, str]) -> dict[str, Any]:
    """Kill the server under a storm, again and again; return what happened."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.storm", json.dumps(asdict(plan))],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        # Where no call gets through any more, it would wait for ever.
        limit = threading.Timer(60 + 30 * KILLS, child.kill)
        limit.start()
        try:
            assert child.stdout is not None
            for _ in range(KILLS):
                for _ in range(random.randint(2, 5)):  # noqa: S311
                    assert child.stdout.readline() == "working\n"
                time.sleep(random.uniform(0, 0.1))  # noqa: S311
                server.kill()
                server.start()
            told = child.communicate(timeout=120)[0]
            report: dict[str, Any] = json.loads(told.replace("working\n", ""))
        except BaseException:
            child.kill()
            raise
        finally:
            limit.cancel()
    return report


class Storm:
    """Callers that work on one session until their standard input ends."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.key = SessionKey(plan.session_id)
        self.ledger = Ledger()
        self._over = False
        self._done = 0

    async def run(self) -> dict[str, Any]:
        """Work; return figures, what can't be true, and why calls failed."""
        keys: tuple[str | None, ...] = self.plan.keys or (None,)
        backend, *strangers = [self._build(key) for key in keys]
        work = [self._read(backend)]
        for number in range(WORKERS):
            work.append(self._append(backend, number))
            work.append(self._pop(backend))
            work.extend(self._pop_wrongly(stranger) for stranger in strangers)
        if self.plan.clears:
            work.append(self._clear(backend))
        async with asyncio.TaskGroup() as tasks:
            for each in work:
                tasks.create_task(each)
            await asyncio.to_thread(sys.stdin.read)
            self._over = True
        rest = texts(await backend.alatest(self.key, None))
        errors = Counter(call.error for call in self.ledger.calls if call.error)
        return {
            "figures": self.ledger.figures(rest),
            "violations": violations(self.ledger.calls, rest),
            "errors": errors,
        }

    def _build(self, key: str | None) -> BaseSessionBackend:
        settings = {"default": self.plan.setting}
        if key is None:
            return SessionBackendHandler(settings)["default"]
        options = {"backend": "default", "keys": [key]}
        settings["private"] = {"BACKEND": ENCRYPTED, "OPTIONS": options}
        return SessionBackendHandler(settings)["private"]

    async def _append(self, backend: BaseSessionBackend, number: int) -> None:
        count = 0
        while not self._over:
            names = [f"{number}.{count + n}" for n in range(BATCH)]
            count += BATCH
            batch: list[Any] = [{"role": "user", "content": name} for name in names]
            with self.ledger.call(APPEND, names) as call:
                await backend.aappend(self.key, batch)
            # Else those who look before they pop would hardly ever be fast enough.
            await self._rest(call, 0.02)

    async def _pop(self, backend: BaseSessionBackend) -> None:
        while not self._over:
            with self.ledger.call(POP) as call:
                item = await backend.apop(self.key)
                call.names = texts([item] if item else [])
            # Else nothing would be left.
            await self._rest(call, 0.005)

    async def _pop_wrongly(self, stranger: BaseSessionBackend) -> None:
        while not self._over:
            with self.ledger.call(POP) as call:
                try:
                    assert await stranger.apop(self.key) is None
                except UnknownEncryptionKey:
                    call.is_refused = True
            await self._rest(call, 0.005)

    async def _clear(self, backend: BaseSessionBackend) -> None:
        while not self._over:
            with self.ledger.call(CLEAR) as call:
                call.count = await backend.aclear(self.key)
            await self._rest(call, 0.05)

    async def _read(self, backend: BaseSessionBackend) -> None:
        while not self._over:
            with self.ledger.call(READ) as call:
                call.names = texts(await backend.alatest(self.key, READ_LIMIT))
                call.is_limited = len(call.names) == READ_LIMIT
            await self._rest(call, 0.02)

    async def _rest(self, call: Call, seconds: float) -> None:
        """Print now and then that work is done; leave a server alone that is away."""
        self._done += not call.error
        if self._done % MARK == 0 and not call.error:
            sys.stdout.write("working\n")
            sys.stdout.flush()
        await asyncio.sleep(0.1 if call.error else seconds)


def texts(items: list[Any]) -> list[str]:
    """Return what items are named."""
    return [item["content"] for item in items]


if __name__ == "__main__":
    django.setup()
    told = asyncio.run(Storm(Plan(**json.loads(sys.argv[1]))).run())
    sys.stdout.write(json.dumps(told))
