"""What Redis sessions promise beyond the contract: names, steps, times, the SDK's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
import redis.asyncio
from agents.extensions.memory import RedisSession as SDKSession
from django.test import override_settings
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from redis.crc import key_slot

from agent_sessions import RedisSession, get_session
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.redis import RedisBackend, scripts
from agent_sessions.backends.redis.scripts import Names
from agent_sessions.exceptions import InvalidBackend, LeaseLost, StorageError
from agent_sessions.items import decode, encode_batch
from agent_sessions.models import AgentSession
from tests.servers import Server
from tests.servers.redis import url

pytestmark = pytest.mark.one_database

IDS = ["plain", "a{b}c", "{b}", "a}b", "a{}b", "}{", "{", "a{b", "ü}{", "{}{x}", "a b"]
MESSAGES: list[Any] = [{"role": "user", "content": f"item {n}"} for n in range(6)]


@pytest.fixture
def place(redis_server: Server) -> str:
    return url(redis_server, 3)


@pytest.fixture
def link(place: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(place) as client:
        yield client


def open_session(place: str, session_id: str = "", **options: Any) -> RedisSession:
    return RedisSession.from_url(session_id or uuid.uuid4().hex, place, **options)


def store(session: Any) -> RedisBackend:
    backend: RedisBackend = session.backend
    return backend


def names(session: Any) -> Names:
    return store(session).names(session.key)


# --- names ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="{}:ab-ü", min_size=1), st.text(alphabet="{}:ab", max_size=4))
@example("a{}b", "agents:session")
def test_keys_of_a_session_share_a_slot(session_id: str, prefix: str) -> None:
    """agentscope-java #2579: else a cluster answers CROSSSLOT."""
    for user in (None, 7):
        keys = Names(prefix, session_id, "default", user).keys
        assert len(set(keys)) == 5
        assert len({key_slot(key) for key in keys}) == 1
        # A rule for a prefix, as an ACL has, holds for all of them.
        assert all(key.startswith(prefix.encode()) for key in keys)
        assert all(key.startswith(keys[0]) for key in keys)


def test_a_cluster_finds_the_same_slots(redis_cluster: list[Server]) -> None:
    with redis.Redis(port=redis_cluster[0].port) as node:
        for session_id in IDS:
            for key in Names("agents:session", session_id).keys:
                assert node.execute_command("CLUSTER KEYSLOT", key) == key_slot(key)


@settings(deadline=None)
@given(st.text(alphabet=":-ofa1%", min_size=1), st.text(alphabet=":a1%", min_size=1))
def test_owned_and_unowned_keys_differ(first: str, second: str) -> None:
    """No id that one can choose without an owner names an owner's keys."""
    made = [
        Names("agents:session", first),
        Names("agents:session", second, "a", first),
        Names("agents:session", second, f"a:{first}", 1),
        Names("agents:session", f"{first}:{second}", "a", 1),
    ]
    keys = {key for name in made for key in name.keys}
    assert len(keys) == 5 * len(made)


# --- the SDK's histories -------------------------------------------------------------


async def test_the_sdks_history_opens_and_it_reads_ours(place: str) -> None:
    session_id = uuid.uuid4().hex
    sdk = SDKSession.from_url(session_id, url=place)
    ours = open_session(place, session_id)
    await sdk.add_items(MESSAGES[:2])
    assert await ours.get_items() == MESSAGES[:2]
    await ours.add_items(MESSAGES[2:4])
    assert await sdk.get_items() == MESSAGES[:4]
    assert await sdk.pop_item() == MESSAGES[3]
    assert await ours.pop_item() == MESSAGES[2]
    await sdk.clear_session()
    await ours.add_items(MESSAGES[:1])
    assert await sdk.get_items() == MESSAGES[:1]
    await sdk.close()


async def test_clearing_leaves_nothing_of_the_sdks(
    place: str, link: redis.Redis
) -> None:
    session_id = uuid.uuid4().hex
    sdk = SDKSession.from_url(session_id, url=place, ttl=60)
    await sdk.add_items(MESSAGES)
    await sdk._get_next_id()
    await sdk.close()
    await open_session(place, session_id).clear_session()
    _, notes, _, calls, answers = names(open_session(place, session_id)).keys
    assert {*link.keys(f"*{session_id}*")} == {notes, calls, answers}
    # Numbers alone, and not for long.
    assert {*link.hgetall(notes)} == {b"base"}
    assert link.hvals(answers) == [b"6"]
    for name in (notes, calls, answers):
        assert 0 < link.pttl(name) <= scripts.EMPTY_MS


