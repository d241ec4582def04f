"""Whether a connection that is kept can still be used."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper

# What the router answered in the caller, for the thread that works for it.
chosen_database: ContextVar[str | None] = ContextVar("chosen_database", default=None)


@contextmanager
def choosing(database: str) -> Iterator[None]:
    """Use a database as the router's answer in the block."""
    token = chosen_database.set(database)
    try:
        yield
    finally:
        chosen_database.reset(token)


def is_pooled(connection: BaseDatabaseWrapper) -> bool:
    """Return whether Django takes a database's connections from a pool."""
    return bool((connection.settings_dict.get("OPTIONS") or {}).get("pool"))


def refresh(connection: BaseDatabaseWrapper) -> None:
    """Close a connection that has grown too old or whose server hung up."""
    if connection.vendor == "sqlite" and is_fresh(connection):
        # No server has a say in it.
        return
    _keep(connection)
    if _has_news(connection):
        # A server says nothing between statements, other than goodbye.
        connection.errors_occurred = True
    connection.close_if_unusable_or_obsolete()


def is_fresh(connection: BaseDatabaseWrapper) -> bool:
    """Return whether refresh() would leave a connection as it is; never block."""
    _keep(connection)
    return (
        connection.connection is not None
        and not connection.errors_occurred
        and (connection.close_at is None or time.monotonic() < connection.close_at)
        and not _has_news(connection)
    )


def _keep(connection: BaseDatabaseWrapper) -> None:
    if not connection.settings_dict["CONN_MAX_AGE"]:
        # 0 means until the request's end, but these serve no request, and connecting
        # costs many times what a statement does.
        connection.close_at = None


def _has_news(connection: BaseDatabaseWrapper) -> bool:
    """Return whether something lies in the socket, without asking the server."""
    fileno = getattr(connection.connection, "fileno", None)
    if fileno is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        with connection.wrap_database_errors:
            poll.register(fileno(), select.POLLIN)
    except Error:
        # The driver knows that it is closed.
        return True
    return bool(poll.poll(0))
