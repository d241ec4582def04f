"""Looking at rows for those who listen in this process, to runs of others."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, cast
from weakref import ref

import pytest
from asgiref.sync import sync_to_async
from cryptography.fernet import Fernet
from django.db import connections
from django.db.models import F
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agent_sessions import DjangoSession, get_session, sessions
from agent_sessions.agui import RunRequest, StreamOptions
from agent_sessions.backends import run_rows
from agent_sessions.backends.base import SessionKey
from agent_sessions.consumers import AgentConsumer
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentRun, AgentSession, RunEvents, SessionSecret
from agent_sessions.runs import (
    Conversation,
    RunLimits,
    RunSetup,
    event_rows,
    get_run_manager,
    recovery,
    sync,
)
from agent_sessions.runs.event_rows import About, Chunk, Unwritten
from agent_sessions.runs.log import Frame, Subscription, group_of
from agent_sessions.runs.watching import Watcher, place_of
from tests.settings import DATABASE_KIND
from tests.support.chat import Socket, text_of
from tests.support.gated import gated
from tests.support.streams import Http
from tests.websocket.test_consumer import conversation, items_of, speaker

pytestmark = pytest.mark.django_db(transaction=True)


async def found() -> Conversation:
    user, session_id = await conversation()
    return await Conversation.find(session_id, user=user)


async def test_each_group_tells_that_it_listens() -> None:
    """Else the process that has the run ends it, since nobody seems to listen."""
    listeners: dict[Any, set[Subscription]] = {}
    watcher = Watcher({}, listeners)
    lease = {"run_id": "r-7", "run_owner": "elsewhere:1:x", "state": "running"}
    for _ in range(2):
        where = await found()
        await where.rows().aupdate(**lease, run_seen_at=timezone.now())
        listeners[place_of(where)] = {Subscription()}
        watched = watcher.watch(where, 60)
        # As with connections="request": each is looked at on its caller's connection.
        watched.run_id, watched.group = "r-7", watched
    silent = AgentSession.objects.filter(run_listened_at=None)
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not await silent.aexists():
            break
    assert not await silent.aexists()
    listeners.clear()


async def test_the_branch_of_a_session_with_a_restored_key_is_not_shown() -> None:
    """The key of the row is another session's by now."""
    listeners: dict[Any, set[Subscription]] = {}
    watcher, where, listener = Watcher({}, listeners), await found(), Subscription()
    listener.open.branch = "fork"
    listeners[place_of(where)] = {listener}
    some = [(place_of(where), watcher.watch(where, 60))]
    await watcher._look(some, tells=False)
    assert listener.lagging
    listener.lagging = False
    await where.rows().aupdate(session_id="another")
    await watcher._look(some, tells=False)
    assert not listener.lagging
    listeners.clear()


async def test_what_one_listener_lacks_is_not_told_to_another_twice() -> None:
    """A run of another process begins and ends between two looks."""
    manager, where = get_run_manager(), await found()
    options: dict[str, Any] = {"options": StreamOptions(), "stale_after": 60}
    early, late = Subscription(), Subscription()
    await manager.sync(where, early, offset=None, **options)
    await hear(early)

    await where.backend.threads.run(write_told, where, "r-1", "completed")
    await manager.sync(where, late, offset=None, **options)
    assert {frame.run_id.partition(":")[0] for frame in await hear(late)} == {"sync"}
    await where.rows().aupdate(fence=F("fence") + 1)
    manager.watcher.wake()

    assert [frame.run_id for frame in await hear(early)] == ["r-1", "r-1"]
    assert late.is_idle
    manager.unsubscribe(where, early)
    manager.unsubscribe(where, late)


async def test_a_run_that_begins_while_a_listener_joins_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In another process, after the session was seen at rest."""
    manager, where = get_run_manager(), await found()

    def begin(*args: Any) -> None:
        lease = {"run_id": "r-1", "run_owner": "elsewhere:1:x", "state": "running"}
        where.rows().update(**lease, run_seen_at=timezone.now(), fence=F("fence") + 1)
        write_told(where, "r-1", "running")

    monkeypatch.setattr(sync, "pending", begin)
    listener = Subscription()
    options: dict[str, Any] = {"options": StreamOptions(), "stale_after": 60}
    await manager.sync(where, listener, offset=None, **options)
    await hear(listener)
    assert [frame.run_id for frame in await hear(listener)] == ["r-1", "r-1"]
    manager.unsubscribe(where, listener)


async def test_what_a_run_writes_while_a_listener_joins_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is neither in the rows that were read nor waiting to be written any more."""
    manager, where = get_run_manager(), await found()
    agent, model = gated("It rains in Lisbon now", pause_at=2)
    asked = {"id": "u-1", "role": "user", "content": "And?"}
    request = RunRequest(where.session_id, "r-1", [asked])
    run = await manager.start(where, request, RunSetup(agent))
    assert run is not None
    # The writer passes it over until the words are there.
    async with run.rows.lock:
        await asyncio.wait_for(model.paused.wait(), 20)
        read, log, listener = event_rows.read, run.rows, Subscription()

        def reading(*args: Any) -> list[Chunk]:
            chunks = read(*args)
            monkeypatch.setattr(event_rows, "read", read)
            found = log.unwritten()
            assert found.chunks
            event_rows.write(where.using, [found])
            log.settled(found)
            return chunks

        monkeypatch.setattr(event_rows, "read", reading)
        options: dict[str, Any] = {"options": StreamOptions(), "stale_after": 60}
        await manager.sync(where, listener, offset="r-1:0", **options)
        # Words that came after those.
        model.gate.set()
    frames = await hear(listener)
    assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
    assert text_of([frame.event for frame in frames]) == "It rains in Lisbon now"
    manager.unsubscribe(where, listener)


