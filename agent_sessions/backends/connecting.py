"""Which connections a backend's OPTIONS ask for, and whether the project needs others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.checks import CheckMessage, Warning
from django.utils.module_loading import import_string

from agent_sessions.concurrency.threads import ConnectionPolicy
from agent_sessions.exceptions import InvalidBackend

if TYPE_CHECKING:
    from agent_sessions.backends.base import BaseSessionBackend

# The options of each backend that has rows in a Django database.
OPTIONS: dict[str, Any] = {
    "database": None,
    "connections": None,
    "prepare_connection": None,
}
# What paths of packages and of projects' own modules are called that set something on
# the connection of a request: django-tenants, django-pgschemas, django-rls and others.
_PER_REQUEST = re.compile(r"tenant|pgschemas|(?<![a-z])rls(?![a-z])|row_level", re.I)


def read_policy(alias: str, options: dict[str, Any]) -> ConnectionPolicy:
    """Read which connections serve async callers. Raises InvalidBackend."""
    threads = options.get("threads")
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
    ):
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: threads must be a whole number of 1 or "
            f"more, not {threads!r}.",
            hint="Leave it out for 1 on SQLite and 8 on other databases.",
            id="agent_sessions.E012",
        )
    if options["connections"] not in {None, "own", "request"}:
        raise InvalidBackend(
            f'AGENT_SESSIONS[{alias!r}]: connections must be "own" or "request", '
            f"not {options['connections']!r}.",
            hint='Leave it out for "own": connections of a pool serve async callers.',
            id="agent_sessions.E023",
        )
    prepare = options["prepare_connection"]
    if isinstance(prepare, str):
        try:
            prepare = import_string(prepare)
        except ImportError as exc:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: prepare_connection can't be imported: "
                f"{exc}",
                hint="Give the dotted path of a function that takes a connection.",
                id="agent_sessions.E024",
            ) from exc
    if prepare is not None and not callable(prepare):
        raise InvalidBackend(
            f"AGENT_SESSIONS[{alias!r}]: prepare_connection is not a function: "
            f"{prepare!r}.",
            hint="Give a function that takes a connection, or its dotted path.",
            id="agent_sessions.E024",
        )
    return ConnectionPolicy(
        size=threads,
        shared=options["connections"] == "request",
        prepare=prepare,
        routed=options["database"] is None,
    )


def check_policy(backend: BaseSessionBackend, using: str) -> list[CheckMessage]:
    """Report a project that sets something on the connection of each request."""
    options = backend.options
    if options["connections"] is not None or options["prepare_connection"] is not None:
        return []
    engine = str(settings.DATABASES.get(using, {}).get("ENGINE", ""))
    routers = [_path(router) for router in settings.DATABASE_ROUTERS]
    found = [
        path
        for path in (engine, *settings.MIDDLEWARE, *routers)
        if _PER_REQUEST.search(path)
    ]
    if not found:
        return []
    return [
        Warning(
            f"{found[0]} seems to set something on the connection of each request, "
            f"which the connections of AGENT_SESSIONS[{backend.alias!r}] for async "
            "callers don't have: another tenant's sessions may be read, or none.",
            hint=f"Set AGENT_SESSIONS[{backend.alias!r}]['OPTIONS'] to include "
            '"connections": "request", or name a function in "prepare_connection", '
            "which websockets need. "
            'Where neither is needed, set "connections": "own".',
            id="agent_sessions.W009",
        )
    ]


def _path(router: Any) -> str:
    kind = type(router)
    is_path = isinstance(router, str)
    return router if is_path else f"{kind.__module__}.{kind.__qualname__}"
