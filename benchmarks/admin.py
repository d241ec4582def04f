"""How long the admin's pages take: with many sessions, one of them very long.

The data is made with bulk SQL in an empty database. Printed is the time that a page
takes in this process, without a web server: the median and the slowest of the rounds,
and its queries. It judges nothing unless --max-ms is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import django
from django.conf import settings
from django.core.management import call_command
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext
from django.urls import path

from tests.servers.postgres import postgres

if TYPE_CHECKING:
    from django.test import Client

_APPS = ("admin", "auth", "contenttypes", "messages", "sessions", "staticfiles")
_MIDDLEWARE = (
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
)
_NUMBERS = ("requests", "input_tokens", "output_tokens", "cached_tokens")
_CONTEXT = (
    "django.template.context_processors.request",
    "django.contrib.auth.context_processors.auth",
    "django.contrib.messages.context_processors.messages",
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.admin")
    parser.add_argument(
        "--database", choices=("postgresql", "sqlite"), default="sqlite"
    )
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000, help="of one session")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument(
        "--days", type=int, default=365, help="days that the runs are spread over"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--max-ms", type=float, help="exit with 1 where a median is above this"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print the plans of the overview"
    )
    return parser.parse_args(argv)


@contextmanager
def database(kind: str) -> Iterator[None]:
    """Make an empty database with the admin on it; take it down again."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="agent-sessions-bench-") as name:
            options = {"init_command": "PRAGMA journal_mode=WAL;"}
            place = {"NAME": str(Path(name) / "bench.sqlite3"), "OPTIONS": options}
            yield from _migrated({"ENGINE": "django.db.backends.sqlite3", **place})
        return
    import psycopg

    with postgres() as server:
        where: dict[str, Any] = {
            "host": server.host,
            "port": server.port,
            "user": "postgres",
        }
        with psycopg.connect(**where, dbname="postgres", autocommit=True) as found:
            found.execute("CREATE DATABASE bench")
        yield from _migrated(
            {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": "bench",
                "USER": "postgres",
                "HOST": server.host,
                "PORT": str(server.port),
            }
        )


def _migrated(default: dict[str, Any]) -> Iterator[None]:
    settings.configure(
        ALLOWED_HOSTS=["testserver"],
        DATABASES={"default": default},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[*(f"django.contrib.{app}" for app in _APPS), "agent_sessions"],
        MIDDLEWARE=list(_MIDDLEWARE),
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="only for benchmarks",  # noqa: S106
        STATIC_URL="static/",
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {"context_processors": list(_CONTEXT)},
            }
        ],
        TIME_ZONE="UTC",
        USE_TZ=True,
    )
    django.setup()
    from django.contrib import admin

    from agent_sessions.handler import sessions

    urlpatterns.append(path("admin/", admin.site.urls))
    call_command("migrate", verbosity=0)
    try:
        yield
    finally:
        sessions.reset()
        connections.close_all()


urlpatterns: list[Any] = []


def fill(options: argparse.Namespace) -> None:
    """Make users, sessions, runs over the last days, and the items of session 1."""
    _insert(
        "auth_user",
        options.users,
        id="i",
        password="''",  # noqa: S106 - nobody logs in with it
        is_superuser="FALSE",
        username="'user' || i",
        first_name="''",
        last_name="''",
        email="''",
        is_staff="FALSE",
        is_active="TRUE",
        date_joined=_ago("0"),
    )
    _fill_sessions(options)
    _fill_items(options.items)
    _fill_runs(options)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
        if connection.vendor == "postgresql":
            # Keys were given by hand.
            cursor.execute("VACUUM")
            cursor.execute(
                "SELECT setval(pg_get_serial_sequence('auth_user', 'id'), "
                "(SELECT max(id) FROM auth_user))"
            )