async def test_clearing_spares_another_sessions_items(place: str) -> None:
    """The SDK's names overlap: what it keeps of one id may be another's items."""
    session_id = uuid.uuid4().hex
    other = open_session(place, session_id)
    await other.add_items(MESSAGES)
    await open_session(place, f"{session_id}:messages").clear_session()
    assert await other.get_items() == MESSAGES


# --- one step, one round trip --------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ttl": 60}], ids=["for_ever", "sliding"])
async def test_each_operation_is_one_round_trip(
    place: str, options: dict[str, Any]
) -> None:
    session = open_session(place, **options)
    backend = store(session)

    async def use() -> None:
        await session.add_items(MESSAGES)
        await session.get_items()
        await session.get_items(limit=2)
        await session.pop_item()
        await backend.apage(session.key, limit=2)
        await session.clear_session()

    await use()  # the server knows the scripts now
    watcher = redis.asyncio.Redis.from_url(place)
    async with watcher, watcher.monitor() as monitor:
        await use()
        await session.backend.ping()  # type: ignore[attr-defined]
        seen = []
        async for heard in monitor.listen():
            if heard["client_type"] != "lua":
                seen.append(heard["command"].split()[0])
            if seen and seen[-1] == "PING":
                break
    read = "EVALSHA" if options else "LRANGE"
    assert seen == ["EVALSHA", read, read, "EVALSHA", "EVALSHA", "EVALSHA", "PING"]


async def test_a_server_that_lost_the_scripts_gets_them_again(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES[:2])
    link.script_flush()
    await session.add_items(MESSAGES[2:3])
    assert await session.get_items() == MESSAGES[:3]


async def test_large_batches_arrive_whole(place: str) -> None:
    """Lua passes some thousand arguments at once, and no more."""
    session = open_session(place)
    batch: list[Any] = [{"n": n} for n in range(25_000)]
    await session.add_items(batch)
    assert await session.get_items() == batch


# --- a command that arrives twice ----------------------------------------------------


# How many other writes lie between a lost answer and the second try.
BETWEEN = [0, 1, 31, 32, 300]


@pytest.mark.parametrize("between", BETWEEN)
async def test_a_batch_that_arrives_twice_is_stored_once(
    place: str, between: int
) -> None:
    session = open_session(place)
    backend, mine = store(session), names(session)
    first = ("w-first", "", 0, 0, 0, 0, '{"n":1}')
    assert await backend._run(scripts.APPEND, mine, *first) == 1
    for _ in range(between):
        await session.add_items(MESSAGES[:1])
    assert await backend._run(scripts.APPEND, mine, *first) == 1 + between
    assert len(await session.get_items()) == 1 + between


async def test_a_batch_that_arrives_again_after_a_clear_stays_cleared(
    place: str,
) -> None:
    session = open_session(place)
    backend, mine = store(session), names(session)
    first = ("w-first", "", 0, 0, 0, 0, '{"n":1}')
    await backend._run(scripts.APPEND, mine, *first)
    await session.clear_session()
    await backend._run(scripts.APPEND, mine, *first)
    assert await session.get_items() == []


@pytest.mark.parametrize("between", BETWEEN[:-1])
async def test_a_pop_that_arrives_twice_takes_one_item(
    place: str, between: int
) -> None:
    session = open_session(place)
    batch: list[Any] = [{"n": n} for n in range(between + 2)]
    await session.add_items(batch)
    backend, mine = store(session), names(session)
    pop = ("p-first", "", 0, 0, 8, 0, 0, "")
    text, left = (await backend._run(scripts.POP, mine, *pop))[1:]
    assert (decode(text.decode()), left) == (batch[-1], between + 1)
    others = [await session.pop_item() for _ in range(between)]
    assert others == batch[1:-1][::-1]
    assert await backend._run(scripts.POP, mine, *pop) == [1, text, 1]
    assert await session.get_items() == batch[:1]


