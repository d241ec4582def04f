"""What it takes to start a run: trips to the database, and statements."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.cache import cache
from django.db import connections
from django.test.utils import CaptureQueriesContext

from agent_sessions.concurrency.threads import DatabaseThreads
from agent_sessions.models import AgentRun, AgentSession
from tests.support.chat import Socket
from tests.support.gated import gated
from tests.support.usages import agent, say
from tests.websocket.test_consumer import conversation

pytestmark = pytest.mark.django_db(transaction=True)

# What a transaction takes beside its own statements is not counted.
FRAMES = ("BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK", "COMMIT", "SET ")


class Trips:
    """The calls that went to a database thread, and the statements of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, list[str]]] = []
        trips, run = self.made, DatabaseThreads.run

        async def counted(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                with CaptureQueriesContext(connections["default"]) as seen:
                    try:
                        return function(*args, **kwargs)
                    finally:
                        asked = [query["sql"] for query in seen.captured_queries]
                        name = getattr(function, "__name__", "")
                        trips.append((name or function.func.__name__, asked))

            return await run(self, call)

        monkeypatch.setattr(DatabaseThreads, "run", counted)

    def statements(self, name: str) -> list[str]:
        """Return the statements of the one trip that called a function."""
        [found] = [asked for called, asked in self.made if called == name]
        return [sql for sql in found if not sql.startswith(FRAMES)]


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> Trips:
    cache.clear()
    return Trips(monkeypatch)


async def test_a_run_starts_with_one_trip_beside_the_user_s(trips: Trips) -> None:
    user, session_id = await conversation()
    speaker, model = gated("Hello", pause_at=0)
    async with Socket(session_id, user, speaker) as tab:
        await tab.sync()
        await tab.to_end()
        trips.made.clear()
        await tab.say("r-1", "Hi")
        assert (await tab.frame())["chunk"]["type"] == "RUN_STARTED"
        assert [name for name, _ in trips.made[:2]] == ["look", "begin"]
        assert len(trips.statements("begin")) == 3
        model.gate.set()
        await tab.to_end()


async def test_a_repeated_id_takes_one_trip_and_starts_nothing(trips: Trips) -> None:
    user, session_id = await conversation()
    speaker, model = gated("Hello", pause_at=0)
    async with Socket(session_id, user, speaker) as tab:
        await tab.say("r-1", "Hi")
        await tab.frame()
        trips.made.clear()
        async with Socket(session_id, user, speaker) as other:
            await other.say("r-1", "Hi")
            assert (await other.frame())["chunk"]["type"] == "RUN_STARTED"
            # Once while it runs, when the session is busy with that very run.
            assert len(trips.statements("begin")) == 2
            model.gate.set()
            await other.to_end()
        await tab.to_end()
        trips.made.clear()
        await tab.say("r-1", "Hi")
        # Once when it has ended, and the row alone tells.
        assert (await tab.frame())["chunk"]["type"] == "RUN_STARTED"
        trips.statements("begin")
    assert await AgentRun.objects.acount() == 1
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.run_id) == ("idle", "")


async def test_a_session_is_freed_from_a_dead_run_by_the_next(trips: Trips) -> None:
    user, session_id = await conversation()
    await AgentSession.objects.filter(session_id=session_id).aupdate(
        run_id="gone", run_owner="elsewhere", state="running"
    )
    async with Socket(session_id, user, agent(say("Hello"))) as tab:
        trips.made.clear()
        await tab.say("r-1", "Hi")
        await tab.to_end()
    assert trips.statements("begin")
    row = await AgentSession.objects.aget(session_id=session_id)
    assert (row.state, row.run_id) == ("idle", "")