def _fill_sessions(options: argparse.Namespace) -> None:
    spread = options.days * 86_400
    text = {"remote_id", "run_owner", "agent_name", "run_id"}
    _insert(
        "agent_sessions_agentsession",
        options.sessions,
        id="i",
        backend="'default'",
        session_id="'session-' || i",
        user_id=f"1 + i % {options.users}",
        title="'What is the state of order ' || i",
        metadata="'{}'",
        item_count=f"CASE WHEN i = 1 THEN {options.items} ELSE 20 END",
        **dict.fromkeys(text, "''"),
        **dict.fromkeys((*_NUMBERS, "reasoning_tokens", "fence"), "i % 1000"),
        remote_deleting="1 = 0",
        state="'idle'",
        created_at=_ago(f"i * 7919 % {spread}"),
        updated_at=_ago(f"i * 7919 % {spread}"),
        active_on=_day(f"i * 7919 % {spread}"),
    )
    _insert(
        "agent_sessions_branch",
        options.sessions,
        id="i",
        session_id="i",
        name="'main'",
        version="0",
        is_quarantine="1 = 0",
        head=str(options.items),
        turn="1",
        created_at=_ago("0"),
    )
    with connection.cursor() as cursor:
        cursor.execute("UPDATE agent_sessions_agentsession SET branch_id = id")


def _fill_items(count: int) -> None:
    data = json.dumps({"role": "user", "content": "Where is my order? " * 20})
    _insert(
        "agent_sessions_sessionitem",
        count,
        id="i",
        branch_id="1",
        position="i",
        turn="1 + i / 10",
        data=f"'{data}'",
        type="'message'",
        role="'user'",
        call_id="''",
        tool_name="''",
        text="'Where is my order?'",
        size=str(len(data)),
        created_at=_ago(f"{count} - i"),
    )


def _fill_runs(options: argparse.Namespace) -> None:
    spread = options.days * 86_400
    # Every hundredth run is of the long session, ten items each.
    of_long = "i % 100 = 0"
    _insert(
        "agent_sessions_agentrun",
        options.runs,
        id="i",
        session_id=f"CASE WHEN {of_long} THEN 1 ELSE 1 + i % {options.sessions} END",
        branch_id=f"CASE WHEN {of_long} THEN 1 ELSE 1 + i % {options.sessions} END",
        run_id="'run-' || i",
        message_ids="'[]'",
        agent_name="CASE i % 4 WHEN 0 THEN 'Triage' WHEN 1 THEN 'Billing' "
        "WHEN 2 THEN 'Shipping' ELSE 'Research' END",
        model="'gpt-5'",
        status="CASE WHEN i % 50 = 0 THEN 'failed' WHEN i % 1000 = 1 THEN 'waiting' "
        "ELSE 'completed' END",
        # In the order of their keys, as runs are.
        started_at=_ago(f"({options.runs} - i) * {spread / options.runs}"),
        first_position=f"CASE WHEN {of_long} THEN i / 10 - 9 END",
        last_position=f"CASE WHEN {of_long} THEN i / 10 END",
        turn="1",
        **dict.fromkeys((*_NUMBERS, "reasoning_tokens", "total_tokens"), "i % 5000"),
        usage="'{}'",
        error_code="CASE WHEN i % 50 = 0 THEN 'model_error' ELSE '' END",
        trace_id="'trace_' || i",
        state="''",
        sdk_version="'0.24.0'",
    )


def _insert(table: str, count: int, **columns: str) -> None:
    """Insert rows 1 to `count`; a column is SQL in which `i` is the row's number."""
    values = ", ".join(columns.values())
    with connection.cursor() as cursor:
        cursor.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "  # noqa: S608
            f"WHERE i < {count}) INSERT INTO {table} ({', '.join(columns)}) "
            f"SELECT {values} FROM n"
        )


def _ago(seconds: str) -> str:
    """Return SQL for a moment so many seconds ago."""
    if connection.vendor == "postgresql":
        return f"now() - make_interval(secs => {seconds})"
    return f"datetime('now', '-' || ({seconds}) || ' seconds')"


def _day(seconds: str) -> str:
    if connection.vendor == "postgresql":
        return f"CAST({_ago(seconds)} AS date)"
    return f"date('now', '-' || ({seconds}) || ' seconds')"