async def test_a_pop_that_arrives_again_after_a_clear_brings_nothing_back(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES)
    backend, mine = store(session), names(session)
    pop = ("p-first", "", 0, 0, 8, 0, 0, "")
    await backend._run(scripts.POP, mine, *pop)
    await session.clear_session()
    assert await backend._run(scripts.POP, mine, *pop) == [1, b"", 0]
    kept = [link.dump(name) for name in mine.keys]
    assert not any(b"item 5" in value for value in kept if value)


@pytest.mark.parametrize("begun", [True, False], ids=["items", "nothing"])
async def test_a_clear_that_arrives_twice_clears_once(place: str, begun: bool) -> None:
    session = open_session(place)
    if begun:
        await session.add_items(MESSAGES)
    backend, mine = store(session), names(session)
    clear = ("w-first", "")
    count = await backend._run(scripts.CLEAR, mine, *clear)
    assert count == (6 if begun else 0)
    await session.add_items(MESSAGES[:2])
    await session.clear_session()
    await session.add_items(MESSAGES[:1])
    assert await backend._run(scripts.CLEAR, mine, *clear) == count
    assert await session.get_items() == MESSAGES[:1]


async def test_tokens_are_forgotten_by_time(place: str, link: redis.Redis) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES)
    calls, answers = names(session).keys[3:]
    await session.pop_item()
    for name in (calls, answers):
        assert 0 < link.pttl(name) <= scripts.KEPT_MS
    old = time.time() * 1000 - scripts.KEPT_MS - 10_000
    link.zadd(calls, {b"p-old": old})
    link.hset(answers, "p-old", "{}")
    await session.pop_item()
    assert link.zscore(calls, b"p-old") is None
    assert not link.hexists(answers, "p-old")
    assert link.zcard(calls) == 3


class DeafProxy:
    """Passes what a client says to the server, and loses the first answers."""

    def __init__(self, server: Server, word: bytes) -> None:
        self.server, self.word = server, word
        self.losses = 2
        self.serving: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> DeafProxy:
        self.listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *args: object) -> None:
        self.listener.close()
        await asyncio.wait(self.serving)

    async def _serve(self, client: Any, answers: Any) -> None:
        task: Any = asyncio.current_task()
        self.serving.add(task)
        server, asking = await asyncio.open_connection(
            self.server.host, self.server.port
        )
        back = asyncio.create_task(self._pass(server, answers))
        try:
            while asked := await client.read(65_536):
                loses = self.losses and self.word in asked
                if loses:
                    back.cancel()
                asking.write(asked)
                if loses:
                    self.losses -= 1
                    # The server has done it; its answer is read and lost.
                    await asyncio.wait({back})
                    await server.read(65_536)
                    break
        finally:
            back.cancel()
            await asyncio.wait({back})
            for writer in (asking, answers):
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    async def _pass(self, server: Any, answers: Any) -> None:
        while answer := await server.read(65_536):
            answers.write(answer)


async def test_lost_answers_double_nothing(redis_server: Server, place: str) -> None:
    """The client's own retry sends again what may have arrived: it is done once."""
    session_id = uuid.uuid4().hex
    direct = open_session(place, session_id)
    await direct.add_items(MESSAGES[:3])
    async with DeafProxy(redis_server, b"EVALSHA") as proxy:
        deaf = open_session(f"redis://127.0.0.1:{proxy.port}/3", session_id)
        await deaf.add_items(MESSAGES[3:])
        assert proxy.losses == 0
        assert await direct.get_items() == MESSAGES
        proxy.losses = 2
        assert await deaf.pop_item() == MESSAGES[5]
        assert proxy.losses == 0
        assert await direct.get_items() == MESSAGES[:5]
        proxy.losses = 2
        assert await store(deaf).aclear(deaf.key) == 5
        await deaf.close()


# --- unreadable elements -------------------------------------------------------------


async def test_a_pop_of_what_was_written_here_is_one_round_trip(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES)
    before = scripts_run(link)
    assert await session.pop_item() == MESSAGES[-1]
    assert scripts_run(link) == before + 1
    # What others write has no mark: it is looked at before it is taken away.
    link.rpush(names(session).items, json.dumps(MESSAGES[0]))
    assert await session.pop_item() == MESSAGES[0]
    assert scripts_run(link) == before + 3


def scripts_run(link: redis.Redis) -> int:
    found: Any = link.info("commandstats")
    return int(found.get("cmdstat_evalsha", {}).get("calls", 0))


