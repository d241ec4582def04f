"""How long the admin's pages take: with many sessions, one of them very long.

The data is made with bulk SQL in an empty database. Printed is the time that a page
takes in this process, without a web server: the median and the slowest of the rounds,
its queries, and the rows and buffers that these read. It judges nothing unless --max-ms
or --max-queries is given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import django
from django.conf import settings
from django.core.management import call_command
from django.db import connection, connections
from django.urls import path

from benchmarks.costs import Costs, watched
from benchmarks.crowd import HEAVY, LONG, Crowd, fill, parsed, settle
from tests.servers.mariadb import mariadb
from tests.servers.postgres import postgres

_APPS = ("admin", "auth", "contenttypes", "messages", "sessions", "staticfiles")
_MIDDLEWARE = (
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
)
_CONTEXT = (
    "django.template.context_processors.request",
    "django.contrib.auth.context_processors.auth",
    "django.contrib.messages.context_processors.messages",
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parsed(__doc__, "benchmarks.admin", "mariadb")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--max-ms", type=float, help="exit with 1 where a median is above this"
    )
    parser.add_argument(
        "--max-queries", type=int, help="exit with 1 where a page has more of them"
    )
    parser.add_argument(
        "--explain",
        type=int,
        metavar="ROWS",
        help="print the dearest query of pages that read more rows than this",
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
    if kind == "mariadb":
        import MySQLdb

        with mariadb() as server:
            user: dict[str, Any] = {"user": "root"}
            found = MySQLdb.connect(host=server.host, port=server.port, **user)
            found.query("CREATE DATABASE bench CHARACTER SET utf8mb4")
            yield from _migrated(_server("mysql", "root", server))
        return
    import psycopg

    with postgres() as server:
        where: dict[str, Any] = {"host": server.host, "port": server.port}
        with psycopg.connect(
            **where, user="postgres", dbname="postgres", autocommit=True
        ) as connected:
            connected.execute("CREATE DATABASE bench")
        yield from _migrated(_server("postgresql", "postgres", server))


def _server(engine: str, user: str, server: Any) -> dict[str, Any]:
    return {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": "bench",
        "USER": user,
        "HOST": server.host,
        "PORT": str(server.port),
    }


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


def pages(crowd: Crowd) -> dict[str, str]:
    """Name the pages that are measured."""
    base, runs = (
        "/admin/agent_sessions/agentsession/",
        "/admin/agent_sessions/agentrun/",
    )
    last = max(1, min(crowd.sessions, 10_000) // 50)
    listed = {
        "sessions": "",
        f"sessions, page {last}": f"?p={last}",
        "sessions, by last activity": "?o=7",
        "sessions, oldest activity": "?o=-7",
        "sessions, id begins": "?q=session-77",
        "sessions, any id begins": "?q=session-",
        "sessions, a user's": "?q=user7",
        "sessions, the heavy user's": "?q=user1",
        "sessions, words of a title": "?q=state+order",
        "sessions, no such words": "?q=nothing+of+this",
        "sessions, waiting": "?state__exact=waiting",
        "sessions, running": "?state__exact=running",
        "sessions without an owner": "?user__isempty=1",
        "sessions of the heavy user": f"?user__id__exact={HEAVY}",
        "sessions of a user, oldest": "?user__id__exact=7&o=-7",
        "sessions of a store": "?backend=default",
        "sessions of another store": "?backend=other",
    }
    of_runs = {
        "runs": "",
        f"runs, page {last}": f"?p={last}",
        "runs, by run id": "?q=run-77",
        "runs, by session id": "?q=session-77",
        "runs, by the long session's": f"?q=session-{LONG}",
        "runs, no such id": "?q=nothing",
        "runs, completed": "?status__exact=completed",
        "runs, waiting": "?status__exact=waiting",
        "runs, running": "?status__exact=running",
        "runs, past 24 hours": "?days=1",
        "runs, past 30 days": "?days=30",
        "runs, failed in 30 days": "?days=30&status__exact=failed",
        "runs of the long session": f"?session__id__exact={LONG}",
        "runs of a session, completed": "?session__id__exact=7&status=completed",
        "runs of no session, completed": "?session__id__exact=0&status=completed",
    }
    others = {
        "transcript, newest": f"{base}{LONG}/change/",
        "transcript, in the middle": f"{base}{LONG}/change/?before={crowd.items // 2}",
        "transcript, from the start": f"{base}{LONG}/change/?after=0",
        "clear, one": f"{base}{LONG}/clear/",
        "delete, one": f"{base}{LONG}/delete/",
        "a run": f"{runs}{crowd.sessions}/change/",
        "delete the heavy user": f"/admin/auth/user/{HEAVY}/delete/",
        "overview, 7 days": f"{base}overview/?days=7",
        "overview, 30 days": f"{base}overview/",
    }
    return {
        **{name: base + query for name, query in listed.items()},
        **{name: runs + query for name, query in of_runs.items()},
        **others,
    }


def actions(crowd: Crowd) -> dict[str, dict[str, Any]]:
    """Name the actions whose confirmation is measured: on a page, and on all."""
    page = {"_selected_action": list(range(2, 102)), "select_across": "0"}
    heavy = {"_selected_action": [2], "select_across": "1"}
    return {
        f"{name}, {words}": {"action": name, **given}
        for name in ("clear_history", "delete_selected")
        for words, given in (("100 sessions", page), ("the heavy user's", heavy))
    }


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a page, round by round, and what its queries read.

    `worked` is the processor's time in this process, which a busy machine changes
    least; a server's own work is not in it.
    """

    passed: list[float]
    worked: list[float]
    costs: Costs


