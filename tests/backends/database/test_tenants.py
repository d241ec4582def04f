"""Two tenants at once see what is their own, whichever way a project keeps them apart."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.testing import ApplicationCommunicator
from cryptography.fernet import Fernet
from django.apps import apps
from django.contrib.auth import get_user_model
from django.core.handlers.asgi import ASGIHandler
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.test import Client, override_settings
from pytest_django import DjangoDbBlocker

from agent_sessions import get_session, sessions
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, KeyUse
from agent_sessions.runs.setup import create_conversation
from tests.backends.database import tenants
from tests.backends.database.tenants import TENANTS, by_path, tenant_of
from tests.settings import DATABASE_KIND
from tests.support.chat import Socket, text_of

# SQLite's tenants have databases of their own, which django_db would refuse.
pytestmark = (
    pytest.mark.one_database
    if DATABASE_KIND == "sqlite"
    else pytest.mark.django_db(transaction=True)
)
SESSIONS = AgentSession._meta.db_table
TABLES = [
    model._meta.db_table for model in apps.get_app_config("agent_sessions").get_models()
]
ENCRYPTED_BACKEND = "agent_sessions.backends.encrypted.EncryptedBackend"
HOOK = "tests.backends.database.tenants.prepare"


class Way(NamedTuple):
    """How tenants are kept apart, and which OPTIONS that needs."""

    setting: tenants.Setting
    options: dict[str, Any]
    routers: tuple[Any, ...] = ()
    encrypts: bool = False


SHARED, PREPARED = {"connections": "request"}, {"prepare_connection": HOOK}
WAYS = {
    "postgres": {
        "schemas-shared": Way(tenants.set_schema, SHARED),
        "schemas-prepared": Way(tenants.set_schema, PREPARED),
        "schemas-both": Way(tenants.set_schema, SHARED | PREPARED),
        "schemas-shared-encrypted": Way(tenants.set_schema, SHARED, encrypts=True),
        "schemas-prepared-encrypted": Way(tenants.set_schema, PREPARED, encrypts=True),
        "rows-shared": Way(tenants.set_row_security, SHARED),
        "rows-prepared": Way(tenants.set_row_security, PREPARED),
    },
    "sqlite": {
        "router-by-context": Way(tenants.set_nothing, {}, (tenants.ByContext(),)),
        "router-by-context-shared": Way(
            tenants.set_nothing, SHARED, (tenants.ByContext(),)
        ),
        "router-by-thread-shared": Way(
            tenants.set_nothing, SHARED, (tenants.ByThread(),)
        ),
        "router-by-thread-encrypted": Way(
            tenants.set_nothing, SHARED, (tenants.ByThread(),), encrypts=True
        ),
    },
}.get(DATABASE_KIND, {})


@pytest.fixture(params=WAYS)
def way(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    django_db_blocker: DjangoDbBlocker,
) -> Iterator[Way]:
    found = WAYS[request.param]
    backend = {"BACKEND": DATABASE_BACKEND, "OPTIONS": found.options}
    aliases = {"default": backend}
    if found.encrypts:
        options = {"backend": "plain", "keys": [Fernet.generate_key().decode()]}
        aliases = {
            "plain": backend,
            "default": {"BACKEND": ENCRYPTED_BACKEND, "OPTIONS": options},
        }
    if DATABASE_KIND == "sqlite":
        # A file, too: connections to a database in memory are always lent.
        name = str(tmp_path / "default")
        monkeypatch.setitem(connections.settings["default"], "NAME", name)
    with django_db_blocker.unblock():
        prepare_tenants(tmp_path)
        tenants.setting = found.setting
        with override_settings(
            AGENT_SESSIONS=aliases,
            DATABASE_ROUTERS=list(found.routers),
            MIDDLEWARE=["tests.backends.database.tenants.by_header"],
            ROOT_URLCONF="tests.backends.database.tenants",
        ):
            yield found
            sessions.reset()
        tenants.setting = tenants.set_nothing
        remove_tenants()


def prepare_tenants(directory: Path) -> None:
    """Make a schema and a row policy, or a database, for each tenant."""
    if DATABASE_KIND == "sqlite":
        for name in TENANTS:
            settings = connections.settings["default"] | {"NAME": str(directory / name)}
            connections.settings[name] = settings
            call_command("migrate", database=name, verbosity=0)
        return
    with connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"CREATE SCHEMA {name}")
            for table in TABLES:
                cursor.execute(
                    f"CREATE TABLE {name}.{table} (LIKE public.{table} INCLUDING ALL)"
                )
        cursor.execute(
            "CREATE ROLE tenant_role; "
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant_role; "
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO tenant_role; "
            f"ALTER TABLE public.{SESSIONS} ADD COLUMN tenant text "
            "DEFAULT current_setting('app.tenant', true), "
            "ENABLE ROW LEVEL SECURITY; "
            f"CREATE POLICY own ON public.{SESSIONS} "
            "USING (tenant = current_setting('app.tenant', true))"
        )


def remove_tenants() -> None:
    for name in TENANTS:
        if DATABASE_KIND == "sqlite":
            connections[name].close()
            del connections[name], connections.settings[name]
        else:
            with connection.cursor() as cursor:
                cursor.execute(f"DROP SCHEMA {name} CASCADE")
    if DATABASE_KIND == "postgres":
        with connection.cursor() as cursor:
            cursor.execute(
                f"DROP POLICY own ON {SESSIONS}; "
                f"ALTER TABLE {SESSIONS} DISABLE ROW LEVEL SECURITY, "
                "DROP COLUMN tenant; "
                "DROP OWNED BY tenant_role; DROP ROLE tenant_role"
            )


def name_of(way: Way, tenant: str) -> str:
    """Return a session's id: the same for both where their rows can't meet."""
    return f"chat-{tenant}" if way.setting is tenants.set_row_security else "chat"


@pytest.fixture
def _meeting() -> Iterator[None]:
    tenants.meeting = threading.Barrier(len(TENANTS))
    yield
    tenants.meeting = None


def get(view: str, way: Way, tenant: str) -> Any:
    """Ask a view in this thread, as a WSGI server does."""
    try:
        response = Client().get(
            f"/{view}/{name_of(way, tenant)}", headers={"X-Tenant": tenant}
        )
        assert response.status_code == 200, response.content
        return response.json()
    finally:
        connections.close_all()


@pytest.mark.usefixtures("_meeting")
@pytest.mark.parametrize("view", ["synchronous", "bridged", "running"])
def test_synchronous_views(way: Way, view: str) -> None:
    with ThreadPoolExecutor(len(TENANTS)) as pool:
        for turn in (1, 2):
            answers = [pool.submit(get, view, way, tenant) for tenant in TENANTS]
            for tenant, found in zip(TENANTS, answers, strict=True):
                shown = 1 if view == "running" else turn
                assert found.result() == [f"{tenant} says"] * shown
    assert_apart(way)


def serve(main: Any) -> Any:
    """Run a server's loop, in whose thread no session has been opened before."""
    return contextvars.Context().run(asyncio.run, main)