async def test_the_mark_is_no_part_of_an_item(place: str, link: redis.Redis) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES[:1])
    text: Any = link.lindex(names(session).items, 0)
    assert text.endswith(scripts.MARK.encode())
    assert json.loads(text) == MESSAGES[0]
    page = await store(session).apage(session.key)
    assert json.loads(page.items[0].raw) == MESSAGES[0]
    assert page.items[0].raw == page.items[0].raw.rstrip()


@pytest.mark.parametrize("decodes", [False, True])
async def test_bytes_that_are_no_text_are_kept(
    place: str, link: redis.Redis, decodes: bool
) -> None:
    """A decoding client would choke on the whole answer."""
    options = {"decode_responses": decodes}
    session = open_session(place, redis_kwargs=options)
    await session.add_items(MESSAGES[:2])
    key = names(session).items
    link.rpush(key, b'{"\xff": 1}', b"\xff\xfe")
    assert await session.get_items(limit=2) == MESSAGES[:2]
    page = await session.backend.apage(session.key)
    assert [stored.item for stored in page.items] == [*MESSAGES[:2], None, None]
    assert page.items[-1].raw == "\\xff\\xfe"
    assert await session.pop_item() == MESSAGES[1]
    assert link.llen(key) == 3


async def test_pop_looks_behind_many_unreadable_ones(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES)
    link.rpush(names(session).items, *["no JSON"] * 100)
    assert await session.pop_item() == MESSAGES[-1]
    assert await session.get_items(limit=1) == [MESSAGES[-2]]
    assert link.llen(names(session).items) == 105


async def test_pops_over_an_unreadable_tail_get_distinct_items(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES)
    link.rpush(names(session).items, "no JSON")
    popped = await asyncio.gather(*(session.pop_item() for _ in range(8)))
    found: list[Any] = [item for item in popped if item]
    assert sorted(item["content"] for item in found) == [
        item["content"] for item in MESSAGES
    ]
    assert link.lrange(names(session).items, 0, -1) == [b"no JSON"]


async def test_long_items_and_lone_surrogates_are_popped(place: str) -> None:
    session = open_session(place)
    items: list[Any] = [{"n": 1, "text": "x" * 100_000}, {"n": 2, "text": "\ud800"}]
    await session.add_items(items)
    assert [await session.pop_item() for _ in range(3)] == [items[1], items[0], None]


# --- how long, how many --------------------------------------------------------------


def _times(link: redis.Redis, session: Any) -> list[int]:
    """Return what is left to the items, and to what tells of them where it is there."""
    items, *beside = names(session).keys[:3]
    return [
        int(link.pttl(key)) for key in (items, *(b for b in beside if link.exists(b)))
    ]


async def test_a_sliding_ttl_begins_anew_with_each_use(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place, ttl=timedelta(minutes=1))
    for use in (
        lambda: session.add_items(MESSAGES[:2]),
        lambda: session.get_items(),
        lambda: session.pop_item(),
    ):
        if link.exists(names(session).items):
            link.pexpire(names(session).items, 5_000)
        await use()
        assert all(50_000 < left <= 60_000 for left in _times(link, session))
    # Looking at it, as the admin does, is no use.
    link.pexpire(names(session).items, 5_000)
    await session.backend.apage(session.key)
    assert 0 < link.pttl(names(session).items) <= 5_000


async def test_a_fixed_ttl_counts_from_the_first_write(
    place: str, link: redis.Redis
) -> None:
    session = open_session(place, ttl=60, sliding=False)
    await session.add_items(MESSAGES[:2])
    link.pexpire(names(session).items, 5_000)
    await session.add_items(MESSAGES[2:])
    await session.get_items()
    await session.pop_item()
    assert all(0 < left <= 5_000 for left in _times(link, session))
    await session.clear_session()
    await session.add_items(MESSAGES)
    assert all(50_000 < left <= 60_000 for left in _times(link, session))


@pytest.mark.django_db
@pytest.mark.parametrize("options", [{"ttl": 60}, {"max_items": 1}])
def test_the_row_counts_no_items_that_are_gone(
    place: str, link: redis.Redis, options: dict[str, Any]
) -> None:
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            "OPTIONS": {"url": place, **options},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session(uuid.uuid4().hex)
        session.sync.add_items(MESSAGES)
        if "ttl" in options:
            # As when they expire.
            link.delete(*store(session).names(session.key).keys)
        session.sync.add_items(MESSAGES[:1])
        row = AgentSession.objects.get(session_id=session.session_id)
        assert row.item_count == 1


