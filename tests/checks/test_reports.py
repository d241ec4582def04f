"""Error reports show no contents, keys or passwords, whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import StringIO
from typing import Any

import pytest
import redis
from agents import Agent, Runner
from agents.memory import SessionSettings
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import async_to_sync, sync_to_async
from django.core.management import call_command
from django.core.signals import got_request_exception
from django.db import DatabaseError, connection
from django.test import AsyncClient, Client, override_settings
from django.urls import reverse
from django.views.debug import ExceptionReporter

from agent_sessions import DjangoSession, EncryptedSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.encrypted.keys import KeySource
from agent_sessions.backends.wrapping import innermost
from agent_sessions.checks import check_backends
from agent_sessions.concurrency.batching import Gathering
from agent_sessions.encryption import KeyRing, MasterKey
from agent_sessions.exceptions import (
    AgentSessionError,
    EncryptionError,
    InvalidBackend,
    StorageError,
)
from agent_sessions.models import AgentSession, SessionItem
from tests.servers.conversations import KEY, conversations_server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.redis import kill, url
from tests.servers.redis import redis as run_redis
from tests.support.admin_pages import make, staff
from tests.support.admin_pages import url as admin_url
from tests.support.chat import Socket, make_user, refusal_of
from tests.support.reported import (
    CONTENT,
    ITEMS,
    SECRET,
    aerror_of,
    assert_discreet,
    error_of,
    shown_of,
)

DATABASE = "agent_sessions.backends.database.DatabaseBackend"
ENCRYPTED = "agent_sessions.backends.encrypted.EncryptedBackend"
# Base64, but not of 32 bytes. Fixed: it is told by how mixed its letters are.
ALMOST_KEY = "q7XbT9fLz2WcR4mKd8VnY1sHj6PgAe3uQo5ItBxZ0="
MASTER_KEY = f"{SECRET}{SECRET}"
TABLE = SessionItem._meta.db_table
NAME = "reports"

committed = pytest.mark.django_db(transaction=True)

TRIGGERS = {
    "sqlite": (
        "CREATE TRIGGER {name}_{event} BEFORE {event} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'refused'); END",
        "DROP TRIGGER {name}_{event}",
    ),
    "postgresql": (
        "CREATE FUNCTION {name}_{event}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'refused: %', coalesce(NEW.data, OLD.data) "
        "USING ERRCODE = '23514'; END $$; "
        "CREATE TRIGGER {name}_{event} BEFORE {event} ON {table} FOR EACH ROW "
        "EXECUTE FUNCTION {name}_{event}()",
        "DROP FUNCTION {name}_{event} CASCADE",
    ),
    "mysql": (
        "CREATE TRIGGER {name}_{event} BEFORE {event} ON {table} FOR EACH ROW "
        "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'",
        "DROP TRIGGER {name}_{event}",
    ),
}
# What still tells why.
REFUSED = {
    "sqlite": "(IntegrityError: SQLITE_CONSTRAINT_TRIGGER)",
    "postgresql": "(IntegrityError: 23514)",
    "mysql": "(OperationalError: 1644)",
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


@contextmanager
def refusing(event: str) -> Iterator[None]:
    """Make the database refuse to insert or delete items; its error quotes them."""
    names = {"name": NAME, "event": event, "table": TABLE}
    make_trigger, drop = TRIGGERS[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(make_trigger.format(**names))
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(drop.format(**names))


@contextmanager
def without_items() -> Iterator[None]:
    """Make each statement fail that needs the table of items."""
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {TABLE} RENAME TO {TABLE}_gone")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {TABLE}_gone RENAME TO {TABLE}")


def aliases(inner: dict[str, Any], keys: Any = None) -> dict[str, Any]:
    return {
        "default": inner,
        "private": {
            "BACKEND": ENCRYPTED,
            "OPTIONS": {"backend": "default", "keys": keys or [MASTER_KEY]},
        },
        "own": {
            "BACKEND": ENCRYPTED,
            "OPTIONS": {
                "backend": "default",
                "keys": keys or [MASTER_KEY],
                "session_keys": True,
            },
        },
    }


def every_error(alias: str, *names: str) -> list[BaseException]:
    """Call the doors of an alias, of these names; give the error of each."""
    session, key = get_session("s", backend=alias), SessionKey("s")
    backend = session.backend
    calls: dict[str, Callable[[], object]] = {
        "append": lambda: backend.append(key, ITEMS),
        "sync_add": lambda: session.sync.add_items(ITEMS),
        "pop": lambda: backend.pop(key),
        "latest": lambda: backend.latest(key, None),
        "page": lambda: backend.page(key),
        "clear": lambda: backend.clear(key),
    }
    coroutines: dict[str, Callable[[], Awaitable[object]]] = {
        "aappend": lambda: backend.aappend(key, ITEMS),
        "add_items": lambda: session.add_items(ITEMS),
        "apop": lambda: backend.apop(key),
        "pop_item": lambda: session.pop_item(),
        "alatest": lambda: backend.alatest(key, 3),
        "get_items": lambda: session.get_items(),
        "apage": lambda: backend.apage(key),
        "clear_session": lambda: session.clear_session(),
    }
    errors = [error_of(calls[name]) for name in names or calls if name in calls]
    for name in names or coroutines:
        if call := coroutines.get(name):
            # For a synchronous caller, and in a loop that serves others too.
            errors.append(async_to_sync(aerror_of)(call))
            errors.append(asyncio.run(aerror_of(call)))
    return errors


APPENDS = ("append", "sync_add", "aappend", "add_items")
POPS = ("pop", "apop", "pop_item")


# -- a Django database ---------------------------------------------------------------


@committed
@pytest.mark.parametrize("alias", ["default", "private", "own"])
def test_a_refused_append_shows_nothing_of_it(
    alias: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE})):
        get_session("s", backend=alias).sync.add_items(ITEMS)
        caplog.clear()
        with refusing("INSERT"):
            errors = every_error(alias, *APPENDS)
    for error in errors:
        assert isinstance(error, StorageError)
        assert_discreet(error, MASTER_KEY)
        assert REFUSED[connection.vendor] in str(error)
    assert CONTENT not in caplog.text
    assert SECRET not in caplog.text


@committed
@pytest.mark.parametrize("alias", ["default", "private", "own"])
def test_a_refused_pop_shows_nothing_of_the_item(alias: str) -> None:
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE})):
        get_session("s", backend=alias).sync.add_items(ITEMS)
        with refusing("DELETE"):
            errors = every_error(alias, *POPS)
        for error in errors:
            assert isinstance(error, StorageError)
            assert_discreet(error, MASTER_KEY)


@committed
@pytest.mark.parametrize("alias", ["default", "private", "own"])
def test_a_lost_table_shows_nothing_at_any_door(alias: str) -> None:
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE})):
        get_session("s", backend=alias).sync.add_items(ITEMS)
        with without_items():
            errors = every_error(alias)
        for error in errors:
            assert isinstance(error, StorageError)
            assert_discreet(error, MASTER_KEY)


@pytest.mark.one_database
@pytest.mark.parametrize("asking", ["get", "young", "fetch", "renew"])
def test_a_provider_that_fails_shows_no_keys_whoever_asks(asking: str) -> None:
    def provide() -> list[str]:
        keys = [MASTER_KEY]
        raise LookupError(keys)

    source = KeySource("private", provide, 20)
    error = error_of(getattr(source, asking))
    assert isinstance(error, EncryptionError)
    assert_discreet(error, MASTER_KEY)


@committed
@pytest.mark.parametrize("alias", ["default", "private"])
@pytest.mark.parametrize("form", ["json", "markdown"])
def test_an_export_that_breaks_off_shows_nothing(alias: str, form: str) -> None:
    """The server reports it: the view has returned."""
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE})):
        stream = iter(export_of_many(alias, form, Client))
        next(stream)
        with without_items():
            error = error_of(lambda: list(stream))
        assert_discreet(error, MASTER_KEY)


@committed
async def test_an_async_export_that_breaks_off_shows_nothing() -> None:
    make_export = sync_to_async(export_of_many)
    stream = (await make_export("default", "json", AsyncClient)).__aiter__()
    await anext(stream)
    gone = without_items()
    await sync_to_async(gone.__enter__)()
    try:
        error = await aerror_of(lambda: anext_to_end(stream))
    finally:
        await sync_to_async(gone.__exit__)(None, None, None)
    assert isinstance(error, DatabaseError)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # Django's own hold what was sent last.
    own = [each for each in frames if "agent_sessions" in each.f_code.co_filename]
    assert CONTENT not in repr([each.f_locals for each in own])


async def anext_to_end(stream: Any) -> None:
    async for _ in stream:
        pass


def export_of_many(alias: str, form: str, kind: type[Any]) -> Any:
    """Begin to export a session of many long items; give what is sent."""
    content = f"{CONTENT} {'x' * 400}"
    items: Any = [{"role": "user", "content": content}] * 900
    get_session("s", backend=alias).sync.add_items(items)
    client = kind()
    client.cookies = staff("view", "read").cookies
    place = admin_url("export", AgentSession.objects.get(), form)
    if kind is Client:
        return client.get(place).streaming_content
    return async_to_sync(client.get)(place).streaming_content


@committed
def test_a_broken_constraint_is_named_without_the_row() -> None:
    column, named = {
        "sqlite": ("text", f"SQLITE_CONSTRAINT_UNIQUE, .*{TABLE}.text"),
        "postgresql": ("text", f"23505, constraint {NAME} of table {TABLE}"),
        "mysql": ("text(100)", "1062"),
    }[connection.vendor]
    session = DjangoSession("s").sync
    session.add_items(ITEMS)
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE UNIQUE INDEX {NAME} ON {TABLE} ({column})")
    try:
        error = error_of(lambda: session.add_items(ITEMS))
    finally:
        on = f" ON {TABLE}" if connection.vendor == "mysql" else ""
        with connection.cursor() as cursor:
            cursor.execute(f"DROP INDEX {NAME}{on}")
    assert isinstance(error, StorageError)
    assert re.search(rf"\(IntegrityError: {named}\)", str(error))
    assert_discreet(error)


@committed
def test_nobody_is_shown_what_others_gave_to_the_same_batch() -> None:
    """Appends that wait for one thread fail together, and are told apart."""
    backend = sessions["default"]
    assert isinstance(backend, DatabaseBackend)
    sessions_ids = [f"s{number}" for number in range(4)]
    for session_id in sessions_ids:
        DjangoSession(session_id).sync.add_items(ITEMS)

    async def add_all() -> list[BaseException | None]:
        adding = [DjangoSession(each).add_items(ITEMS) for each in sessions_ids]
        outcomes = await asyncio.gather(*adding, return_exceptions=True)
        return [each for each in outcomes if isinstance(each, BaseException)]

    with refusing("INSERT"):
        errors = asyncio.run(add_all())
    assert len(errors) == len({id(error) for error in errors}) == 4
    for error in errors:
        assert error is not None
        assert_discreet(error)


@pytest.mark.one_database
def test_an_error_of_a_whole_batch_is_each_callers_own() -> None:
    failure = StorageError("no")

    def work(arguments: Sequence[str]) -> list[BaseException | None]:
        raise failure

    async def join_all() -> list[Any]:
        pool = ThreadPoolExecutor(1)
        free = threading.Event()
        gathering = Gathering(work)
        pool.submit(free.wait)
        joined = [
            gathering.join(
                f"{CONTENT}{n}",
                lambda call: pool.submit(lambda: call()()),
                lambda call: call(),
            )
            for n in range(3)
        ]
        free.set()
        outcomes = await asyncio.gather(*joined, return_exceptions=True)
        pool.shutdown()
        return outcomes

    errors = asyncio.run(join_all())
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert str(error) == "no"
        assert_discreet(error)


# -- other stores ----------------------------------------------------------------------


class Quoting:
    """A session class of a project, whose errors quote what it is given."""

    session_settings: SessionSettings | None = None

    def __init__(self, session_id: str, url: str = "") -> None:
        self.session_id = session_id
        self.url = url

    async def get_items(self, limit: int | None = None) -> list[Any]:
        raise ValueError(f"{self.url}: {ITEMS}")

    async def add_items(self, items: list[Any]) -> None:
        try:
            raise KeyError(str(items))
        except KeyError as exc:
            exc.add_note(str(items))
            raise UnicodeEncodeError("ascii", str(items), 0, 9, self.url) from exc

    async def pop_item(self) -> Any:
        raise RuntimeError(ITEMS)

    async def clear_session(self) -> None:
        raise OSError(str(ITEMS))


@pytest.mark.one_database
@committed
@pytest.mark.parametrize("alias", ["default", "private", "own"])
def test_a_projects_own_class_is_quoted_nowhere(
    alias: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    inner = {
        "BACKEND": "agent_sessions.backends.sdk.SDKBackend",
        "OPTIONS": {"session": Quoting, "arguments": {"url": SECRET}},
    }
    with override_settings(AGENT_SESSIONS=aliases(inner)):
        errors = every_error(alias)
    for error in errors:
        assert isinstance(error, AgentSessionError)
        # The list of settings shows what stands in them.
        assert_discreet_but_settings(error)
    assert CONTENT not in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.one_database
@committed
@pytest.mark.parametrize("alias", ["default", "private", "own"])
def test_a_failing_redis_shows_nothing_at_any_door(
    alias: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with run_redis() as server:
        inner = {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            "OPTIONS": {
                "url": url(server),
                "client_options": {"password": SECRET},
            },
        }
        with redis.Redis(port=server.port) as link:
            link.config_set("requirepass", SECRET)
        with override_settings(AGENT_SESSIONS=aliases(inner)):
            get_session("s", backend=alias).sync.add_items(ITEMS)
            key = _redis_key(get_session("s", backend=alias))
            with redis.Redis(port=server.port, password=SECRET) as link:
                link.delete(key)
                link.set(key, CONTENT)
            errors = every_error(alias, *APPENDS, *POPS, "latest", "get_items")
            with redis.Redis(port=server.port, password=SECRET) as link:
                link.config_set("requirepass", "")
            kill(server)
            errors += every_error(alias, "append", "add_items")
    for error in errors:
        assert isinstance(error, StorageError)
        assert_discreet(error, MASTER_KEY)
    assert CONTENT not in caplog.text
    assert SECRET not in caplog.text


def _redis_key(session: Any) -> Any:
    backend: Any = innermost(session.backend)
    return backend.names(session.key).items


@pytest.mark.one_database
@committed
@pytest.mark.parametrize("alias", ["default", "private", "own"])
def test_a_failing_sidecar_shows_nothing_at_any_door(
    alias: str, dapr_server: DaprSidecar
) -> None:
    inner = {
        "BACKEND": "agent_sessions.backends.dapr.DaprBackend",
        "OPTIONS": {"store_name": STORE},
    }
    with override_settings(AGENT_SESSIONS=aliases(inner)):
        get_session("s", backend=alias).sync.add_items(ITEMS)
        dapr_server.faults.interfere = lambda name, keys, done: "INTERNAL"
        errors = every_error(alias, "append", "add_items", "pop", "get_items")
    for error in errors:
        assert isinstance(error, StorageError)
        assert_discreet(error, MASTER_KEY)


@pytest.mark.one_database
@committed
def test_a_failing_service_shows_nothing_at_any_door() -> None:
    with conversations_server() as server:
        inner = {
            "BACKEND": "agent_sessions.backends.openai.OpenAIConversationsBackend",
            "OPTIONS": {"base_url": server.url, "api_key": KEY, "max_retries": 0},
        }
        with override_settings(AGENT_SESSIONS={"default": inner}):
            get_session("s").sync.add_items(ITEMS)
            server.fail(status=400, times=1000)
            errors = every_error(
                "default", *APPENDS, *POPS, "latest", "get_items", "page"
            )
    for error in errors:
        assert isinstance(error, StorageError)
        assert_discreet(error, KEY)


@pytest.mark.one_database
@committed
@pytest.mark.parametrize("secret", [f"{SECRET} é", f"{SECRET}\n"])
def test_an_api_key_that_cannot_be_sent_is_told_and_not_shown(secret: str) -> None:
    inner = {
        "BACKEND": "agent_sessions.backends.openai.OpenAIConversationsBackend",
        "OPTIONS": {"base_url": "http://127.0.0.1:9/v1", "api_key": secret},
    }
    with override_settings(AGENT_SESSIONS={"default": inner}):
        messages = check_backends()
        assert [message.id for message in messages] == ["agent_sessions.E018"]
        assert SECRET not in str(messages)
        for error in every_error("default", "append", "add_items"):
            assert isinstance(error, StorageError)
            assert_discreet(error)


def assert_discreet_but_settings(error: BaseException) -> None:
    """Assert as assert_discreet() does, with settings that have nothing to show."""
    with override_settings(AGENT_SESSIONS={}):
        assert_discreet(error)


# -- keys --------------------------------------------------------------------------------


def bad_keys() -> list[Any]:
    return [ALMOST_KEY, f" {MASTER_KEY}", SECRET.encode() + b"\xff"]


def give_almost_key() -> list[Any]:
    return [ALMOST_KEY]


def fail_with_key() -> list[Any]:
    secret = MASTER_KEY
    raise RuntimeError(f"vault says {secret}")


@pytest.mark.one_database
@pytest.mark.parametrize("number", range(3))
def test_a_malformed_key_is_never_shown(number: int) -> None:
    keys = [MASTER_KEY, bad_keys()[number]]
    made: list[Callable[[], object]] = [
        lambda: MasterKey.parse(bad_keys()[number]),
        lambda: KeyRing.parse(_keys(number)),
        lambda: EncryptedSession(DjangoSession("s"), bad_keys()[number]),
        lambda: EncryptedSession(DjangoSession("s"), keys=_keys(number)),
    ]
    shown = [error_of(make) for make in made]
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE}, keys)):
        shown.append(error_of(lambda: get_session("s", backend="private")))
        shown.append(error_of(lambda: sessions["own"]))
        assert SECRET not in str(check_backends())
        for error in shown:
            assert_discreet(error, ALMOST_KEY)


def _keys(number: int) -> list[Any]:
    return [MASTER_KEY, bad_keys()[number]]


@pytest.mark.one_database
def test_a_key_that_is_given_as_a_text_is_not_quoted_as_a_path() -> None:
    dotted = f"{SECRET}.with.dots"
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE}, dotted)):
        error = error_of(lambda: sessions["private"])
        assert isinstance(error, InvalidBackend)
        assert_discreet(error)
        assert SECRET not in str(check_backends())


@committed
@pytest.mark.parametrize("provider", ["give_almost_key", "fail_with_key"])
def test_what_a_provider_of_keys_gives_is_never_shown(provider: str) -> None:
    path = f"{__name__}.{provider}"
    with override_settings(AGENT_SESSIONS=aliases({"BACKEND": DATABASE}, path)):
        for error in every_error("private", *APPENDS) + every_error("own", *APPENDS):
            assert isinstance(error, EncryptionError)
            assert_discreet(error, ALMOST_KEY)
            if provider == "fail_with_key":
                assert f"RuntimeError in {__file__}, line " in str(error)


@committed
def test_an_encrypted_session_shows_nothing_of_what_it_seals() -> None:
    session = EncryptedSession(DjangoSession("s"), MASTER_KEY)
    asyncio.run(session.add_items(ITEMS))
    other = EncryptedSession(DjangoSession("s"), MASTER_KEY + "x")
    errors = [asyncio.run(aerror_of(other.get_items))]
    with refusing("INSERT"):
        errors.append(asyncio.run(aerror_of(lambda: session.add_items(ITEMS))))
    with refusing("DELETE"):
        errors.append(asyncio.run(aerror_of(session.pop_item)))
    for inner in (Quoting("s"), Quoting("s", SECRET)):
        own = EncryptedSession(inner, MASTER_KEY)
        errors.append(asyncio.run(aerror_of(_adding(own))))
    for error in errors[:3]:
        assert_discreet(error, MASTER_KEY)
    # The inner session is the caller's: its words are its own, the plain text is not.
    for error in errors[3:]:
        assert CONTENT not in shown_of(error)


def _adding(session: EncryptedSession) -> Callable[[], Awaitable[object]]:
    return lambda: session.add_items(ITEMS)


# -- pages, views, commands ---------------------------------------------------------------


@committed
def test_pages_that_fail_show_nothing_of_the_transcript() -> None:
    row = make("chat", *ITEMS)
    client = staff("view", "read", "clear", "delete", "change")
    pages = [
        reverse("admin:agent_sessions_agentsession_change", args=[row.pk]),
        reverse("admin:agent_sessions_agentsession_changelist"),
        admin_url("item", row, 1),
    ]
    with override_settings(TEMPLATES=_failing_templates()):
        failed = [page_error(client, page) for page in pages[:2]]
    assert [type(error) for error in failed] == [ZeroDivisionError] * 2
    with without_items():
        failed += [page_error(client, pages[0]), page_error(client, pages[2])]
    for error in failed:
        if error is not None:
            assert_discreet(error)


def page_error(client: Client, page: str, method: str = "get") -> BaseException | None:
    """Ask for a page; give the error that Django reports, if it does."""
    found: list[BaseException | None] = []

    def hear(**kwargs: Any) -> None:
        found.append(sys.exception())

    client.raise_request_exception = False
    got_request_exception.connect(hear)
    try:
        getattr(client, method)(page)
    finally:
        got_request_exception.disconnect(hear)
    return found[0] if found else None


class Failing:
    """Fails where a template shows it."""

    def __str__(self) -> str:
        raise ZeroDivisionError


def _failing_templates() -> list[dict[str, Any]]:
    from copy import deepcopy

    from django.conf import settings

    templates: list[Any] = deepcopy(settings.TEMPLATES)
    base = '{% extends "admin/base.html" %}{% block footer %}{{ broken }}{% endblock %}'
    templates[0]["APP_DIRS"] = False
    templates[0]["OPTIONS"]["loaders"] = [
        ("django.template.loaders.locmem.Loader", {"admin/base_site.html": base}),
        "django.template.loaders.app_directories.Loader",
    ]
    processors = templates[0]["OPTIONS"]["context_processors"]
    processors.append(f"{__name__}.give_broken")
    return templates


def give_broken(request: Any) -> dict[str, Any]:
    return {"broken": Failing()}


@committed
def test_views_and_commands_that_fail_show_nothing() -> None:
    user = make_user()
    row = make("chat", *ITEMS, user=user)
    client = Client()
    client.force_login(user)
    messages = reverse("agent_sessions:messages", args=[row.session_id])
    session = reverse("agent_sessions:session", args=[row.session_id])
    user_id = str(user.pk)
    commands: list[tuple[str, ...]] = [
        ("show_agent_session", row.session_id, "--user", user_id),
        ("export_agent_sessions", row.session_id, "--user", user_id),
        ("clear_agent_sessions", row.session_id, "--user", user_id, "--no-input"),
        ("copy_agent_sessions", "--all", "--from", "default", "--to", "other"),
    ]
    aliased = {"default": {"BACKEND": DATABASE}, "other": {"BACKEND": DATABASE}}
    with override_settings(AGENT_SESSIONS=aliased):
        with without_items():
            for answer in (client.get(messages), client.delete(session)):
                assert (answer.status_code, answer.json()) == (
                    503,
                    refusal_of("unavailable"),
                )
            failed = []
            for name, *given in commands:
                failed.append(error_of(partial(_called, name, *given)))
        with refusing("INSERT"):
            name, *given = commands[-1]
            failed.append(error_of(lambda: _called(name, *given)))
    for error in failed:
        assert error is not None
        assert_discreet(error)


def _called(name: str, *given: str) -> None:
    call_command(name, *given, stdout=StringIO(), stderr=StringIO())


@committed
def test_an_error_in_a_run_shows_nothing_of_the_conversation() -> None:
    """The Runner's own frames hold the input; Django hides them where DEBUG is off."""
    session = DjangoSession("s")
    session.sync.add_items(ITEMS)
    agent = Agent(name="a", model=ScriptedModel([[assistant_message(CONTENT)]] * 2))

    for failing in (refusing("INSERT"), without_items()):
        with failing:
            error = asyncio.run(
                aerror_of(lambda: Runner.run(agent, CONTENT, session=session))
            )
        assert isinstance(error, StorageError)
        for is_email in (False, True):
            reporter = ExceptionReporter(
                None, type(error), error, error.__traceback__, is_email=is_email
            )
            shown = reporter.get_traceback_text() + reporter.get_traceback_html()
            assert "_run_impl" in shown
            assert CONTENT not in shown


@committed
def test_a_run_that_fails_tells_its_socket_and_the_log_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    user = make_user()
    row = make("chat", *ITEMS, user=user)
    agent = Agent(name="a", model=ScriptedModel([[assistant_message(SECRET)]] * 3))

    async def talk() -> list[dict[str, Any]]:
        async with Socket(row.session_id, user, agent) as tab:
            await tab.say("r-1", "Hi")
            return await tab.to_end()

    async def look() -> int:
        async with Socket(row.session_id, user, agent) as tab:
            await tab.sync()
            return await tab.closed()

    with refusing("INSERT"):
        events = async_to_sync(talk)()
    assert (events[-1]["type"], events[-1]["code"]) == ("RUN_ERROR", "internal")
    assert SECRET not in events[-1]["message"]
    with without_items():
        assert async_to_sync(look)() == 4503
    for record in caplog.records:
        assert CONTENT not in record.getMessage()
        assert SECRET not in record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            assert_discreet(record.exc_info[1])
