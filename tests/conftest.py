"""Databases, servers and coroutine tests for the whole suite.

Fixtures for tests: `database_environment`, `postgres_server`, `mariadb_server`,
`valkey_server`, `memcached_server`, `dapr_server` and `chromium`. A test that is a
coroutine function just runs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections
from hypothesis import HealthCheck, settings
from pytest_django import DjangoDbBlocker

from agent_sessions import sessions
from tests.servers import PARTS, Server
from tests.servers.chromium import executable
from tests.servers.dapr import DaprSidecar, dapr
from tests.servers.mariadb import mariadb
from tests.servers.memcached import memcached
from tests.servers.postgres import postgres
from tests.servers.redis import Watched, cluster, redis, sentinel
from tests.servers.valkey import valkey
from tests.settings import DATABASE_KIND

# No test talks to a model behind a key that happens to be set.
os.environ.pop("OPENAI_API_KEY", None)

# A busy machine is no fault of a test.
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

_IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}
_DATABASE_FIXTURES = {"db", "transactional_db", "django_db_reset_sequences"}
_not_run = pytest.StashKey[dict[str, list[pytest.Item]]]()


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore Ctrl-C, and so would the
    # commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if DATABASE_KIND != "sqlite":
        # The other databases repeat what touches a database, and nothing else.
        repeated = [item for item in items if _repeats(item)]
        config.hook.pytest_deselected(
            items=[item for item in items if item not in repeated]
        )
        items[:] = repeated
    not_run = config.stash.setdefault(_not_run, {})
    absent = {part: reason for part, ask in PARTS.items() if (reason := ask())}
    for item in items:
        for part in _parts(item):
            if part not in absent:
                continue
            reason = absent[part]
            not_run.setdefault(reason, []).append(item)
            if not _IN_CI:
                item.add_marker(pytest.mark.skip(reason=reason))
            break


def pytest_collection_finish() -> None:
    # What is imported stays: a collection has only what the tests make to look at.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    # A connection that a module leaves open fails that module, not one that happens
    # to run when the garbage is collected.
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not _IN_CI:
        return
    for part in _parts(item):
        if reason := PARTS[part]():
            pytest.fail(f"CI must run every test, but {reason}", pytrace=False)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = [
        f"!!! NOT RUN on {DATABASE_KIND}: {_named(items)}, because {reason}"
        for reason, items in config.stash.get(_not_run, {}).items()
    ]
    # `make test` has several calls of pytest and tells all of it at the end.
    if path := os.environ.get("AGENT_SESSIONS_TEST_NOT_RUN"):
        with Path(path).open("a") as report:
            report.writelines(f"{line}\n" for line in lines)
    for line in lines:
        terminalreporter.write_line(line, red=True, bold=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in a loop of its own, with the ORM in this thread.

    So its rows are in the transaction that django_db rolls back, which pytest-asyncio
    can't do.
    """
    test: Callable[..., Any] = pyfuncitem.obj
    generated = getattr(test, "hypothesis", None)
    if generated is not None:
        if iscoroutinefunction(generated.inner_test):
            generated.inner_test = _synchronous(generated.inner_test)
        return None
    if not iscoroutinefunction(test):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    async_to_sync(test)(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Start the server of the test database, and return where it is."""
    database: dict[str, Any] = connections.settings["default"]
    if DATABASE_KIND == "sqlite":
        # A file, not memory: several connections must see one another's locks.
        path = tmp_path_factory.mktemp("database") / "test.sqlite3"
        database["TEST"]["NAME"] = str(path)
        return
    server: Server = request.getfixturevalue(f"{DATABASE_KIND}_server")
    database.update(HOST=server.host, PORT=str(server.port))


@pytest.fixture(scope="session")
def django_db_setup(
    django_db_setup: None, django_db_blocker: DjangoDbBlocker
) -> Iterator[None]:
    """Close the backends' connections before the test database is dropped."""
    from tests.support.flushing import keep_permissions

    with django_db_blocker.unblock():
        keep_permissions("default")
    yield
    sessions.reset()


@pytest.fixture(scope="session", autouse=True)
def _open_transactions() -> Iterator[None]:
    """Make Channels close old connections, but none of a test's transaction."""
    from channels import db

    def close_old_connections() -> None:
        for connection in connections.all(initialized_only=True):
            if not connection.in_atomic_block:
                connection.close_if_unusable_or_obsolete()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "close_old_connections", close_old_connections)
        yield