def measure(ask: Callable[[], Any], rounds: int) -> Measured:
    """Time a page, and count what it reads."""
    with watched() as costs:
        response = ask()
    assert response.status_code == 200, response
    found = Measured([], [], costs)
    for _ in range(rounds):
        began, worked = time.perf_counter(), time.process_time()
        ask()
        found.passed.append((time.perf_counter() - began) * 1000)
        found.worked.append((time.process_time() - worked) * 1000)
    return found


def report(name: str, found: Measured, options: argparse.Namespace) -> bool:
    """Print a line; tell whether the page keeps to the bars."""
    costs, middle = found.costs, median(found.passed)
    print(
        f"{name:34}{middle:8.0f}{max(found.passed):8.0f}{median(found.worked):8.0f}"
        f"{costs.queries:9}{costs.rows:9,}{costs.buffers:9,}",
        flush=True,
    )
    if options.explain and costs.rows > options.explain:
        print(f"    {costs.worst[0]:,}: {costs.worst[1]}")
    slow = options.max_ms is not None and middle > options.max_ms
    many = options.max_queries is not None and costs.queries > options.max_queries
    return not (slow or many)


def main() -> int:
    """Fill, measure and print."""
    options = arguments()
    crowd = Crowd.scaled(options.scale)
    with database(options.database):
        from django.contrib.auth import get_user_model
        from django.test import Client

        print(f"{connection.display_name}: {crowd},", end=" ", flush=True)
        began = time.perf_counter()
        fill(crowd)
        settle()
        print(f"made in {time.perf_counter() - began:.0f} s")
        client = Client()
        users: Any = get_user_model().objects
        client.force_login(users.create_superuser("root"))
        unit = "x100 ops" if options.database == "sqlite" else "rows"
        print(
            f"{'page':34}{'median':>8}{'slowest':>8}{'cpu ms':>8}{'queries':>9}"
            f"{unit:>9}{'buffers':>9}"
        )
        good = True
        for name, address in pages(crowd).items():
            found = measure(partial(client.get, address), options.rounds)
            good &= report(name, found, options)
        address = f"/admin/agent_sessions/agentsession/?user__id__exact={HEAVY}"
        for name, data in actions(crowd).items():
            found = measure(partial(client.post, address, data), options.rounds)
            good &= report(name, found, options)
    return int(not good)


if __name__ == "__main__":
    # The addresses are looked up under the module's own name.
    from benchmarks.admin import main as run

    sys.exit(run())
