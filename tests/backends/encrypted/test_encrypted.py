"""EncryptedBackend: what it hides, what it refuses, and what it never destroys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from agents import Agent, Runner
from agents.memory import OpenAIResponsesCompactionSession
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.apps import apps
from django.core import checks
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.urls import reverse
from openai import AsyncOpenAI

from agent_sessions import EncryptedSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.wrapping import innermost
from agent_sessions.checks import check_backends
from agent_sessions.consumers import CLOSE_UNAVAILABLE
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidBackend,
    InvalidItem,
    SessionDoesNotExist,
    UnknownEncryptionKey,
)
from agent_sessions.handler import open_session
from agent_sessions.models import AgentRun, AgentSession, SessionItem, SessionSecret
from agent_sessions.retention import (
    Removal,
    finish_removals,
    remove,
    unfinished_items,
)
from tests.backends.encrypted.test_encrypted_contract import (
    DATABASE,
    ENCRYPTED,
    KEY,
    encrypted,
)
from tests.encryption.test_encryption import NEW, OLD, said
from tests.memory.test_compaction import SUMMARY, Compactor, compacting, compactor
from tests.support.admin_pages import LIST, page, staff, url
from tests.support.approvals import refund, refunded
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.list_backend import ListBackend

__all__ = ["compactor"]

pytestmark = [pytest.mark.django_db(transaction=True)]
# What depends on no database runs on one.
one_database = pytest.mark.one_database

TREASURE = "the treasure lies under the oak"
SETTING = encrypted({"BACKEND": DATABASE})


def under(*keys: str, inner: Any = None, **options: Any) -> Any:
    return override_settings(
        AGENT_SESSIONS=encrypted(
            inner or {"BACKEND": DATABASE}, **{"keys": list(keys), **options}
        )
    )


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    cache.clear()
    with override_settings(AGENT_SESSIONS=SETTING):
        yield


def key_id(key: str) -> str:
    from agent_sessions.encryption import MasterKey

    return MasterKey.parse(key).id


def stored() -> str:
    """Return everything that our tables hold, as one text."""
    rows: list[Any] = []
    for model in apps.get_app_config("agent_sessions").get_models():
        rows += model._base_manager.values()
    return json.dumps(rows, default=str)


def private(session_id: str = "s", **options: Any) -> Any:
    return get_session(session_id, backend="private", **options)


class ReadingBackend(DatabaseBackend):
    """A backend that has reads of its own, as they are abstract."""

    def latest(self, key: SessionKey, limit: int | None) -> list[Any]:
        self.has_read = True
        return super().latest(key, limit)

    async def alatest(self, key: SessionKey, limit: int | None) -> list[Any]:
        self.has_awaited = True
        return await super().alatest(key, limit)


# -- what is stored --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
def test_nothing_of_the_contents_is_in_any_column(
    options: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    items: Any = [
        said(TREASURE),
        {
            "type": "function_call",
            "call_id": f"call {TREASURE}",
            "name": f"tool {TREASURE}",
            "arguments": TREASURE,
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": TREASURE}]},
    ]
    with under(NEW, **options):
        session = private().sync
        session.add_items(items)
        assert session.get_items() == items
        assert TREASURE not in stored()
        assert "function_call" not in stored()
        for item in SessionItem._base_manager.all():
            assert (item.type, item.role, item.text) == ("", "", "")
            assert (item.call_id, item.tool_name) == ("", "")
        row = AgentSession.objects.get()
        assert (row.title, row.item_count, row.backend) == ("", 3, "private")
        shown = f"{sessions['private']!r} {private()!r} {caplog.text}"
        assert TREASURE not in shown
        assert NEW not in shown + stored()


def test_each_alias_has_its_own_sessions() -> None:
    private().sync.add_items([said("hidden")])
    assert get_session("s").sync.get_items() == []
    get_session("s").sync.add_items([said("plain")])
    assert private().sync.get_items() == [said("hidden")]


# -- what doesn't open -----------------------------------------------------------------


@pytest.mark.parametrize("inner", [{"BACKEND": DATABASE}, {"BACKEND": ListBackend}])
async def test_a_wrong_key_is_named_and_destroys_nothing(inner: Any) -> None:
    """openai-agents #5005; and it never looks like an empty history."""
    ListBackend.histories.clear()
    with under(OLD, inner=inner):
        await private().add_items([said("one"), said("two")])
    with under(NEW, inner=inner):
        wrong = private()
        for call in (
            wrong.get_items,
            lambda: wrong.get_items(limit=1),
            wrong.pop_item,
            wrong.clear_session,
            sync_to_async(wrong.sync.get_items),
            sync_to_async(wrong.sync.pop_item),
            sync_to_async(wrong.sync.clear),
        ):
            with pytest.raises(UnknownEncryptionKey, match=key_id(OLD)):
                await call()
        agent = Agent(name="a", model=ScriptedModel([[assistant_message("no")]]))
        with pytest.raises(UnknownEncryptionKey):
            await Runner.run(agent, "hi", session=wrong)
    with under(NEW, OLD, inner=inner):
        session = private()
        assert await session.get_items() == [said("one"), said("two")]
        assert await session.pop_item() == said("two")
        await session.clear()
        assert await session.get_items() == []