async def test_without_a_ttl_nothing_expires(place: str, link: redis.Redis) -> None:
    session = open_session(place)
    await session.add_items(MESSAGES)
    await session.clear_session()
    await session.add_items(MESSAGES)
    assert _times(link, session) == [-1, -1, -1]


async def test_an_expired_history_begins_anew(place: str, link: redis.Redis) -> None:
    session = open_session(place, ttl=60)
    await session.add_items(MESSAGES)
    for key in names(session).keys:
        link.pexpire(key, 1)
    link.wait(1, 5)  # for a replica that there is not: 5 ms
    assert await session.get_items() == []
    await session.add_items(MESSAGES[:1])
    assert await session.get_items() == MESSAGES[:1]


async def test_max_items_keeps_the_newest(place: str) -> None:
    session = open_session(place, max_items=4)
    await session.add_items(MESSAGES[:3])
    await session.add_items(MESSAGES[3:])
    assert await session.get_items() == MESSAGES[2:]
    page = await session.backend.apage(session.key)
    assert [stored.position for stored in page.items] == [3, 4, 5, 6]
    await session.add_items(MESSAGES)
    assert await session.get_items() == MESSAGES[2:]


# --- pages ---------------------------------------------------------------------------


async def test_positions_stay_what_they_were(place: str) -> None:
    session = open_session(place)
    backend = session.backend
    await session.add_items(MESSAGES)

    async def read(**options: Any) -> tuple[list[int], bool, bool]:
        page = await backend.apage(session.key, **options)
        places = [stored.position for stored in page.items]
        return places, page.has_earlier, page.has_later

    assert await read(limit=2) == ([5, 6], True, False)
    assert await read(before=5, limit=3) == ([2, 3, 4], True, True)
    assert await read(before=3) == ([1, 2], False, True)
    assert await read(before=1) == ([], False, True)
    assert await read(after=4) == ([5, 6], True, False)
    assert await read(after=0, limit=1) == ([1], False, True)
    assert await read(after=6) == ([], True, False)
    await session.clear_session()
    assert await read() == ([], False, False)
    await session.add_items(MESSAGES[:2])
    # What a reader of the cleared history knows names none of the new one.
    assert await read(after=6) == ([7, 8], False, False)


async def test_pages_tell_when_a_batch_was_written(place: str) -> None:
    session = open_session(place)
    moments = []
    for start in (0, 2, 4):
        moments.append(datetime.now(UTC) - timedelta(milliseconds=2))
        await session.add_items(MESSAGES[start : start + 2])
        moments.append(datetime.now(UTC))
        await asyncio.sleep(0.005)
    await session.pop_item()
    page = await session.backend.apage(session.key, after=1)
    made = {stored.position: stored.created_at for stored in page.items}
    assert list(made) == [2, 3, 4, 5]
    assert moments[0] <= made[2] <= moments[1] < made[3] == made[4] <= moments[3]
    assert moments[4] <= made[5] <= moments[5]


# --- compaction ----------------------------------------------------------------------


@pytest.mark.parametrize("sliding", [False, True])
async def test_a_history_is_replaced_in_one_step(
    place: str, link: redis.Redis, sliding: bool
) -> None:
    """#5010: the SDK's compaction clears and adds where a session lacks the hook."""
    session = open_session(place, ttl=60, sliding=sliding)
    await session.add_items(MESSAGES)
    link.pexpire(names(session).items, 5_000)
    assert await session._atomic_replace_items(MESSAGES[:2])
    assert await session.get_items() == MESSAGES[:2]
    page = await session.backend.apage(session.key)
    assert [stored.position for stored in page.items] == [7, 8]
    assert (link.pttl(names(session).items) > 5_000) is sliding
    assert await session._atomic_replace_items([])
    assert await session.get_items() == []


async def test_a_subclass_that_changes_items_is_not_passed_by(place: str) -> None:
    class Shouting(RedisSession):
        async def add_items(self, items: Any, **options: Any) -> None:
            changed: list[Any] = [{"loud": True, **item} for item in items]
            await super().add_items(changed)

    session = Shouting.from_url(uuid.uuid4().hex, place)
    assert not await session._atomic_replace_items(MESSAGES)
    assert await session.get_items() == []


