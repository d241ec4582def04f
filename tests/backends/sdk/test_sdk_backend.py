"""SDKBackend beyond the contract suite: arguments, checks, owners, closing, runs."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Runner
from agents.extensions.memory import (
    AdvancedSQLiteSession,
    AsyncSQLiteSession,
    RedisSession,
    SQLAlchemySession,
)
from agents.memory import SQLiteSession
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from cryptography.fernet import Fernet
from django.contrib.auth import get_user_model
from django.core.checks import run_checks
from django.db import transaction
from django.test import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey, option_names
from agent_sessions.backends.sdk import SDKBackend
from agent_sessions.backends.sdk import backend as sdk_backend
from agent_sessions.backends.sdk.backend import inner_id
from agent_sessions.backends.sdk.opening import resolve
from agent_sessions.exceptions import (
    InvalidBackend,
    LeaseLost,
    StorageError,
    UnknownEncryptionKey,
)
from agent_sessions.models import AgentSession
from tests.servers import Server
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.documents import ROOT, blocks, column
from tests.support.sdk_sessions import ListSession

pytestmark = [pytest.mark.one_database]

LIST = "tests.support.sdk_sessions.ListSession"
SQLITE = "agents.memory.SQLiteSession"


def alias(**options: Any) -> dict[str, Any]:
    return {"default": {"BACKEND": SDKBackend, "OPTIONS": {**options}}}


@pytest.fixture
def lists() -> Iterator[type[ListSession]]:
    for kept in (ListSession.histories, ListSession.opened, ListSession.closed):
        kept.clear()
    setting = alias(session=LIST, arguments={"database": "d"}, keep=2)
    with override_settings(AGENT_SESSIONS=setting):
        yield ListSession


def said(*numbers: int) -> list[Any]:
    return [{"role": "user", "content": f"item {number}"} for number in numbers]


def texts(items: Any) -> list[str]:
    return [item["content"] for item in items]


# -- arguments -------------------------------------------------------------------------


def refused(**options: Any) -> InvalidBackend:
    with pytest.raises(InvalidBackend) as caught:
        SDKBackend("default", options).make_sessions()
    return caught.value


def test_misspelt_and_missing_arguments() -> None:
    error = refused(session=SQLITE, db_pat="x", keep=3)
    assert error.id == "agent_sessions.E008"
    assert "SQLiteSession doesn't take: db_pat" in str(error)
    assert "Did you mean 'db_path'?" in str(error)
    error = refused(session=SQLITE, kep=3)
    assert "Did you mean 'keep'?" in str(error)
    error = refused(session="agents.extensions.memory.SQLAlchemySession.from_url")
    assert error.id == "agent_sessions.E009"
    assert "SQLAlchemySession.from_url needs: url" in str(error)
    error = refused(session="agents.extensions.memory.EncryptedSession")
    assert error.id == "agent_sessions.E009"
    error = refused(session=LIST)
    assert "ListSession needs: database" in str(error)
    error = refused(db_path="x")
    assert error.id == "agent_sessions.E009"
    assert "['session']" in str(error)
    error = refused(session=lambda: None)
    assert error.id == "agent_sessions.E020"
    assert "can't be called with a session's id" in str(error)
    open_class = {"session": "tests.support.sdk_sessions.Open", "anything": 1}
    SDKBackend("default", open_class).make_sessions()


@pytest.mark.django_db
async def test_a_misspelt_argument_that_is_passed_on_is_named_at_the_first_use() -> (
    None
):
    setting = alias(session=f"{LIST}.named", lowd=True, arguments={"database": "d"})
    with (
        override_settings(AGENT_SESSIONS=setting),
        pytest.raises(InvalidBackend, match=r"ListSession\.named doesn't take: lowd"),
    ):
        await get_session("s").get_items()


def test_classes_that_are_none() -> None:
    assert refused(session=7).id == "agent_sessions.E020"
    error = refused(session="agents.memory.sqlite_session.SQLiteSesion")
    assert error.id == "agent_sessions.E020"
    assert "Did you mean 'agents.memory.SQLiteSession'?" in str(error)
    error = refused(session="agents.memory.OpenAIConversationsSession")
    assert "OpenAIConversationsBackend" in error.hint
    for path in (
        "tests.support.sdk_sessions.NUMBER",
        "tests.support.sdk_sessions.Missing",
        "x.Y",
        "not an identifier.X",
        "tests.support.sdk_sessions.ListSession.named.further",
    ):
        assert refused(session=path).id == "agent_sessions.E020"


@pytest.mark.django_db
@pytest.mark.one_database
def test_the_deployment_check_imports_the_classes() -> None:
    def found() -> list[str]:
        messages = run_checks(include_deployment_checks=True)
        return [m.msg for m in messages if "doesn't take" in m.msg]

    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, db_pat="x")):
        (message,) = found()
        assert "SQLiteSession doesn't take: db_pat" in message
    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, db_path="x")):
        assert found() == []


def warned(**options: Any) -> list[str]:
    return [str(message.id) for message in SDKBackend("default", options).check()]


def test_checks() -> None:
    memory = "agent_sessions.W012"
    from_url = "agents.extensions.memory.SQLAlchemySession.from_url"
    assert warned(session=SQLITE) == [memory]
    assert warned(session=SQLITE, db_path=":memory:") == [memory]
    assert warned(session=SQLITE, db_path="file.sqlite3") == []
    assert warned(session=from_url, url="sqlite+aiosqlite:///:memory:") == [memory]
    assert warned(session=from_url, url="sqlite+aiosqlite://") == [memory]
    assert warned(session=from_url, url="sqlite+aiosqlite:///file.db") == []
    assert warned(session=from_url, url="postgresql+asyncpg://h/d") == []
    for keep in (-1, 1.5, True, "9"):
        assert (
            refused(session=SQLITE, db_path="x", keep=keep).id == "agent_sessions.E020"
        )


def test_checking_imports_no_sdk() -> None:
    """Importing `agents` takes seconds."""
    source = """
        import sys
        import django
        from django.core.checks import run_checks
        from django.test import override_settings

        django.setup()
        setting = {"default": {
            "BACKEND": "agent_sessions.backends.sdk.SDKBackend",
            "OPTIONS": {"session": "agents.memory.SQLiteSession", "db_path": "x"},
        }, "openai": {
            "BACKEND": "agent_sessions.backends.openai.OpenAIConversationsBackend",
        }}
        with override_settings(AGENT_SESSIONS=setting):
            ids = [message.id for message in run_checks()]
        assert ids == ["agent_sessions.W010"], ids
        loaded = {"agents", "openai", "sqlalchemy"} & sys.modules.keys()
        assert not loaded, loaded
    """
    env = {name: v for name, v in os.environ.items() if name != "OPENAI_API_KEY"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=env | {"DJANGO_SETTINGS_MODULE": "tests.settings"},
        check=True,
    )


# -- owners ----------------------------------------------------------------------------


def test_no_two_keys_have_the_same_inner_id() -> None:
    ids = ["a", "user/1/a", "agent_sessions.user/1/a", "agent_sessions.nobody/a", "/a"]
    users = [None, 1, "1/a", "1", "nobody"]
    keys = [SessionKey(session_id, user) for session_id in ids for user in users]
    # The keys of 1 and "1" are those of one user.
    assert len({inner_id(key) for key in keys}) == len(ids) * (len(users) - 1)
    assert inner_id(SessionKey("a")) == "a"


@pytest.mark.django_db
def test_an_id_can_not_be_made_to_mean_someone_elses(
    lists: type[ListSession],
) -> None:
    user = get_user_model().objects.create_user("alice")
    owned = get_session("diary", user=user)
    owned.sync.add_items(said(1))
    (stored,) = lists.histories
    assert stored == f"agent_sessions.user/{user.pk}/diary"
    assert get_session(stored).sync.get_items() == []


@pytest.mark.django_db
async def test_a_history_of_the_class_itself_opens(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    old = await asyncio.to_thread(SQLiteSession, "old", path)
    await old.add_items(said(1, 2))
    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, db_path=str(path))):
        session = get_session("old")
        assert texts(await session.get_items()) == ["item 1", "item 2"]
        await session.add_items(said(3))
    assert texts(await old.get_items()) == ["item 1", "item 2", "item 3"]
    old.close()


# -- opening and closing ---------------------------------------------------------------


@pytest.mark.django_db
async def test_sessions_stay_open_for_a_while(lists: type[ListSession]) -> None:
    for number in range(4):
        await get_session(f"s{number}").add_items(said(number))
    assert lists.closed == ["s0", "s1"]
    await get_session("s3").get_items()
    assert lists.opened == ["s0", "s1", "s2", "s3"]
    await get_session("s0").get_items()
    assert lists.closed == ["s0", "s1", "s2"]
    await sync_to_async(sessions.reset)()
    assert sorted(lists.closed[3:]) == ["s0", "s3"]


@pytest.mark.django_db
async def test_what_lies_in_memory_is_not_closed() -> None:
    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, keep=0)):
        for number in range(3):
            await get_session(f"s{number}").add_items(said(number))
        for number in range(3):
            found = await get_session(f"s{number}").get_items()
            assert texts(found) == [f"item {number}"]


@pytest.mark.django_db
async def test_sessions_share_one_engine(tmp_path: Path) -> None:
    options = {
        "session": "agents.extensions.memory.SQLAlchemySession.from_url",
        "url": f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite3'}",
        "engine_kwargs": {"pool_size": 2},
        "create_tables": True,
    }
    with override_settings(AGENT_SESSIONS=alias(**options)):
        await asyncio.gather(
            *(get_session(f"s{n}").add_items(said(n)) for n in range(8))
        )
        backend: Any = sessions["default"]
        opened = await backend._background.arun(backend._sessions.get())
        inner = [each.session for each in opened._opened.values()]
        assert [type(session) for session in inner] == [SQLAlchemySession] * 8
        (engine,) = {session.engine for session in inner}
        assert engine.pool.size() == 2
        assert engine.pool.checkedin() > 0
        await sync_to_async(sessions.reset)()
        assert engine.pool.checkedin() == 0


@pytest.mark.django_db
async def test_one_object_of_the_class_serves_all_loops(tmp_path: Path) -> None:
    path = "agents.extensions.memory.AsyncSQLiteSession"
    with override_settings(
        AGENT_SESSIONS=alias(session=path, db_path=str(tmp_path / "x.sqlite3"))
    ):
        session = get_session("s")
        await session.add_items(said(1))
        await sync_to_async(session.sync.add_items)(said(2))
        assert texts(await session.get_items()) == ["item 1", "item 2"]
        backend: Any = sessions["default"]
        opened = await backend._background.arun(backend._sessions.get())
        (inner,) = opened._opened.values()
        assert type(inner.session) is AsyncSQLiteSession


@pytest.mark.django_db
async def test_redis(valkey_server: Server) -> None:
    options = {
        "session": "agents.extensions.memory.RedisSession.from_url",
        "url": f"redis://{valkey_server.host}:{valkey_server.port}/0",
        "key_prefix": "tests-of-sdk",
    }
    with override_settings(AGENT_SESSIONS=alias(**options)):
        session = get_session("s-redis")
        await session.add_items(said(1, 2, 3))
        assert texts(await session.get_items(limit=2)) == ["item 2", "item 3"]
        assert await session.pop_item() == said(3)[0]
        inner = RedisSession.from_url(
            "s-redis", url=options["url"], key_prefix="tests-of-sdk"
        )
        assert texts(await inner.get_items()) == ["item 1", "item 2"]
        await inner.close()
        await session.clear_session()
        assert await session.get_items() == []
        await sync_to_async(sessions.reset)()


@pytest.mark.django_db
async def test_a_class_of_the_sdk_keeps_its_own_features(tmp_path: Path) -> None:
    """AdvancedSQLiteSession files what the alias writes by turn."""
    path = str(tmp_path / "advanced.sqlite3")
    options = {
        "session": "agents.extensions.memory.AdvancedSQLiteSession",
        "db_path": path,
        "create_tables": True,
    }
    with override_settings(AGENT_SESSIONS=alias(**options)):
        await get_session("s").add_items(said(1, 2))
        inner = AdvancedSQLiteSession(session_id="s", **options_of(options))
        turns = await inner.get_conversation_turns()
        assert [turn["turn"] for turn in turns] == [1, 2]
        inner.close()


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "session"}


@pytest.mark.django_db
@pytest.mark.parametrize(
    "options",
    [
        {"session": ListSession, "arguments": {"database": "d"}},
        {"session": f"{LIST}.named", "arguments": {"database": "d"}},
        {"session": "tests.support.sdk_sessions.make_list"},
        {"session": "tests.support.sdk_sessions.Alias", "arguments": {"database": "d"}},
    ],
)
async def test_classes_methods_and_functions(
    lists: type[ListSession], options: dict[str, Any]
) -> None:
    with override_settings(AGENT_SESSIONS=alias(**options)):
        await get_session("s").add_items(said(1))
    assert texts(lists.histories["s"]) == ["item 1"]


# -- errors ----------------------------------------------------------------------------


@pytest.mark.django_db
async def test_errors_name_the_class_and_quote_nothing(
    lists: type[ListSession], tmp_path: Path
) -> None:
    loud = alias(session=LIST, loud=True, arguments={"database": "d"})
    with (
        override_settings(AGENT_SESSIONS=loud),
        pytest.raises(StorageError, match=r"ListSession of 'default'.*Runtime") as e,
    ):
        await get_session("s").add_items([{"role": "user", "content": "secret"}])
    assert "secret" not in str(e.value)
    assert e.value.__cause__ is None
    nowhere = alias(session=SQLITE, db_path=str(tmp_path / "no" / "x.sqlite3"))
    with (
        override_settings(AGENT_SESSIONS=nowhere),
        pytest.raises(StorageError, match="OperationalError"),
    ):
        await get_session("s").get_items()


@pytest.mark.django_db
async def test_what_the_runner_must_see_itself() -> None:
    hidden = alias(session="tests.support.sdk_sessions.Conversations")
    with (
        override_settings(AGENT_SESSIONS=hidden),
        pytest.raises(InvalidBackend, match="OpenAIConversationsBackend"),
    ):
        await get_session("s").get_items()


@pytest.mark.django_db
async def test_what_is_no_item_is_passed_over(lists: type[ListSession]) -> None:
    """Some classes give any JSON; a limit counts items, and pop takes the rest away."""
    session = get_session("s")
    lists.histories["s"] = [*said(1, 2), 7, None, "x", *said(3), []]
    assert texts(await session.get_items()) == ["item 1", "item 2", "item 3"]
    assert texts(await session.get_items(limit=2)) == ["item 2", "item 3"]
    assert await session.pop_item() == said(3)[0]
    found: list[Any] = await session.get_items()
    found[0]["content"] = "changed"
    assert texts(await session.get_items()) == ["item 1", "item 2"]


# -- the directory ---------------------------------------------------------------------


@pytest.mark.django_db
async def test_the_row_counts(lists: type[ListSession]) -> None:
    session = get_session("s")
    await session.get_items()
    await session.add_items(said(1, 2, 3))
    row = await AgentSession.objects.aget(session_id="s")
    assert (row.item_count, row.title) == (3, "item 1")
    await session.pop_item()
    await row.arefresh_from_db()
    assert row.item_count == 2
    assert await sessions["default"].aclear(session.key) == 2
    await row.arefresh_from_db()
    assert row.item_count == 0


@pytest.mark.django_db
async def test_page_for_the_admin(
    lists: type[ListSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = get_session("s")
    await session.add_items(said(*range(30)))
    backend = sessions["default"]
    newest = await backend.apage(session.key, limit=10)
    assert [item.position for item in newest.items] == list(range(21, 31))
    assert (newest.has_earlier, newest.has_later) == (True, False)
    earlier = await backend.apage(session.key, before=21, limit=30)
    assert [item.turn for item in earlier.items] == list(range(1, 21))
    monkeypatch.setattr(sdk_backend, "WINDOW", 5)
    page = await backend.apage(session.key, limit=10)
    assert [item.item for item in page.items] == said(*range(25, 30))


@pytest.mark.django_db
async def test_a_fenced_run_that_lost_its_lease_writes_nothing(
    lists: type[ListSession],
) -> None:
    session = get_session("s")
    await session.add_items(said(1))
    await AgentSession.objects.filter(session_id="s").aupdate(fence=7)
    await session.fenced(7).add_items(said(2))
    with pytest.raises(LeaseLost):
        await session.fenced(6).add_items(said(3))
    assert texts(await session.get_items()) == ["item 1", "item 2"]


class SlowReader(ListSession):
    """A session whose readers wait until they are let go."""

    waiting = threading.Event()
    go_on = threading.Event()

    async def get_items(self, limit: int | None = None) -> list[Any]:
        self.waiting.set()
        await asyncio.to_thread(self.go_on.wait, 10)
        return await super().get_items(limit)


@pytest.mark.parametrize("write", ["append", "pop", "clear"])
@pytest.mark.django_db(transaction=True)
async def test_a_write_that_waited_while_its_lease_was_lost_is_refused(
    write: str,
) -> None:
    """The lease is looked at right before the write, not before the wait for it."""
    ListSession.histories.clear()
    SlowReader.go_on.set()
    with override_settings(
        AGENT_SESSIONS=alias(session=SlowReader, arguments={"database": "d"})
    ):
        session = get_session("s")
        await session.add_items(said(1))
        rows = AgentSession.objects.filter(session_id="s")
        await rows.aupdate(fence=1)
        SlowReader.waiting.clear()
        SlowReader.go_on.clear()
        reading = asyncio.ensure_future(session.get_items())
        await asyncio.to_thread(SlowReader.waiting.wait, 10)
        old = session.fenced(1)
        writes: dict[str, Any] = {
            "append": lambda: old.add_items(said(2)),
            "pop": old.pop_item,
            "clear": old.clear_session,
        }
        writing = asyncio.ensure_future(writes[write]())
        # Admitted by now: it waits for the reader.
        await asyncio.sleep(0.3)
        await rows.aupdate(fence=2)
        first = asyncio.ensure_future(session.fenced(2).get_items())
        SlowReader.go_on.set()
        with pytest.raises(LeaseLost):
            await writing
        assert texts(await first) == ["item 1"]
        assert texts(await reading) == ["item 1"]
        assert texts(await session.get_items()) == ["item 1"]


@pytest.mark.django_db(transaction=True)
def test_deleting_a_user_deletes_the_histories(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite3"
    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, db_path=str(path))):
        user = get_user_model().objects.create_user("leaver")
        get_session("s", user=user).sync.add_items(said(1, 2))
        get_session("other").sync.add_items(said(3))
        user.delete()
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT session_id FROM agent_messages").fetchall()
    assert found == [("other",)]


@pytest.mark.django_db
def test_the_sync_face_in_a_transaction(lists: type[ListSession]) -> None:
    with transaction.atomic():
        get_session("s").sync.add_items(said(1))
        assert texts(get_session("s").sync.get_items()) == ["item 1"]
    assert AgentSession.objects.get(session_id="s").item_count <= 1


@pytest.mark.django_db
async def test_a_run_remembers(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sqlite3")
    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, db_path=path)):
        model = ScriptedModel([[assistant_message("hi")], [assistant_message("ho")]])
        agent = Agent(name="a", model=model)
        for question in ("I am Alice", "Who am I?"):
            await Runner.run(agent, question, session=get_session("s"))
        assert len(model.calls[1].input) == 3
        assert len(await get_session("s").get_items()) == 4


@pytest.mark.django_db(transaction=True)
async def test_a_run_through_the_websocket(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sqlite3")
    with override_settings(AGENT_SESSIONS=alias(session=SQLITE, db_path=path)):
        user = await sync_to_async(make_user)()
        row = await sync_to_async(create_conversation)(user)
        agent = Agent(name="a", model=ScriptedModel([[assistant_message("Hello")]]))
        async with Socket(row.session_id, user, agent) as socket:
            await socket.say("r1", "Hi")
            events = await socket.to_end(within=20)
        assert text_of(events) == "Hello"
        found = await get_session(row.session_id, user=user).get_items()
        assert [item.get("role") for item in found] == ["user", "assistant"]
        await sync_to_async(sessions.reset)()


@pytest.mark.django_db
async def test_encrypted_over_it(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite3"
    keys = [Fernet.generate_key().decode(), Fernet.generate_key().decode()]
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
            "OPTIONS": {"backend": "sdk", "keys": keys[:1]},
        },
        "sdk": alias(session=SQLITE, db_path=str(path))["default"],
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s")
        await session.add_items(said(1, 2, 3))
        assert texts(await session.get_items(limit=2)) == ["item 2", "item 3"]
        assert await session.pop_item() == said(3)[0]
        page = await sessions["default"].apage(session.key)
        assert [item.position for item in page.items] == [1, 2]
        assert b"item 1" not in path.read_bytes()
    setting["default"]["OPTIONS"]["keys"] = keys[1:]
    with (
        override_settings(AGENT_SESSIONS=setting),
        pytest.raises(UnknownEncryptionKey),
    ):
        await get_session("s").pop_item()
    setting["default"]["OPTIONS"]["keys"] = keys[::-1]
    with override_settings(AGENT_SESSIONS=setting):
        assert await get_session("s").pop_item() == said(2)[0]


def test_the_docs_name_the_options_and_the_classes() -> None:
    text = (ROOT / "docs" / "sdk-sessions.md").read_text(encoding="utf-8")
    own = option_names(SDKBackend)

    assert column(text, "option") - {"all", "others"} == own
    for path in column(text, "`session`") - {"a", "class", "of", "yours"}:
        if "MongoDB" not in path:  # its driver is not installed
            assert callable(resolve(path)), path
    settings = blocks(text, "python")[0]
    namespace: dict[str, Any] = {}
    exec(settings, namespace)
    with override_settings(AGENT_SESSIONS=namespace["AGENT_SESSIONS"]):
        backend = sessions["sdk"]
        assert isinstance(backend, SDKBackend)
        assert backend.check() == []
        assert "password" not in repr(backend)