async def test_a_history_without_its_key_is_cleared_where_that_is_wanted() -> None:
    with under(OLD):
        await private().add_items([said("one")])
    with under(NEW, clear_without_key=True):
        await private().clear()
        assert await private().get_items() == []
        assert await SessionItem._base_manager.acount() == 0


def data(session_id: str) -> Any:
    rows = SessionItem._base_manager.filter(branch__session__session_id=session_id)
    return rows.order_by("position")


def test_a_row_from_another_session_is_passed_over_and_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    private("mine").sync.add_items([said("1"), said("2"), said("3")])
    private("other").sync.add_items([said(TREASURE)])
    foreign = data("other").get().data
    data("mine").filter(position=2).update(data=foreign)
    data("mine").filter(position=3).update(data='{"role":"user","content":"forged"}')
    session = private("mine").sync
    assert session.get_items() == [said("1")]
    assert session.get_items(limit=1) == [said("1")]
    assert "2 rows of a session in 'private' don't open" in caplog.text
    assert TREASURE not in caplog.text
    found = sessions["private"].page(SessionKey("mine"))
    assert [s.item for s in found.items] == [said("1"), None, None]
    assert session.pop_item() == said("1")
    assert data("mine").count() == 2
    for call in (session.get_items, session.pop_item):
        with pytest.raises(EncryptionError, match="moved"):
            call()
    assert data("mine").count() == 2


def test_a_session_of_a_new_owner_does_not_open() -> None:
    alice, bob = make_user(), make_user()
    private(user=alice).sync.add_items([said("hers")])
    with pytest.raises(SessionDoesNotExist):
        private(user=bob).sync.get_items()
    AgentSession.objects.update(user=bob)
    with pytest.raises(EncryptionError, match="None of the 1 items"):
        private(user=bob).sync.get_items()


@one_database
def test_an_alias_may_be_renamed_with_the_name_that_it_had() -> None:
    private().sync.add_items([said("hi")])
    setting = encrypted({"BACKEND": DATABASE}, name="private")
    setting["secret"] = setting.pop("private")
    AgentSession.objects.update(backend="secret")
    with override_settings(AGENT_SESSIONS=setting):
        assert get_session("s", backend="secret").sync.get_items() == [said("hi")]


def test_what_is_no_json_is_refused_before_anything_is_written() -> None:
    with pytest.raises(InvalidItem):
        private().sync.add_items([said("hi"), {"score": float("inf")}])
    assert AgentSession.objects.count() == SessionSecret.objects.count() == 0


# -- a lifetime ------------------------------------------------------------------------


@one_database
def test_a_lifetime_hides_whole_turns_on_every_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with under(NEW, lifetime="100s"):
        session = private().sync
        for number, moment in enumerate((1000, 1050, 1100)):
            monkeypatch.setattr("time.time", lambda moment=moment: float(moment))
            session.add_items([said(f"q{number}")])
            monkeypatch.setattr("time.time", lambda moment=moment: float(moment + 10))
            session.add_items([{"role": "assistant", "content": f"a{number}"}])
        backend = sessions["private"]

        def at(now: float, **place: Any) -> list[Any]:
            monkeypatch.setattr("time.time", lambda: now)
            found = backend.page(SessionKey("s"), **place)
            return [s.item["content"] for s in found.items if s.item]

        assert at(1105) == ["q0", "a0", "q1", "a1", "q2", "a2"]
        assert at(1155) == ["q1", "a1", "q2", "a2"]
        # The question's time is over, but its turn's answer is on the next page.
        assert at(1155, before=4) == ["q1"]
        assert at(1161, before=4) == []
        assert at(1155, before=3) == []
        monkeypatch.setattr("time.time", lambda: 9999.0)
        assert session.get_items() == []
        assert session.pop_item() is None
        assert SessionItem._base_manager.count() == 6
        monkeypatch.undo()