async def test_the_sdks_compaction_uses_the_hook(place: str) -> None:
    from agents.memory import OpenAIResponsesCompactionSession

    session = open_session(place)
    await session.add_items(MESSAGES)
    async with AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9") as client:
        compacting = OpenAIResponsesCompactionSession(
            session.session_id, session, client=client
        )
        await compacting._replace_underlying_session_items(
            output_items=MESSAGES[:1], previous_items=MESSAGES
        )
    assert await session.get_items() == MESSAGES[:1]
    page = await session.backend.apage(session.key)
    # Replaced, not cleared and added.
    assert page.items[0].position == 7


# --- listing -------------------------------------------------------------------------


async def _ids(backend: RedisBackend) -> list[str]:
    return [session_id async for session_id in backend.store_ids()]


async def test_sessions_without_an_owner_are_listed(place: str) -> None:
    prefix = f"a*[b]?\\{uuid.uuid4().hex}"
    sessions = [open_session(place, name, key_prefix=prefix) for name in IDS]
    for session in sessions:
        await session.add_items(MESSAGES[:1])
    backend = store(sessions[0])
    await backend.store_append(SessionKey("owned", 5), encode_batch(MESSAGES))
    assert sorted(await _ids(backend)) == sorted(IDS)


async def test_every_node_of_a_cluster_is_listed(redis_cluster: list[Server]) -> None:
    options = {"cluster": True, "key_prefix": uuid.uuid4().hex}
    ids = [f"{name}-{n}" for name in IDS for n in range(5)]
    made = [open_session(url(redis_cluster[0]), name, **options) for name in ids]
    for session in made:
        await session.add_items(MESSAGES[:1])
    assert sorted(await _ids(store(made[0]))) == sorted(ids)


# --- leases --------------------------------------------------------------------------


async def test_the_server_refuses_a_lease_that_was_taken_over(place: str) -> None:
    """However late it comes, and whatever the row said a moment before."""
    session = open_session(place)
    backend, batch = store(session), encode_batch(MESSAGES[:1])
    old, new = session.key.fenced(9), session.key.fenced(10)
    await backend.store_append(old, batch)
    await backend.store_latest(new, None)
    for attempt in (
        lambda: backend.store_append(old, batch),
        lambda: backend.store_latest(old, 1),
        lambda: backend.store_pop(old),
        lambda: backend.store_clear(old),
    ):
        with pytest.raises(LeaseLost):
            await attempt()
    assert len(await session.get_items()) == 1
    await backend.store_append(new, batch)
    await session.clear_session()
    # A row made anew counts from 1 again.
    await backend.store_append(session.key.fenced(1), batch)


# --- clients -------------------------------------------------------------------------


async def test_a_client_handed_in_stays_open(place: str) -> None:
    async with redis.asyncio.Redis.from_url(place) as client:
        session = RedisSession(uuid.uuid4().hex, client)
        await session.add_items(MESSAGES)
        assert await session.ping()
        await session.close()
        assert await client.ping()
        assert await session.get_items() == MESSAGES


async def test_a_cluster_client_handed_in_works(redis_cluster: list[Server]) -> None:
    async with redis.asyncio.RedisCluster.from_url(url(redis_cluster[0])) as client:
        sessions = [RedisSession(uuid.uuid4().hex, client) for _ in range(8)]
        await asyncio.gather(*(session.add_items(MESSAGES) for session in sessions))
        for session in sessions:
            assert await session.pop_item() == MESSAGES[-1]
            await session.clear_session()
            assert await session.get_items() == []


def test_a_client_handed_in_belongs_to_one_loop(place: str) -> None:
    client = redis.asyncio.Redis.from_url(place)
    session = RedisSession(uuid.uuid4().hex, client)

    async def use() -> None:
        await session.add_items(MESSAGES)
        await client.aclose()

    asyncio.run(use())
    with pytest.raises(StorageError, match="from_url"):
        asyncio.run(session.get_items())


def test_what_is_no_asyncio_client_is_refused(link: redis.Redis) -> None:
    clients: list[Any] = [link, None, "redis://localhost", RedisBackend]
    for client in clients:
        with pytest.raises(InvalidBackend, match=r"client of redis\.asyncio"):
            RedisSession("x", client)


