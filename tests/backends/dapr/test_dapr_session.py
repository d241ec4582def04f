"""The standalone class, histories of the SDK's class, options and a chat."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agents import Agent, Runner
from agents.extensions.memory.dapr_session import DaprSession as SDKDaprSession
from agents.memory import SessionABC
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from dapr.aio.clients import DaprClient as AsyncDaprClient
from dapr.clients import DaprClient
from django.db import connection
from django.test import override_settings

from agent_sessions import DaprSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.exceptions import (
    InvalidBackend,
    InvalidSessionId,
    LeaseLost,
    MissingExtra,
    StorageError,
)
from agent_sessions.models import AgentSession
from tests.servers.dapr import STORE, DaprSidecar
from tests.support.chat import Socket, create_conversation, make_user, text_of
from tests.support.dapr_stores import HEAD, KEY, head_of, make_backend, said, says

DOCS = (Path(__file__).parents[3] / "docs" / "dapr.md").read_text()

pytestmark = pytest.mark.one_database


@pytest.fixture
def backend(dapr_server: DaprSidecar) -> Iterator[DaprBackend]:
    found = make_backend()
    yield found
    found.close()


def texts(items: Any) -> list[str]:
    return [item["content"] for item in items]


# -- the standalone class ----------------------------------------------------------


async def test_a_session_needs_nothing_but_a_client(dapr_server: DaprSidecar) -> None:
    async with AsyncDaprClient(dapr_server.address) as client:
        session = DaprSession("s", STORE, client, session_settings={"limit": 2})
        assert isinstance(session, SessionABC)
        model = ScriptedModel([[assistant_message(f"answer {n}")] for n in range(2)])
        agent: Agent[Any] = Agent(name="speaker", model=model)
        for number in range(2):
            result = await Runner.run(agent, f"question {number}", session=session)
            assert result.final_output == f"answer {number}"
        assert len(await session.get_items(limit=9)) == 4
        assert len(await session.get_items()) == 2
        assert await DaprSession("other", STORE, client).get_items() == []
        # The client stays its owner's.
        assert (await client.get_state(STORE, HEAD)).data


def test_a_blocking_client_serves_all_loops_and_threads(
    dapr_server: DaprSidecar,
) -> None:
    with DaprClient(dapr_server.address) as client:
        session = DaprSession("s", STORE, client)
        session.sync.add_items(says("sync"))  # type: ignore[arg-type]
        asyncio.run(session.add_items(says("first loop")))  # type: ignore[arg-type]
        asyncio.run(session.add_items(says("second loop")))  # type: ignore[arg-type]
        found: Any = session.sync.get_items()
        assert texts(found) == ["sync", "first loop", "second loop"]
        assert client.get_state(STORE, HEAD).data


async def test_an_async_client_of_another_loop_is_named(
    dapr_server: DaprSidecar,
) -> None:
    async with AsyncDaprClient(dapr_server.address) as client:
        session = DaprSession("s", STORE, client)
        await session.add_items(says("a"))  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="another event loop"):
            await asyncio.to_thread(session.sync.get_items)


def test_an_id_that_cant_be_stored_is_refused() -> None:
    client: Any = SimpleNamespace(get_state=None)
    with pytest.raises(InvalidSessionId):
        DaprSession("", STORE, client)


async def test_a_session_of_ones_own_ttl(dapr_server: DaprSidecar) -> None:
    async with AsyncDaprClient(dapr_server.address) as client:
        session = DaprSession("s", STORE, client, ttl=60, consistency="eventual")
        await session.add_items(says("a"))  # type: ignore[arg-type]
        dapr_server.late = 61
        assert await session.get_items() == []


# -- histories of the SDK ----------------------------------------------------------


async def test_a_history_of_the_sdk_opens_as_it_is(dapr_server: DaprSidecar) -> None:
    async with AsyncDaprClient(dapr_server.address) as client:
        sdk = SDKDaprSession("s", state_store_name=STORE, dapr_client=client)
        await sdk.add_items(says(*range(30)))  # type: ignore[arg-type]
        before = dapr_server.records["s:messages"].data
        backend = make_backend()
        assert texts(await backend.alatest(KEY, None)) == [str(n) for n in range(30)]
        page = await backend.apage(KEY, limit=2)
        assert [row.position for row in page.items] == [29, 30]
        assert dapr_server.records["s:messages"].data == before
        assert await backend.apop(KEY) == says(29)[0]
        assert head_of(dapr_server).count == 29
        await backend.aappend(KEY, says("ours"))
        expected = [*(str(n) for n in range(29)), "ours"]
        assert texts(await backend.alatest(KEY, None)) == expected
        # The SDK's class refuses to write over what it doesn't know.
        with pytest.raises(ValueError, match="JSON list"):
            await sdk.add_items(says("theirs"))  # type: ignore[arg-type]
        assert await sdk.pop_item() is None
        assert await sdk.get_items() == []
        assert texts(await backend.alatest(KEY, None)) == expected
        await backend.aclear(KEY)
        assert list(dapr_server.records) == [HEAD]


def test_a_history_of_the_sdk_keeps_what_cant_be_read(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    texts = [json.dumps(item) for item in says("a", "b")]
    dapr_server.save(
        [
            Item(
                "s:messages",
                json.dumps([texts[0], "not json", 42, says("c")[0], texts[1]]),
            )
        ]
    )
    assert said(backend) == ["a", "c", "b"]
    backend.append(KEY, says("d"))
    rows = backend.page(KEY).items
    assert [row.raw for row in rows][:3] == [texts[0], "not json", "42"]
    assert said(backend) == ["a", "c", "b", "d"]


class Item:
    """A record as a request brings it."""

    class etag:
        value = ""

    class options:
        concurrency = 0

    def __init__(self, key: str, text: str) -> None:
        self.key = key
        self.value = text.encode()
        self.metadata: dict[str, str] = {}


# -- configuration -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store_name", ""),
        ("store_name", 5),
        ("consistency", "weak"),
        ("segment_size", 0),
        ("segment_size", "32"),
        ("ttl", 0),
        ("ttl", "soon"),
        ("ttl", True),
        ("timeout", 0),
        ("timeout", None),
        ("health_timeout", -1),
    ],
)
def test_an_option_that_is_not_valid_is_a_check_error(name: str, value: Any) -> None:
    with pytest.raises(InvalidBackend, match=name) as caught:
        make_backend(**{name: value})
    assert caught.value.id == "agent_sessions.E017"
    assert caught.value.hint


def test_the_options_are_those_of_the_docs() -> None:
    table = re.search(r"\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOCS)
    assert table
    rows = [line.split("|")[1:3] for line in table[1].splitlines()]
    # What the environment says comes first.
    told = {
        name.strip(" `"): default.split(", else ")[-1].strip(" `")
        for name, default in rows
    }
    options = {"store_name": "needed", **DaprBackend.option_defaults}
    assert told == {
        name: str(value).replace("strong", '"strong"')
        for name, value in options.items()
    }


def test_the_code_of_the_docs_runs(dapr_server: DaprSidecar) -> None:
    setting, standalone = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(setting, namespace)
    with override_settings(AGENT_SESSIONS=namespace["AGENT_SESSIONS"]):
        assert isinstance(sessions["default"], DaprBackend)
    with DaprClient(dapr_server.address) as client:
        namespace = {"client": client}
        exec(standalone, namespace)
        namespace["session"].sync.add_items(says("a"))
    assert dapr_server.records["user_123:messages"].expires


def test_options_that_are_valid() -> None:
    make_backend(ttl="30d", consistency="eventual", health_timeout=None, timeout=0.5)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dapr", None)
    with pytest.raises(MissingExtra, match=r"django-agent-sessions\[dapr\]"):
        make_backend()


def test_dapr_is_not_imported_before_it_is_used() -> None:
    code = (
        "import sys, django; django.setup()\n"
        "from agent_sessions.backends.dapr import DaprBackend\n"
        "DaprBackend('dapr', {'store_name': 'store'})\n"
        "heavy = {'dapr', 'grpc', 'aiohttp', 'agents'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -- a chat ------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
async def test_a_chat_over_a_websocket(dapr_server: DaprSidecar) -> None:
    """The consumer's runs, with their lease, write to the store and read from it."""
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
            "OPTIONS": {"store_name": STORE},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        user = await sync_to_async(make_user)()
        row = await sync_to_async(create_conversation)(user)
        agent: Agent[Any] = Agent(
            name="speaker",
            model=ScriptedModel(
                [[assistant_message("Hello.")], [assistant_message("Goodbye.")]]
            ),
        )
        async with Socket(row.session_id, user, agent) as tab:
            await tab.say("r1", "Hi")
            assert text_of(await tab.to_end()) == "Hello."
            await tab.say("r2", "Bye")
            assert text_of(await tab.to_end()) == "Goodbye."
        items: Any = await get_session(row.session_id, user=user).get_items()
        await row.arefresh_from_db()
    assert [item["role"] for item in items] == ["user", "assistant"] * 2
    assert (row.user_id, row.title) == (user.pk, "Hi")
    [head] = [key for key in dapr_server.records if key.endswith(":owned")]
    assert f":user:{user.pk}:" in head