@one_database
async def test_a_lifetime_on_async_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    with under(NEW, lifetime=timedelta(days=1)):
        await private().add_items([said("now")])
        found = await sessions["private"].apage(SessionKey("s"))
        assert [s.item for s in found.items] == [said("now")]


# -- the SDK's histories ---------------------------------------------------------------


@one_database
async def test_histories_of_the_sdk_open_in_a_backend() -> None:
    from agents.extensions.memory import EncryptedSession as SDKEncryptedSession

    inner = open_session(innermost(sessions["private"]), SessionKey("s"))
    await SDKEncryptedSession("s", inner, KEY).add_items([said("theirs")])
    with under(KEY, accept_sdk_envelopes=True):
        session = private()
        assert await session.get_items() == [said("theirs")]
        await session.add_items([said("ours")])
        assert await session.pop_item() == said("ours")


# -- a key for each session ------------------------------------------------------------


def test_clearing_destroys_the_sessions_key() -> None:
    with under(NEW, session_keys=True):
        session = private().sync
        session.add_items([said(TREASURE)])
        backup = data("s").get().data
        first = SessionSecret.objects.get()
        assert first.key_id == key_id(NEW)
        assert json.loads(backup)["kid"] not in {key_id(NEW), key_id(OLD)}
        session.clear()
        assert SessionSecret.objects.count() == 0
        backend: Any = sessions["private"]
        assert repr(backend._memory) == "<Memory 0 sessions>"
        session.add_items([said("afresh")])
        assert SessionSecret.objects.get().wrapped != first.wrapped
        # What a backup brings back doesn't open any more, and is told.
        data("s").update(data=backup)
        with pytest.raises(UnknownEncryptionKey, match=json.loads(backup)["kid"]):
            session.get_items()


def test_deleting_destroys_the_sessions_key() -> None:
    with under(NEW, session_keys=True):
        alice = make_user()
        private("a", user=alice).sync.add_items([said("1")])
        private("b", user=alice).sync.add_items([said("2")])
        private("c").sync.add_items([said("3")])
        AgentSession.objects.get(session_id="a").delete()
        left = SessionSecret.objects.values_list("session_id", flat=True)
        assert sorted(left) == ["b", "c"]
        alice.delete()
        assert [s.session_id for s in SessionSecret.objects.all()] == ["c"]


@pytest.mark.parametrize("delete", [False, True], ids=["clear", "delete"])
@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["", "own"])
def test_a_long_history_is_removed_in_small_steps(options: Any, delete: bool) -> None:
    """No lock is held for as long as its rows take, and its key goes at once."""
    with under(NEW, **options):
        private().sync.add_items([said(f"{n}") for n in range(11)])
        row = AgentSession.objects.get()
        assert remove(row, Removal(delete=delete, batch_size=4)) == 11
        assert unfinished_items() == SessionItem._base_manager.count() == 11
        assert not SessionSecret.objects.exists()
        assert private().sync.get_items() == []
        private().sync.add_items([said("new")])
        assert finish_removals(batch_size=4) == 11
        assert private().sync.get_items() == [said("new")]
        assert SessionItem._base_manager.count() == 1


def test_a_history_without_its_key_is_not_removed() -> None:
    with under(OLD):
        private().sync.add_items([said(f"{n}") for n in range(11)])
    with under(NEW):
        row = AgentSession.objects.get()
        with pytest.raises(UnknownEncryptionKey):
            remove(row, Removal(batch_size=4))
    with under(NEW, OLD):
        assert len(private().sync.get_items()) == 11


def test_a_refused_write_makes_no_key() -> None:
    with under(NEW, session_keys=True):
        private(user=make_user()).sync.add_items([said("hers")])
        with pytest.raises(SessionDoesNotExist):
            private().sync.add_items([said("mine now")])
        assert SessionSecret.objects.count() == 1