def pages(options: argparse.Namespace) -> dict[str, str]:
    """Name the pages that are measured."""
    base = "/admin/agent_sessions/agentsession/"
    return {
        "sessions": base,
        "sessions, last page counted": f"{base}?p={max(1, min(options.sessions, 10_000) // 50)}",
        "sessions, searched by id": f"{base}?q=session-77",
        "sessions, waiting": f"{base}?state__exact=waiting",
        "transcript, newest": f"{base}1/change/",
        "transcript, in the middle": f"{base}1/change/?before={options.items // 2}",
        "transcript, from the start": f"{base}1/change/?after=0",
        "overview, 7 days": f"{base}overview/?days=7",
        "overview, 30 days": f"{base}overview/",
        "overview, 14 days": f"{base}overview/?days=14",
        "runs": "/admin/agent_sessions/agentrun/",
        "runs, waiting": "/admin/agent_sessions/agentrun/?status__exact=waiting",
        "runs, past 7 days": "/admin/agent_sessions/agentrun/?days=7",
        "runs of the long session": (
            "/admin/agent_sessions/agentrun/?session__id__exact=1"
        ),
        "a run": f"/admin/agent_sessions/agentrun/{options.runs // 2}/change/",
    }


@dataclass(frozen=True)
class Times:
    """Milliseconds of a page, round by round, and its queries.

    `worked` is the processor's time in this process, which a busy machine changes
    least; a server's own work is not in it.
    """

    passed: list[float]
    worked: list[float]
    queries: int


def measure(client: Client, address: str, rounds: int) -> Times:
    """Time a page."""
    queries = 0

    def count(execute: Any, *given: Any) -> Any:
        nonlocal queries
        queries += 1
        return execute(*given)

    with connection.execute_wrapper(count):
        assert client.get(address).status_code == 200, address
    times = Times([], [], queries)
    for _ in range(rounds):
        began, worked = time.perf_counter(), time.process_time()
        assert client.get(address).status_code == 200, address
        times.passed.append((time.perf_counter() - began) * 1000)
        times.worked.append((time.process_time() - worked) * 1000)
    return times


def explain() -> None:
    """Print how the database finds what the overview shows."""
    from agent_sessions.admin.overview import gather

    with CaptureQueriesContext(connection) as queries:
        gather(30)
    for query in queries:
        print(query["time"], query["sql"][:100])
    with CaptureQueriesContext(connection) as queries:
        gather(2)
    prefix = "EXPLAIN" if connection.vendor == "postgresql" else "EXPLAIN QUERY PLAN"
    with connection.cursor() as cursor:
        for query in queries:
            cursor.execute(f"{prefix} {query['sql']}")
            print(query["sql"][:100], *map(str, cursor.fetchall()), "", sep="\n")


def main() -> int:
    """Fill, measure and print."""
    options = arguments()
    worst = 0.0
    with database(options.database):
        from django.contrib.auth import get_user_model
        from django.test import Client

        began = time.perf_counter()
        fill(options)
        print(
            f"{connection.display_name}: {options.sessions:,} sessions, one of "
            f"{options.items:,} items, {options.runs:,} runs over {options.days} days, "
            f"made in {time.perf_counter() - began:.0f} s"
        )
        if options.explain:
            explain()
        client = Client()
        users: Any = get_user_model().objects
        client.force_login(users.create_superuser("root"))
        print(f"{'page':32}{'median ms':>10}{'slowest':>10}{'cpu ms':>9}{'queries':>9}")
        for name, address in pages(options).items():
            times = measure(client, address, options.rounds)
            middle = median(times.passed)
            worst = max(worst, middle)
            print(
                f"{name:32}{middle:10.0f}{max(times.passed):10.0f}"
                f"{median(times.worked):9.0f}{times.queries:9}"
            )
    return int(options.max_ms is not None and worst > options.max_ms)


if __name__ == "__main__":
    # The addresses are looked up under the module's own name.
    from benchmarks.admin import main as run

    sys.exit(run())
