"""EncryptedBackend against someone who writes to the store: every form of a row."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from redis import Redis

from agent_sessions import EncryptedSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.wrapping import innermost
from agent_sessions.consumers import CLOSE_UNAVAILABLE
from agent_sessions.exceptions import (
    EncryptionError,
    UnacceptedEnvelope,
    UnknownEncryptionKey,
)
from agent_sessions.handler import open_session
from agent_sessions.models import AgentSession, SessionItem, SessionSecret
from tests.backends.encrypted.test_encrypted import (
    TREASURE,
    data,
    key_id,
    private,
    under,
)
from tests.backends.encrypted.test_encrypted_rotation import rotate
from tests.encryption.test_encryption import NEW, OLD, said
from tests.servers.process import Server
from tests.servers.redis import url
from tests.support.chat import Socket, create_conversation, make_user, refusal_of
from tests.support.list_backend import ListBackend
from tests.websocket.test_consumer import speaker

pytestmark = [pytest.mark.django_db(transaction=True)]
one_database = pytest.mark.one_database
REDIS = "agent_sessions.backends.redis.RedisBackend"

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    cache.clear()
    with under(NEW):
        yield


def envelope(position: int, session_id: str = "s") -> Any:
    return json.loads(data(session_id).get(position=position).data)


def put(position: int, changed: Any, session_id: str = "s") -> None:
    text = changed if isinstance(changed, str) else json.dumps(changed)
    data(session_id).filter(position=position).update(data=text)


def copy_to_the_end(position: int, session_id: str = "s") -> None:
    """Put a copy of a row behind the newest, as somebody with an editor can."""
    item = data(session_id).get(position=position)
    head = data(session_id).last().position
    item.pk, item.position = None, head + 1
    item.save()
    item.branch.head = head + 1
    item.branch.save(update_fields=["head"])
    AgentSession.objects.filter(session_id=session_id).update(item_count=head + 1)


def contents(session_id: str = "s", **options: Any) -> list[str]:
    return [item["content"] for item in private(session_id).sync.get_items(**options)]


# -- one form --------------------------------------------------------------------------


def with_last_bits(token: str) -> str:
    """Set bits of the last letter that a decoder drops."""
    body = token.rstrip("=")
    last = ALPHABET[ALPHABET.index(body[-1]) + 1]
    return body[:-1] + last + "=" * (len(token) - len(body))


PAYLOADS: dict[str, Callable[[str], str]] = {
    "foreign_in_front": lambda token: "!!!!" + token,
    "foreign_inside": lambda token: token[:20] + "!!!!" + token[20:],
    "foreign_at_the_end": lambda token: token + "!!!!",
    "padding_in_front": lambda token: "====" + token,
    "more_padding": lambda token: token + "====",
    "no_padding": lambda token: token.rstrip("="),
    "line_end": lambda token: token + "\n",
    "blanks": lambda token: "    " + token,
    "lines": lambda token: token[:76] + "\r\n\r\n" + token[76:],
    "other_alphabet": lambda token: token.replace("-", "+").replace("_", "/"),
    "last_bits": with_last_bits,
    "not_ascii": lambda token: token + "éééé",
    "nul": lambda token: "\x00\x00\x00\x00" + token,
    "twice": lambda token: token + token,
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", PAYLOADS)
@one_database
def test_a_payload_opens_in_its_own_spelling_only(name: str, warm: bool) -> None:
    """With a lifetime one changed row would hide its turn and all before it."""
    with under(NEW, lifetime="1h"):
        for number in range(12):
            private().sync.add_items([said(f"{number}" + number * "x")])
        if warm:
            assert len(contents()) == 12
        else:
            sessions["private"].close()
        # One that has padding, and letters that differ between the alphabets.
        number = next(
            n
            for n in range(5, 13)
            if envelope(n)["payload"].endswith("=")
            and PAYLOADS[name](envelope(n)["payload"]) != envelope(n)["payload"]
        )
        before = contents()
        changed = envelope(number)
        changed["payload"] = PAYLOADS[name](changed["payload"])
        put(number, changed)
        del before[number - 1]
        assert contents() == before
        found = sessions["private"].page(SessionKey("s"))
        assert [s.position for s in found.items if s.item is None] == [number]
    with under(OLD, NEW):
        with pytest.raises(CommandError):
            rotate()
        # Not sealed anew, with whatever time stood in front.
        assert envelope(number) == changed


FORMS: dict[str, Callable[[Any], Any]] = {
    "upper_id": lambda e: e | {"id": e["id"].upper()},
    "blank_in_id": lambda e: e | {"id": " " + e["id"]},
    "id_with_prefix": lambda e: e | {"id": "0x" + e["id"]},
    "no_id": lambda e: {k: v for k, v in e.items() if k != "id"},
    "true_mark": lambda e: e | {"__enc__": True},
    "float_mark": lambda e: e | {"__enc__": 1.0},
    "text_mark": lambda e: e | {"__enc__": "1"},
    "float_version": lambda e: e | {"v": 2.0},
    "text_version": lambda e: e | {"v": "2"},
    "true_version": lambda e: e | {"v": True},
    "further_key": lambda e: e | {"role": "user"},
    "further_null": lambda e: e | {"more": None},
    "payload_list": lambda e: e | {"payload": [e["payload"]]},
    "no_version": lambda e: {k: v for k, v in e.items() if k != "v"},
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", FORMS)
@one_database
def test_an_envelope_has_one_form(name: str, warm: bool) -> None:
    private().sync.add_items([said("one"), said("two"), said("three")])
    if warm:
        assert contents() == ["one", "two", "three"]
    else:
        sessions["private"].close()
    put(2, FORMS[name](envelope(2)))
    assert contents() == ["one", "three"]


@one_database
@pytest.mark.parametrize("name", ["upper", "other"])
def test_a_changed_key_id_is_told(name: str) -> None:
    private().sync.add_items([said("one"), said("two")])
    kid = envelope(2)["kid"].upper() if name == "upper" else key_id(OLD)
    put(2, envelope(2) | {"kid": kid})
    with pytest.raises(UnknownEncryptionKey, match=kid):
        contents()


# -- the same one twice ----------------------------------------------------------------


def test_a_copied_row_is_passed_over_and_stays() -> None:
    private().sync.add_items([said("pay"), said("thanks")])
    copy_to_the_end(1)
    assert contents() == ["pay", "thanks"]
    assert contents(limit=2) == ["pay", "thanks"]
    found = sessions["private"].page(SessionKey("s")).items
    assert [s.item and s.item["content"] for s in found] == ["pay", "thanks", None]
    assert contents() == ["pay", "thanks"]
    private().sync.add_items([said("more")])
    assert contents() == ["pay", "thanks", "more"]
    assert [private().sync.pop_item() for _ in range(2)] == [
        said("more"),
        said("thanks"),
    ]
    assert data("s").count() == 2
    assert private().sync.pop_item() == said("pay")
    # What is left is no copy any more.
    assert private().sync.pop_item() == said("pay")


@one_database
def test_a_copy_in_redis_is_passed_over_however_often_it_is_looked_at(
    redis_server: Server,
) -> None:
    """It is asked for the newest first, then for more, from the newest again."""
    options = {"url": url(redis_server), "key_prefix": "copies"}
    with under(NEW, inner={"BACKEND": REDIS, "OPTIONS": options}):
        private().sync.add_items([said("pay"), said("thanks")])
        inner: Any = innermost(sessions["private"])
        with Redis.from_url(url(redis_server)) as client:
            name = inner.names(SessionKey("s")).items
            client.rpush(name, client.lindex(name, 0))
        assert contents() == ["pay", "thanks"]
        assert private().sync.pop_item() == said("thanks")


@one_database
async def test_an_old_copy_is_told_in_every_window_and_page() -> None:
    with under(NEW, lifetime="1h"):
        for number in range(60):
            await private().add_items([said(f"{number}")])
        await sync_to_async(copy_to_the_end)(3)
        await private().add_items([said("60"), said("61")])
        expected = [f"{n}" for n in range(62)]
        for limit in (1, 2, 3, 5, 50):
            items = await private().get_items(limit=limit)
            assert [i["content"] for i in items] == expected[-limit:]
    key, backend = SessionKey("s"), sessions["private"]
    for options in ({}, {"lifetime": "1h"}, {"session_keys": True}):
        with under(NEW, **options):
            backend = sessions["private"]
            page = await backend.apage(key, limit=5)
            assert page == await sync_to_async(backend.page)(key, limit=5)
            assert [s.item and s.item["content"] for s in page.items] == [
                "58",
                "59",
                None,
                "60",
                "61",
            ]
    assert [(await private().pop_item())["content"] for _ in range(3)] == [
        "61",
        "60",
        "59",
    ]


@one_database
def test_a_copy_over_another_row_is_passed_over() -> None:
    private().sync.add_items([said("one"), said("two"), said("three")])
    put(2, envelope(1))
    assert contents() == ["one", "three"]
    put(3, envelope(1))
    assert contents() == ["one"]


@one_database
def test_a_forged_row_with_the_id_hides_nothing() -> None:
    private().sync.add_items([said("one"), said("two"), said("three")])
    put(1, envelope(3) | {"payload": envelope(1)["payload"]})
    assert contents() == ["two", "three"]


@one_database
def test_a_copy_under_an_older_key_is_one() -> None:
    with under(OLD, key_refresh=1):
        private().sync.add_items([said("one"), said("two")])
        old = envelope(1)
    with under(NEW, OLD, key_refresh=1):
        rotate()
        copy_to_the_end(1)
        put(3, old)
        assert contents() == ["one", "two"]
        # It can be told by its id for good: a rotation keeps that.
        rotate()
        assert envelope(3) != old
        assert contents() == ["one", "two"]


@one_database
def test_a_copy_on_a_later_page_is_not_exported() -> None:
    batch = [said(f"{number}") for number in range(250)]
    private().sync.add_items(batch)
    copy_to_the_end(3)
    out = StringIO()
    call_command("show_agent_session", "s", "--limit=0", "--json", stdout=out)
    shown = [item.get("item") for item in json.loads(out.getvalue())["items"]]
    assert shown == [*batch, None]


@one_database
async def test_a_copy_in_a_store_that_pops_blindly_stops_pops() -> None:
    ListBackend.histories.clear()
    with under(NEW, inner={"BACKEND": ListBackend}):
        await private().add_items([said("one"), said("two")])
        texts = ListBackend.histories[None, "s"]
        texts.append(texts[0])
        assert await private().get_items() == [said("one"), said("two")]
        with pytest.raises(EncryptionError, match="copied or moved"):
            await private().pop_item()
        assert len(texts) == 3


@one_database
async def test_a_copy_around_a_session_object() -> None:
    store = get_session("s")
    session = EncryptedSession(store, NEW)
    await session.add_items([said("one"), said("two")])
    await store.add_items((await store.get_items())[:1])
    assert await session.get_items() == [said("one"), said("two")]
    snapshot = await session._get_compaction_snapshot(5)
    assert (snapshot.items, snapshot.complete) == ([], False)
    # Passed over, like any row that doesn't open, and kept.
    assert await session.pop_item() == said("two")
    assert len(await store.get_items()) == 2


# -- the SDK's envelopes ---------------------------------------------------------------


async def sdk_wrote(*items: Any, key: str = NEW) -> None:
    from agents.extensions.memory import EncryptedSession as SDKEncryptedSession

    inner = open_session(innermost(sessions["private"]), SessionKey("s"))
    await SDKEncryptedSession("s", inner, key).add_items(list(items))


async def test_envelopes_of_the_sdk_are_refused_by_name() -> None:
    await private().add_items([said("ours")])
    await sdk_wrote(said("theirs"))
    before = [row async for row in SessionItem.objects.values_list("data", flat=True)]
    for call in (private().get_items, private().pop_item, private().clear_session):
        with pytest.raises(UnacceptedEnvelope, match="accept_sdk_envelopes=True"):
            await call()
    with pytest.raises(CommandError):
        await sync_to_async(rotate)()
    after = [row async for row in SessionItem.objects.values_list("data", flat=True)]
    assert before == after
    with under(NEW, accept_sdk_envelopes=True):
        assert await private().get_items() == [said("ours"), said("theirs")]
        assert "1 item of 1 session" in await sync_to_async(rotate)()
    assert await private().get_items() == [said("ours"), said("theirs")]


@one_database
async def test_a_copied_envelope_of_the_sdk_is_one_after_a_rotation_too() -> None:
    with under(NEW, accept_sdk_envelopes=True):
        await sdk_wrote(said("one"), said("two"))
        await sync_to_async(copy_to_the_end)(1)
        assert await private().get_items() == [said("one"), said("two")]
        await sync_to_async(rotate)()
        assert await private().get_items() == [said("one"), said("two")]
    assert await private().get_items() == [said("one"), said("two")]


@one_database
async def test_an_envelope_of_the_sdk_is_no_sealed_text() -> None:
    from agents.extensions.memory import EncryptedSession as SDKEncryptedSession

    with under(NEW, accept_sdk_envelopes=True):
        await private().add_items([said("hi")])
        store = get_session("s")
        await SDKEncryptedSession("s", store, NEW).add_items([{"text": "a state"}])  # type: ignore[list-item]
        text = json.dumps((await store.get_items())[0])
        backend = sessions["private"]
        with pytest.raises(EncryptionError):
            await sync_to_async(backend.sealer.open)(SessionKey("s"), text)


@one_database
@pytest.mark.parametrize("name", ["id", "kid", "payload"])
async def test_an_envelope_of_the_sdk_has_one_form(name: str) -> None:
    with under(NEW, accept_sdk_envelopes=True):
        await private().add_items([said("ours")])
        await sdk_wrote(said("theirs"))
        found = await sync_to_async(envelope)(2)
        changes = {"id": "0" * 24, "kid": "hkdf-v2", "payload": "!!!!"}
        if name == "payload":
            changes["payload"] += found["payload"]
        await sync_to_async(put)(2, found | {name: changes[name]})
        if name == "payload":
            with pytest.raises(UnknownEncryptionKey):
                await private().get_items()
        else:
            assert await private().get_items() == [said("ours")]


# -- a key for each session ------------------------------------------------------------


def test_a_rotation_makes_the_key_of_an_older_session() -> None:
    private().sync.add_items([said("one"), said(TREASURE)])
    with under(NEW, session_keys=True):
        told = rotate()
        assert "2 items, and 1 session key of 1 session put under" in told
        secret = SessionSecret.objects.get()
        assert secret.key_id == key_id(NEW)
        kids = {envelope(position)["kid"] for position in (1, 2)}
        assert len(kids) == 1
        assert kids.isdisjoint({key_id(NEW), key_id(OLD)})
        assert "0 items of 0 sessions" in rotate()
        assert contents() == ["one", TREASURE]
        backup = data("s").get(position=2).data
        private().sync.clear()
        private().sync.add_items([said("new")])
        data("s").update(data=backup)
        # Destroyed with its key: the master key opens it no more.
        with pytest.raises(UnknownEncryptionKey):
            contents()
    with pytest.raises(UnknownEncryptionKey):
        contents()


@one_database
def test_a_key_is_made_under_a_new_master_key_too() -> None:
    with under(OLD, key_refresh=1):
        private(user=make_user()).sync.add_items([said("one")])
    with under(NEW, OLD, session_keys=True, key_refresh=1):
        assert "1 item, and 1 session key" in rotate()
    with under(NEW, session_keys=True):
        assert SessionSecret.objects.get().key_id == key_id(NEW)
        row = AgentSession.objects.get()
        found = sessions["private"].latest(SessionKey("s", row.user_id), None)
        assert found == [said("one")]


@one_database
def test_a_session_that_is_gone_gets_no_key() -> None:
    private().sync.add_items([said("one")])
    with under(NEW, session_keys=True):
        AgentSession.objects.all().delete()
        backend: Any = sessions["private"]
        assert not backend.rewrap(SessionKey("s"))
        assert not SessionSecret.objects.exists()


# -- what looks like an envelope -------------------------------------------------------

MARK = '{"__enc__":1,"v":2,"kid":"qt7l6tsfbexozhco","id":"00","payload":"gAAAAA"}'
LOOKALIKES: list[Any] = [
    json.loads(MARK),
    {"__enc__": 1, "v": 1, "kid": "hkdf-v1", "payload": "gAAAAA"},
    {"__enc__": 1, "v": 7, "kid": "x", "id": "1", "payload": "gAAAAA"},
    said(MARK),
    {
        "type": "message",
        "role": "developer",
        "content": [{"type": "input_text", "text": MARK}],
    },
]


@pytest.mark.parametrize("backend", ["default", "private"])
@one_database
async def test_what_looks_like_an_envelope_closes_nothing(backend: str) -> None:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend=backend)
    session = get_session(row.session_id, user=user, backend=backend)
    items = [said("hello"), *LOOKALIKES]
    await session.add_items(items)
    assert await session.get_items() == items
    store = sessions[backend]
    found = await store.apage(SessionKey(row.session_id, user.pk))
    assert [s.item for s in found.items] == items
    found.assert_open()
    async with Socket(row.session_id, user, speaker(), backend=backend) as tab:
        await tab.sync()
        events = await tab.to_end()
    (shown,) = (e for e in events if e["type"] == "MESSAGES_SNAPSHOT")
    assert [m["content"] for m in shown["messages"]] == ["hello", MARK]
    other = {"default": "private", "private": "default"}[backend]
    await sync_to_async(call_command)(
        *("copy_agent_sessions", "--all", f"--from={backend}", f"--to={other}"),
        "--in-clear",
    )
    copy = get_session(row.session_id, user=user, backend=other)
    assert await copy.get_items() == items
    assert await session.pop_item() == items[-1]


# -- doors behind which nothing opens --------------------------------------------------


@one_database
@pytest.mark.parametrize("how", ["key", "changed"])
async def test_no_door_shows_what_does_not_open_as_empty(how: str) -> None:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend="private")
    await private(row.session_id, user=user).add_items([said(TREASURE)])
    if how == "changed":
        await SessionItem.objects.aupdate(data='{"role":"user","content":"forged"}')
    with under(OLD if how == "key" else NEW):
        await sync_to_async(no_door_shows)(row, user)
        if how == "key":
            await sync_to_async(no_door_deletes)(row, user)
        async with Socket(row.session_id, user, speaker(), backend="private") as tab:
            await tab.sync()
            assert await tab.closed() == CLOSE_UNAVAILABLE


def no_door_deletes(row: AgentSession, user: Any) -> None:
    from django.test import RequestFactory

    from agent_sessions.views import SessionView

    request = RequestFactory().delete("/")
    request.user = user
    view = SessionView.as_view(backend="private")
    response: Any = view(request, session_id=row.session_id)
    assert response.status_code == 503
    assert json.loads(response.content) == refusal_of("unreadable")
    assert SessionItem.objects.count() == 1


def no_door_shows(row: AgentSession, user: Any) -> None:
    from django.test import RequestFactory

    from agent_sessions.views import SessionMessagesView

    request = RequestFactory().get("/")
    request.user = user
    view = SessionMessagesView.as_view(backend="private")
    response: Any = view(request, session_id=row.session_id)
    assert response.status_code == 503
    assert json.loads(response.content) == refusal_of("unreadable")
    assert response.headers["Cache-Control"] == "private, no-store"
    for command in ("show_agent_session", "export_agent_sessions"):
        out = StringIO()
        with pytest.raises(CommandError):
            call_command(command, row.session_id, stdout=out, stderr=out)
        assert "forged" not in out.getvalue()
    with pytest.raises(CommandError):
        call_command(
            *("copy_agent_sessions", "--all", "--from=private", "--to=default"),
            "--in-clear",
            stderr=out,
        )
    assert not AgentSession.objects.filter(backend="default").exists()


# -- what a process remembers ----------------------------------------------------------


def remembered() -> str:
    """Return all that the process keeps of opened envelopes, as one text."""
    backend: Any = sessions["private"]
    return repr(list(backend._memory._entries.items()))


@one_database
async def test_no_key_of_a_session_is_remembered() -> None:
    with under(NEW, session_keys=True):
        backend: Any = sessions["private"]
        key = SessionKey("s")
        await private().add_items([said(TREASURE)])
        assert await private().get_items() == [said(TREASURE)]
        await sync_to_async(backend.sealer.seal)(key, "a state")
        await backend.apage(key)
        assert TREASURE in remembered()
        ring = (await backend.avault(key)).ring
        own = (set(ring.ids) - {key_id(NEW)}).pop()
        secret = base64.b64encode(ring.get(own).secret).decode()
        assert secret not in remembered()
        assert "a state" not in remembered()
        # Destroyed elsewhere: what is remembered opens no row.
        await SessionSecret.objects.all().adelete()
        with pytest.raises(UnknownEncryptionKey):
            await private().get_items()


@one_database
@pytest.mark.parametrize("how", ["clear", "pop", "delete", "erase", "clear_async"])
@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
def test_what_is_removed_here_is_forgotten_here(how: str, options: Any) -> None:
    with under(NEW, **options):
        user = make_user("alice")
        session = private(user=user)
        session.sync.add_items([said(TREASURE)])
        assert session.sync.get_items() == [said(TREASURE)]
        assert TREASURE in remembered()
        if how == "clear":
            session.sync.clear()
        elif how == "clear_async":
            async_to_sync(session.clear_session)()
        elif how == "pop":
            assert session.sync.pop_item() == said(TREASURE)
        elif how == "delete":
            AgentSession.objects.get().delete()
        else:
            call_command("erase_agent_user", "alice", "--no-input", stdout=StringIO())
        assert TREASURE not in remembered()


@one_database
def test_a_session_key_costs_a_query_a_read() -> None:
    private().sync.add_items([said("one")])
    plain = count_queries()
    with under(NEW, session_keys=True):
        private().sync.add_items([said("one")])
        own = count_queries()
    more = {name: own[name] - plain[name] for name in own}
    assert more == {"read": 1, "page": 1}


def count_queries() -> dict[str, int]:
    backend, key, counts = sessions["private"], SessionKey("s"), {}
    operations: dict[str, Any] = {
        "read": lambda: backend.latest(key, 5),
        "page": lambda: backend.page(key),
    }
    for name, operation in operations.items():
        with CaptureQueriesContext(connection) as found:
            operation()
        counts[name] = len(found)
    return counts