async def test_a_clear_beside_writers_leaves_nothing_that_no_key_opens() -> None:
    """A writer must not go on under the key that a clear has destroyed."""
    import asyncio

    with under(NEW, session_keys=True):
        session = private()

        async def write(name: str) -> None:
            for number in range(6):
                await private().add_items([said(f"{name}{number}")])

        async def clear() -> None:
            for _ in range(6):
                await private().clear()
                await asyncio.sleep(0)

        await asyncio.gather(write("a"), write("b"), clear())
        found = await session.get_items()
        assert len(found) == await SessionItem._base_manager.acount()


async def test_a_stolen_secret_can_not_be_put_in_from_an_item() -> None:
    with under(NEW, session_keys=True):
        await private().add_items([{"text": "A" * 44}])
        item = await SessionItem._base_manager.aget()
        await SessionSecret.objects.aupdate(wrapped=item.data)
        with pytest.raises(EncryptionError):
            await private().get_items()


# -- runs and pages --------------------------------------------------------------------


async def chatting(**options: Any) -> tuple[Any, str]:
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend="private")
    return user, row.session_id


@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
async def test_a_socket_runs_on_an_encrypted_session_and_shows_it(options: Any) -> None:
    refunded.clear()
    with under(NEW, **options):
        user, session_id = await chatting()
        model = ScriptedModel(
            [
                [function_call("refund", {"order": TREASURE}, call_id="c-1")],
                [assistant_message(f"{TREASURE} refunded")],
            ]
        )
        agent = Agent(name="a", model=model, tools=[refund])
        async with Socket(session_id, user, agent, backend="private") as tab:
            await tab.say("r-1", TREASURE)
            paused = (await tab.to_end())[-1]
            (asked,) = paused["outcome"]["interrupts"]
            # The paused run's state quotes the conversation.
            assert TREASURE not in await sync_to_async(stored)()
            run = await AgentRun.objects.aget(status="waiting")
            assert run.state.startswith('{"__enc__"')
            await tab.answer(
                "r-2",
                {
                    "interruptId": asked["id"],
                    "status": "resolved",
                    "payload": {"approved": True},
                },
            )
            assert text_of(await tab.to_end()) == f"{TREASURE} refunded"
        assert refunded == [TREASURE]
        async with Socket(session_id, user, agent, backend="private") as tab:
            await tab.sync()
            events = await tab.to_end()
        (shown,) = (e for e in events if e["type"] == "MESSAGES_SNAPSHOT")
        assert shown["messages"][0]["content"] == TREASURE
        assert TREASURE not in await sync_to_async(stored)()
        run = await AgentRun.objects.aget(run_id="r-2")
        assert run.status == "completed"
        assert run.last_position == 4
    with under(OLD, **options):
        socket = Socket(session_id, user, agent, backend="private")
        async with socket as tab:
            await tab.say("r-3", "Are you there?")
            assert (await tab.to_end())[-1]["code"] == "internal"
            await tab.sync()
            # Not an empty conversation.
            assert await tab.closed() == CLOSE_UNAVAILABLE


@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
def test_the_admin_shows_locks_without_the_key_and_texts_with_it(options: Any) -> None:
    with under(NEW, **options):
        private("chat").sync.add_items([said(TREASURE)])
        row = AgentSession.objects.get()
        client = staff("view", "read")
        assert TREASURE in page(client, url("change", row))
    with under(OLD, **options):
        html = page(client, url("change", row))
        assert TREASURE not in html
        assert json.loads(SessionItem._base_manager.get().data)["kid"] in html
        assert "Encrypted" in html
    assert TREASURE not in page(staff("view", name="other"), url("change", row))


def test_a_list_tells_that_titles_are_encrypted() -> None:
    client = staff("view", "read")
    with under(NEW):
        private("chat").sync.add_items([said(TREASURE)])
        get_session("plain").sync.add_items([{"role": "assistant", "content": "Hi"}])
        html = page(client, reverse(LIST))
    assert html.count("(encrypted)") == 1
    assert '<span class="as-quiet">(encrypted) chat</span>' in html
    assert '<span class="as-quiet">plain</span>' in html
    assert TREASURE not in html
    # An alias that is in the settings no more says nothing.
    with override_settings(AGENT_SESSIONS={"default": DATABASE}):
        assert "(encrypted)" not in page(client, reverse(LIST))


# -- compaction ------------------------------------------------------------------------


