"""A database that stands still between encrypting and storing, for tests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.items import Item
from tests.support.key_writer import GATE


class StalledDatabase(DatabaseBackend):
    """Store nothing while the file exists that the environment names."""

    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        self._wait()
        super().append(key, items)

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        await asyncio.to_thread(self._wait)
        await super().aappend(key, items)

    def _wait(self) -> None:
        gate = Path(os.environ[GATE])
        while gate.exists():
            gate.with_suffix(".reached").touch()
            time.sleep(0.02)