@pytest.mark.django_db
def test_what_has_expired_is_not_counted(dapr_server: DaprSidecar) -> None:
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
            "OPTIONS": {"store_name": STORE, "ttl": 60},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s").sync
        session.add_items(says("a", "b"))  # type: ignore[arg-type]
        dapr_server.records.clear()
        session.add_items(says("c"))  # type: ignore[arg-type]
        assert AgentSession.objects.get(session_id="s").item_count == 1


@pytest.mark.django_db
def test_a_run_that_loses_its_lease_in_mid_write_is_refused(
    dapr_server: DaprSidecar,
) -> None:
    """Between the look at the row and the write, someone else takes the lease."""
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
            "OPTIONS": {"store_name": STORE},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s")
        session.sync.add_items(says("a"))  # type: ignore[arg-type]
        rows = AgentSession.objects.filter(session_id="s")
        fence = rows.get().fence
        backend = session.backend
        looked = type(backend.directory).assert_lease
        backend.append(session.key.fenced(fence), says("b"))

        def assert_lease(self: Any, key: SessionKey) -> None:
            rows.update(fence=fence + 1)
            looked(self, key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(backend.directory), "assert_lease", assert_lease)
            with pytest.raises(LeaseLost):
                backend.append(session.key.fenced(fence), says("c"))
        assert [item["content"] for item in backend.latest(KEY, None)] == ["a", "b"]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("write", ["append", "pop", "clear"])