async def compacted(session: Any, store: Compactor) -> None:
    model = ScriptedModel([[assistant_message(TREASURE)], [assistant_message("two")]])
    agent = Agent(name="a", model=model)
    async with AsyncOpenAI(base_url=store.url, api_key="k") as client:
        wrapped = compacting(
            session, client, should_trigger_compaction=lambda context: True
        )
        assert isinstance(wrapped, OpenAIResponsesCompactionSession)
        await Runner.run(agent, TREASURE, session=wrapped)
    assert len(store.requests) == 1
    assert TREASURE in json.dumps(store.requests[0][1]["input"])
    assert await session.get_items() == [SUMMARY]


@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
async def test_compaction_writes_no_plain_text(
    compactor: Compactor, options: Any
) -> None:
    with under(NEW, **options):
        await compacted(private(), compactor)
        text = await sync_to_async(stored)()
        assert TREASURE not in text
        assert "cmp_1" not in text
        # In one step where the store has the hooks: the originals stay, sealed.
        assert await SessionItem._base_manager.acount() == (1 if options else 3)


async def test_compaction_around_a_session_object(compactor: Compactor) -> None:
    session = EncryptedSession(get_session("s"), NEW)
    await compacted(session, compactor)
    text = await sync_to_async(stored)()
    assert TREASURE not in text
    assert "cmp_1" not in text
    assert await SessionItem._base_manager.acount() == 3
    assert await session._atomic_replace_items([said("all")])
    assert await session.get_items() == [said("all")]
    await get_session("s").add_items([said("plain")])
    await session.add_items([said("after")])
    snapshot = await session._get_compaction_snapshot(5)
    # What doesn't open stays, and all before it.
    assert (snapshot.items, snapshot.complete) == ([said("after")], False)
    assert await snapshot.replace_suffix(0, [said("sum")])
    assert await session.get_items() == [said("all"), said("sum")]


# -- configuration ---------------------------------------------------------------------


def told(**options: Any) -> list[checks.CheckMessage]:
    with override_settings(
        AGENT_SESSIONS={
            "default": {"BACKEND": DATABASE},
            "private": {
                "BACKEND": ENCRYPTED,
                "OPTIONS": {"backend": "default", "keys": [NEW], **options},
            },
        }
    ):
        return [m for m in check_backends() if m.id not in {"agent_sessions.W001"}]


@one_database
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": []}, "There is none"),
        ({"keys": NEW}, "list"),
        ({"keys": None}, "list"),
        ({"keys": [NEW, ""]}, "Key 2: It is empty"),
        ({"keys": ["xyz12"]}, "too short"),
        ({"keys": [NEW[:-4] + "="]}, "cut or changed"),
        ({"keys": "no.such.provider"}, "can't import the provider"),
        (
            {"keys": "tests.backends.encrypted.test_encrypted.TREASURE"},
            "is no function",
        ),
        ({"lifetime": "long"}, "lifetime"),
        ({"lifetime": 600}, "lifetime"),
        ({"session_keys": "yes"}, "session_keys"),
        ({"clear_without_key": 1}, "clear_without_key"),
        ({"accept_sdk_envelopes": "yes"}, "accept_sdk_envelopes"),
        ({"name": ""}, "name"),
        ({"cache_bytes": -1}, "cache_bytes"),
    ],
    ids=[f"case_{number}" for number in range(15)],
)
def test_bad_options_are_an_error_that_quotes_no_key(options: Any, words: str) -> None:
    (error,) = told(**options)
    assert error.id == "agent_sessions.E019"
    assert words in error.msg
    assert error.hint
    assert NEW[:20] not in f"{error.msg} {error.hint}"
    assert "xyz12" not in error.msg


@one_database
@pytest.mark.parametrize("key", ["only for tests", "a password of some length"])
def test_weak_keys_are_warned_of(key: str, settings: Any) -> None:
    settings.SECRET_KEY = "a password of some length"
    if len(key) < 16:
        key = "django-insecure-0123456789"
    (warning,) = told(keys=[NEW, key])
    assert warning.id == "agent_sessions.W011"
    assert f"key 2 ({key_id(key)})" in warning.msg
    assert ("SECRET_KEY" in warning.msg) == (key == settings.SECRET_KEY)
    assert key not in f"{warning.msg} {warning.hint}"
    assert told() == []


