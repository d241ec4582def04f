"""Where the admin's pages read: where the default backend writes."""

from __future__ import annotations

from django.db import router

from agent_sessions.exceptions import InvalidBackend, MissingExtra
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.models import AgentSession


def database() -> str:
    """Return the alias of DATABASES whose rows the admin shows.

    A replica may lag behind, so no router is asked where to read.
    """
    try:
        return sessions[DEFAULT_ALIAS].directory.using
    except (InvalidBackend, MissingExtra):
        # Told by the system checks; the rows that there are can still be seen.
        return router.db_for_write(AgentSession)