@pytest.fixture
def default_loop() -> Iterator[None]:
    """Set a loop for Runner.run_sync: it leaves the thread's default one open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def database_environment(transactional_db: None) -> dict[str, str]:
    """Return the environment in which a child process uses this test's database."""
    database = connections["default"].settings_dict
    return os.environ | {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "AGENT_SESSIONS_TEST_DATABASE": DATABASE_KIND,
        "AGENT_SESSIONS_TEST_NAME": str(database["NAME"]),
        "AGENT_SESSIONS_TEST_HOST": str(database["HOST"]),
        "AGENT_SESSIONS_TEST_PORT": str(database["PORT"]),
    }


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """Run PostgreSQL for the session."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[Server]:
    """Run MariaDB for the session."""
    with mariadb() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Server]:
    """Run Valkey for the session."""
    with valkey() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_server() -> Iterator[Server]:
    """Run Memcached for the session."""
    with memcached() as server:
        yield server


@pytest.fixture(scope="session")
def _dapr() -> Iterator[DaprSidecar]:
    with dapr() as sidecar:
        yield sidecar


@pytest.fixture
def dapr_server(
    _dapr: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DaprSidecar]:
    """Return the session's sidecar of Dapr, empty and in order, where clients look."""
    _dapr.reset()
    for name, value in _dapr.environment.items():
        monkeypatch.setenv(name, value)
    yield _dapr
    _dapr.reset()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """Run Redis for the session."""
    with redis() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[list[Server]]:
    """Run a Redis cluster of three nodes for the session."""
    with cluster() as servers:
        yield servers


@pytest.fixture(scope="session")
def valkey_sentinel() -> Iterator[Watched]:
    """Run a Valkey with a replica and sentinels for the session."""
    with sentinel() as watched:
        yield watched


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of the browser, for Playwright's `executable_path`."""
    path = executable()
    assert path, "pytest_collection_modifyitems lets no test come here without one"
    return path


def _synchronous(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        return async_to_sync(test)(*args, **kwargs)

    return run


def _named(items: list[pytest.Item]) -> str:
    files = sorted({item.path.name for item in items})
    where = ", ".join(files) if len(files) <= 5 else f"{len(files)} files"
    return f"{len(items)} tests of {where}"


def _touches_database(item: pytest.Item) -> bool:
    if item.get_closest_marker("django_db"):
        return True
    return not _DATABASE_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def _repeats(item: pytest.Item) -> bool:
    return _touches_database(item) and not item.get_closest_marker("one_database")


def _parts(item: pytest.Item) -> list[str]:
    parts = [part for part in getattr(item, "fixturenames", ()) if part in PARTS]
    if DATABASE_KIND != "sqlite" and _touches_database(item):
        parts.append(f"{DATABASE_KIND}_server")
    return parts


@pytest.fixture(autouse=True)
def _closed_sdk_sessions() -> Iterator[None]:
    """Close every SQLiteSession of the SDK's that a test makes and leaves open.

    Python 3.13 warns of each one that is collected with its database open, and fails
    whichever test runs just then.
    """
    from agents import SQLiteSession

    made: list[SQLiteSession] = []
    begin = SQLiteSession.__init__

    @wraps(begin)
    def begin_and_note(self: SQLiteSession, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        made.append(self)

    # Its own, since a test may undo what is patched by the fixture.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SQLiteSession, "__init__", begin_and_note)
        yield
    for session in made:
        session.close()