@one_database
def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_sessions.encryption.keys.find_spec", lambda name: None)
    (error,) = told()
    assert error.id == "agent_sessions.E006"
    assert "django-agent-sessions[encrypt]" in error.msg


given: list[Any] = []
asked = 0


def provider() -> list[Any]:
    """A stand-in for a key management service, as a project would write it."""
    global asked
    asked += 1
    if given and isinstance(given[0], Exception):
        raise given[0]
    return given


@pytest.fixture
def service() -> Iterator[list[Any]]:
    global asked
    asked = 0
    given[:] = [OLD]
    with under(**{"keys": "tests.backends.encrypted.test_encrypted.provider"}):
        yield given


@one_database
async def test_keys_come_from_a_function(
    service: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_backends() == []
    assert asked == 0
    await private().add_items([said("one")])
    assert await private().get_items() == [said("one")]
    assert asked == 1
    with under(NEW, OLD):
        await private().add_items([said("two")])
    # Another process writes with a key that is new to us: it is asked for.
    await private().add_items([said("three")])
    service[:] = [NEW, OLD]
    with pytest.raises(UnknownEncryptionKey, match=key_id(NEW)):
        await private().get_items()
    monkeypatch.setattr("agent_sessions.backends.encrypted.keys._PATIENCE", 0.0)
    assert len(await private().get_items()) == 3
    found = await sessions["private"].apage(SessionKey("s"))
    assert None not in [s.item for s in found.items]


@one_database
@pytest.mark.parametrize(
    ("gives", "words"),
    [([RuntimeError(TREASURE)], "RuntimeError"), (["xyz12"], "too short")],
    ids=["fails", "short"],
)
async def test_a_provider_that_fails_is_told(
    service: list[Any], gives: list[Any], words: str
) -> None:
    service[:] = gives
    for call in (private().get_items, sync_to_async(private().sync.get_items)):
        with pytest.raises(EncryptionError, match=words) as caught:
            await call()
        assert TREASURE not in str(caught.value)


@one_database
def test_it_wraps_no_alias_that_is_not_there() -> None:
    (error,) = told(backend="nowhere")
    assert error.id == "agent_sessions.E013"
    with pytest.raises(InvalidBackend), under(NEW, backend="nowhere"):
        private().sync.get_items()


# -- copies ----------------------------------------------------------------------------


def test_a_copy_is_encrypted_anew_and_needs_the_key() -> None:
    with under(OLD):
        private("s", user=None).sync.add_items([said(TREASURE), said("more")])
    out = StringIO()
    ways = ("copy_agent_sessions", "--all", "--from=private", "--to=default")
    # Stored in clear only where that is asked for.
    with under(NEW, OLD), pytest.raises(CommandError, match="--in-clear"):
        call_command(*ways)
    with under(NEW), pytest.raises(CommandError, match="could not be copied"):
        call_command(*ways, "--in-clear", stderr=out)
    assert key_id(OLD) in out.getvalue()
    assert TREASURE not in stored()
    with under(NEW, OLD):
        call_command(*ways, "--in-clear")
        assert get_session("s").sync.get_items() == [said(TREASURE), said("more")]
    AgentSession.objects.filter(backend="private").delete()
    with under(NEW):
        call_command("copy_agent_sessions", "--all", "--from=default", "--to=private")
        assert private().sync.get_items() == [said(TREASURE), said("more")]


@one_database
def test_checks_and_the_command_load_neither_cryptography_nor_the_sdk() -> None:
    code = (
        "import sys, django; from django.conf import settings\n"
        f"settings.AGENT_SESSIONS = {SETTING!r}\n"
        "django.setup()\n"
        "from django.core.management import call_command\n"
        "import agent_sessions.management.commands.rotate_agent_session_keys\n"
        "call_command('check')\n"
        "print(sorted({'agents', 'cryptography', 'openai'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert KEY not in done.stdout + done.stderr


@one_database
async def test_a_subclass_may_read_in_its_own_way() -> None:
    with under(
        NEW, inner={"BACKEND": "tests.backends.encrypted.test_encrypted.ReadingBackend"}
    ):
        session = private()
        await session.add_items([said(TREASURE)])
        assert await session.get_items() == [said(TREASURE)]
        assert await sync_to_async(session.sync.get_items)() == [said(TREASURE)]
        inner: Any = innermost(sessions["private"])
        assert inner.has_read
        assert inner.has_awaited