@pytest.mark.parametrize("wraps", [False, True])
async def test_words_that_a_projects_session_changes_are_not_kept(wraps: bool) -> None:
    """Whoever recovers a run doesn't know what it would have stored."""

    class Redacting(DjangoSession):
        """Stores less than it is given."""

    class Consumer(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            if not wraps:
                return session
            return Redacting.from_key(session.backend, session.key)

    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent, consumer=Consumer) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_CONTENT")
        where = await Conversation.find(session_id, user=user)
        run: Any = get_run_manager().active(where)
        await get_run_manager().writer.flush(run.rows)
        # As when its process is gone.
        await where.rows().aupdate(run_owner="elsewhere:1:x", run_seen_at=None)
        await where.backend.threads.run(recovery.recover, where, 15)
        texts = [text for _, _, text in await items_of(session_id)]
        assert texts == (["Hi"] if wraps else ["Hi", "one two"])
        model.gate.set()
        await asyncio.wait({run.task})


async def test_an_ended_run_is_not_kept_in_memory() -> None:
    """Its rows tell it again, for as long as they are kept."""
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        where = await Conversation.find(session_id, user=user)
        run = ref(cast("Any", get_run_manager().active(where)))
        model.gate.set()
        await tab.to_end()
        async with asyncio.timeout(20):
            while run() is not None:
                await asyncio.sleep(0.02)
                gc.collect()
        await tab.sync("r-1:0")
        assert text_of(await tab.to_end()) == "one two three"


async def test_the_key_of_a_session_is_taken_before_its_row(settings: Any) -> None:
    """As an append does, else the two would wait for each other."""
    encrypted = {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {
            "backend": "in",
            "keys": [Fernet.generate_key().decode()],
            "session_keys": True,
        },
    }
    settings.AGENT_SESSIONS = {
        "default": encrypted,
        "in": {"BACKEND": DATABASE_BACKEND},
    }
    user, session_id = await conversation()
    agent, model = gated("one two three")
    async with Socket(session_id, user, agent) as tab:
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        await tab.until("TEXT_MESSAGE_CONTENT")
        where = await Conversation.find(session_id, user=user)
        run: Any = get_run_manager().active(where)
        await get_run_manager().writer.flush(run.rows)
        await where.rows().aupdate(run_owner="elsewhere:1:x", run_seen_at=None)

        def recover() -> list[str]:
            with CaptureQueriesContext(connections["default"]) as queries:
                recovery.recover(where, 15)
            return [query["sql"] for query in queries]

        asked = await sync_to_async(recover)()
        keys, rows = SessionSecret._meta.db_table, AgentSession._meta.db_table
        first = next(n for n, sql in enumerate(asked) if keys in sql)
        assert not [sql for sql in asked[:first] if "UPDATE" in sql and rows in sql]
        texts = await get_session(session_id, user=user).get_items()
        assert [each["content"] for each in cast("Any", texts)] == ["Hi", "one two"]
        model.gate.set()
        await asyncio.wait({run.task})


@pytest.mark.skipif(DATABASE_KIND != "postgres", reason="needs schemas")
def test_the_tables_of_two_tenants_are_told_apart() -> None:
    """A schema each, behind one alias, with rows of the same keys."""
    store, key = sessions["default"], SessionKey("room")
    ours = Conversation.ensure(store, key)
    table = AgentSession._meta.db_table
    with connections["default"].cursor() as cursor:
        cursor.execute("CREATE SCHEMA other")
        try:
            cursor.execute(f"CREATE TABLE other.{table} AS TABLE {table}")
            cursor.execute("SET search_path TO other, public")
            theirs = Conversation.ensure(store, key)
        finally:
            cursor.execute("DROP SCHEMA other CASCADE")
            cursor.execute("SET search_path TO public")
    assert ours.pk == theirs.pk
    assert place_of(ours) != place_of(theirs)
    assert group_of(ours) != group_of(theirs)
    assert place_of(ours) == place_of(Conversation.ensure(store, key))