async def aget(view: str, way: Way, tenant: str) -> bytes:
    """Ask a view through ASGI."""
    communicator: Any = ApplicationCommunicator
    asked = communicator(
        ASGIHandler(),
        {
            "type": "http",
            "method": "GET",
            "path": f"/{view}/{name_of(way, tenant)}",
            "query_string": b"",
            "headers": [(b"x-tenant", tenant.encode()), (b"host", b"localhost")],
        },
    )
    await asked.send_input({"type": "http.request"})
    started = await asked.receive_output(30)
    body: bytes = (await asked.receive_output(30))["body"]
    await asked.wait()
    assert started["status"] == 200, body
    return body


@pytest.mark.usefixtures("_meeting")
@pytest.mark.parametrize("view", ["asynchronous", "synchronous", "running"])
def test_views_of_an_asynchronous_server(way: Way, view: str) -> None:
    async def main() -> list[bytes]:
        return await asyncio.gather(*(aget(view, way, tenant) for tenant in TENANTS))

    for tenant, body in zip(TENANTS, serve(main()), strict=True):
        assert body == f'["{tenant} says"]'.encode()
    assert_apart(way)


# Channels closes a socket's connection before each message, unless it is kept.
PREPARED_WAYS = [
    name
    for name, found in WAYS.items()
    if found.routers or "prepare_connection" in found.options
]


@pytest.mark.parametrize("way", PREPARED_WAYS, indirect=True)
def test_websockets(way: Way) -> None:
    rows = {}
    for tenant in TENANTS:
        if DATABASE_KIND == "sqlite":
            users = get_user_model()._default_manager.using(tenant)
        else:
            users = get_user_model()._default_manager.using("default")
        user = users.create(username=tenant)
        with tenant_of(tenant):
            rows[tenant] = user, create_conversation(user).session_id

    async def talk(tenant: str) -> str:
        user, session_id = rows[tenant]
        steps = [[assistant_message(f"To {tenant}.")] for _ in range(2)]
        agent = Agent(name="Clerk", model=ScriptedModel(steps))
        scope = {"tenant": tenant}
        async with Socket(session_id, user, agent, scope=scope, around=by_path) as tab:
            text = ""
            for number in (1, 2):
                await tab.say(f"{tenant}-{number}", f"{tenant} asks")
                text += text_of(await tab.to_end(within=30))
        return text

    async def main() -> list[str]:
        return await asyncio.gather(*map(talk, TENANTS))

    assert serve(main()) == [f"To {tenant}." * 2 for tenant in TENANTS]
    for tenant in TENANTS:
        user, session_id = rows[tenant]
        with tenant_of(tenant):
            items: Any = get_session(session_id, user=user).sync.get_items()
        assert [item["role"] for item in items] == ["user", "assistant"] * 2
        assert items[0]["content"] == f"{tenant} asks"


def assert_apart(way: Way) -> None:
    """See that each tenant has its own session, and nobody another's."""
    for tenant, other in (TENANTS, reversed(TENANTS)):
        with tenant_of(tenant):
            assert AgentSession.objects.count() == 1
            mine: Any = get_session(name_of(way, tenant)).sync.get_items()
            asked = {each["content"] for each in mine if each["role"] == "user"}
            assert asked == {f"{tenant} says"}
            if way.setting is tenants.set_row_security:
                assert get_session(name_of(way, str(other))).sync.get_items() == []
    if not way.routers and way.setting is tenants.set_schema:
        assert AgentSession.objects.count() == 0


@pytest.mark.skipif(DATABASE_KIND != "postgres", reason="Only PostgreSQL has schemas.")
@pytest.mark.parametrize(
    "way", ["schemas-shared-encrypted", "schemas-prepared-encrypted"], indirect=True
)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in_a_transaction"])
def test_each_tenant_counts_the_keys_that_it_writes_with(
    way: Way, within: bool
) -> None:
    for tenant in TENANTS:
        with tenant_of(tenant), transaction.atomic() if within else nullcontext():
            get_session("s").sync.add_items([{"role": "user", "content": tenant}])
    for tenant in TENANTS:
        with tenant_of(tenant):
            assert KeyUse.objects.get().takings == 1
            assert len(get_session("s").sync.get_items()) == 1