def test_each_loop_has_one_client_and_leaves_none(place: str) -> None:
    name = uuid.uuid4().hex
    kwargs = {"client_name": name}

    async def use() -> int:
        for _ in range(5):
            await open_session(place, redis_kwargs=kwargs).add_items(MESSAGES[:1])
        return connected()

    def connected() -> int:
        with redis.Redis.from_url(place) as client:
            return sum(found["name"] == name for found in client.client_list())

    assert [asyncio.run(use()) for _ in range(3)] == [1, 1, 1]
    assert connected() == 0
    session = open_session(place, redis_kwargs=kwargs)
    session.sync.add_items(MESSAGES)
    assert session.sync.get_items(limit=1) == MESSAGES[-1:]
    assert connected() == 1
    session.backend.close()
    assert connected() == 0


async def test_close_lets_idle_connections_go(place: str, link: redis.Redis) -> None:
    name = uuid.uuid4().hex
    session = open_session(place, redis_kwargs={"client_name": name})
    await session.add_items(MESSAGES)
    await session.close()
    assert name not in [found["name"] for found in link.client_list()]
    other = open_session(place, session.session_id, redis_kwargs={"client_name": name})
    assert await other.get_items() == MESSAGES


def test_no_setting_of_django_is_needed(place: str) -> None:
    source = f"""
import asyncio
from agent_sessions import RedisSession, get_session
session = RedisSession.from_url("{uuid.uuid4().hex}", {place!r})
async def main():
    await session.add_items([{{"role": "user", "content": "hi"}}])
    print(await session.get_items())
asyncio.run(main())
"""
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env={"PATH": "", "OPENAI_AGENTS_DISABLE_TRACING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.stdout, child.stderr) == (
        "[{'role': 'user', 'content': 'hi'}]\n",
        "",
    )


async def test_from_cache_reads_the_alias(redis_server: Server) -> None:
    session_id = uuid.uuid4().hex
    caches = {
        "default": {
            "BACKEND": "django_redis.cache.RedisCache",
            "LOCATION": url(redis_server, 3),
        }
    }
    with override_settings(CACHES=caches):
        session = RedisSession.from_cache(session_id)
        await session.add_items(MESSAGES)
    assert await open_session(url(redis_server, 3), session_id).get_items() == MESSAGES


# --- closing, and the SDK's keys --------------------------------------------------------


@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize("use", ["add", "pop", "read", "replace"])
async def test_every_key_of_an_sdk_history_gets_the_ttl(
    place: str, link: redis.Redis, use: str, sliding: bool
) -> None:
    """Else its metadata stays for ever, where the items are forgotten."""
    sdk = SDKSession.from_url(uuid.uuid4().hex, url=place)
    await sdk.add_items(MESSAGES)
    assert await sdk._get_next_id() == 1
    await sdk.close()
    session = open_session(place, sdk.session_id, ttl=500, sliding=sliding)
    uses: dict[str, Any] = {
        "add": lambda: session.add_items(MESSAGES),
        "pop": session.pop_item,
        "read": session.get_items,
        "replace": lambda: session._atomic_replace_items(MESSAGES),
    }
    await uses[use]()
    stem = f"agents:session:{sdk.session_id}"
    found: Any = [link.ttl(name) for name in link.scan_iter(f"{stem}*")]
    if use == "read" and not sliding:
        # Then a read writes nothing, and what was there keeps what it had.
        assert set(found) == {-1}
    else:
        assert len(found) >= 3
        assert all(0 < left <= 600 for left in found)
        assert all(490 < link.ttl(stem + end) <= 500 for end in ("", ":counter"))


async def test_a_ttl_reaches_no_key_of_another_session(
    place: str, link: redis.Redis
) -> None:
    session_id = uuid.uuid4().hex
    other = open_session(place, session_id)
    await other.add_items(MESSAGES)
    # Its metadata would lie where the other's items do.
    await open_session(place, f"{session_id}:messages", ttl=5).add_items(MESSAGES)
    assert link.ttl(names(other).items) == -1


async def test_expiry_that_the_sdk_gave_is_kept(place: str, link: redis.Redis) -> None:
    sdk = SDKSession.from_url(uuid.uuid4().hex, url=place, ttl=300)
    await sdk.add_items(MESSAGES)
    await sdk.close()
    await open_session(place, sdk.session_id).add_items(MESSAGES)
    stem = f"agents:session:{sdk.session_id}"
    for name in ("", ":messages"):
        assert 290 < link.ttl(stem + name) <= 300