@pytest.mark.django_db(transaction=True)
def test_no_write_lands_after_the_next_run_has_read(
    dapr_server: DaprSidecar, begun: bool, write: str
) -> None:
    """The old run has its lease looked at, the next one takes it and reads; only then
    the old one's write comes to the store."""
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
            "OPTIONS": {"store_name": STORE},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s")
        session.sync.add_items(says("a"))  # type: ignore[arg-type]
        rows = AgentSession.objects.filter(session_id="s")
        fence = rows.get().fence
        old, new = session.key.fenced(fence), session.key.fenced(fence + 1)
        if begun:
            assert session.backend.latest(old, None) == says("a")
        # Another process's.
        other = DaprBackend("default", {"store_name": STORE})
        found: list[Any] = []

        def interfere(name: str, keys: list[str], carried_out: bool) -> None:
            if name == "SaveState" and not found:
                found.append("asked")
                rows.update(fence=fence + 1)
                found.append(other.latest(new, None))
                connection.close()

        dapr_server.faults.interfere = interfere
        do: Any = {
            "append": lambda: session.backend.append(old, says("late")),
            "pop": lambda: session.backend.pop(old),
            "clear": lambda: session.backend.clear(old),
        }[write]
        with pytest.raises(LeaseLost):
            do()
        dapr_server.faults.interfere = None
        assert found[1] == says("a")
        assert other.latest(new, None) == says("a")
        other.append(new, says("b"))
        assert session.backend.latest(KEY, None) == says("a", "b")
        other.close()


@pytest.mark.django_db(transaction=True)
def test_a_lease_is_written_once_and_a_lower_one_after_a_backup_too(
    dapr_server: DaprSidecar,
) -> None:
    setting = {
        "default": {
            "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
            "OPTIONS": {"store_name": STORE},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        session = get_session("s")
        session.sync.add_items(says("a"))  # type: ignore[arg-type]
        rows = AgentSession.objects.filter(session_id="s")
        for fence in (9, 2):
            rows.update(fence=fence)
            run = session.key.fenced(fence)
            assert session.backend.latest(run, None)[0] == says("a")[0]
            assert head_of(dapr_server).fence == fence
            before = dapr_server.counts.requests["SaveState"]
            session.backend.latest(run, None)
            assert dapr_server.counts.requests["SaveState"] == before
            session.backend.append(run, says(fence))
        texts_now = [item["content"] for item in session.backend.latest(KEY, None)]
        assert texts_now == ["a", "9", "2"]


def test_a_client_of_a_loop_that_has_ended_is_named(dapr_server: DaprSidecar) -> None:
    """The session was made beside its client, and not used there."""

    async def make() -> DaprSession:
        return DaprSession("s", STORE, AsyncDaprClient(dapr_server.address))

    session = asyncio.run(make())
    with pytest.raises(StorageError, match="another event loop"):
        asyncio.run(session.get_items())