@pytest.mark.parametrize("is_checked", [False, True])
async def test_what_a_killed_run_was_asked_is_kept(is_checked: bool) -> None:
    """It died before the SDK had stored it."""
    where = await found()
    lease = {"run_id": "r-1", "run_owner": "elsewhere:1:x", "state": "running"}
    await where.rows().aupdate(**lease, fence=7)
    run = await AgentRun.objects.acreate(session_id=where.pk, run_id="r-1")
    asked = [{"id": "u-1", "role": "user", "content": "Hi"}]
    started = {"type": "RUN_STARTED", "threadId": "t", "runId": "r-1"}
    frame = Frame("r-1", 1, {**started, "input": {"messages": asked}})
    chunk = Chunk([frame], About(0, is_checked=is_checked))
    told = await sync_to_async(event_rows.rows_of)(Unwritten(where, run, 7, [chunk]))
    await where.backend.threads.run(run_rows.add_events, where.using, told)
    for _ in range(2):
        await where.backend.threads.run(recovery.recover, where, 15)
        stored = [(role, text) for _, role, text in await items_of(where.session_id)]
        # A session of the project may store something else.
        assert stored == ([] if is_checked else [("user", "Hi")])
    await run.arefresh_from_db()
    assert run.status == "interrupted"


async def test_what_a_killed_run_asked_again_is_left_to_its_branch() -> None:
    """What is told of a message is less than its item has."""
    where = await found()
    lease = {"run_id": "r-1", "run_owner": "elsewhere:1:x", "state": "running"}
    await where.rows().aupdate(**lease, fence=7)
    run = await AgentRun.objects.acreate(session_id=where.pk, run_id="r-1")
    source = {"type": "file", "value": "file-1", "provider": "openai"}
    content = [{"type": "document", "source": source}]
    asked = [{"id": "r-1:again", "role": "user", "content": content}]
    started = {"type": "RUN_STARTED", "threadId": "t", "runId": "r-1"}
    frame = Frame("r-1", 1, {**started, "input": {"messages": asked}})
    unwritten = Unwritten(where, run, 7, [Chunk([frame], About(0))])
    told = await sync_to_async(event_rows.rows_of)(unwritten)
    await where.backend.threads.run(run_rows.add_events, where.using, told)
    await where.backend.threads.run(recovery.recover, where, 15)
    assert await items_of(where.session_id) == []
    await run.arefresh_from_db()
    assert run.status == "interrupted"


async def hear(listener: Subscription) -> list[Frame]:
    """Take frames up to the end of a run."""
    frames: list[Frame] = []
    async with asyncio.timeout(10):
        while not frames or not frames[-1].is_last:
            frame = await listener.get()
            assert frame is not None
            frames.append(frame)
    return frames


def write_told(where: Conversation, run_id: str, status: str) -> None:
    """Write the rows of a run as another process does."""
    run = AgentRun.objects.create(session_id=where.pk, run_id=run_id, status=status)
    events = [
        {"type": "RUN_STARTED", "threadId": "t", "runId": run_id},
        {"type": "RUN_FINISHED", "threadId": "t", "runId": run_id},
    ]
    frames = [Frame(run_id, n, event) for n, event in enumerate(events, 1)]
    told = Unwritten(where, run, 0, [Chunk(frames, About(0))])
    run_rows.add_events(where.using, event_rows.rows_of(told))
    assert RunEvents.objects.filter(run=run).exists()


async def test_the_next_run_without_listeners_has_a_countdown_of_its_own() -> None:
    user, session_id = await conversation()
    limits = RunLimits(detach_timeout=0.5)
    agent, model = gated("one two three")
    agents = iter([speaker("Hello"), agent])

    async with Http(session_id, None, get_agent=agents.__next__, limits=limits) as http:
        await http.login(user)
        # Answers that nobody reads.
        await http.run("r-1", "Hi")
        where = await Conversation.find(session_id, user=user)
        first: Any = get_run_manager().active(where)
        await asyncio.wait({first.task})
        await http.run("r-2", "Hi again")
        await model.paused.wait()
        run: Any = get_run_manager().active(where)
        await asyncio.sleep(1)
        assert run._abort_mode == "after_turn"
        model.gate.set()
        await asyncio.wait({run.task})


def test_loops_that_have_ended_are_let_go_of() -> None:
    loops: list[ref[asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        loops.append(ref(asyncio.get_running_loop()))
        user, session_id = await conversation()
        async with Http(session_id, speaker("Hello")) as http:
            await (await http.login(user)).run("r-1", "Hi")

    for _ in range(3):
        asyncio.run(main())
    gc.collect()
    assert [loop() is not None for loop in loops] in ([False] * 3, [False, False, True])
