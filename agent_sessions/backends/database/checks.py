"""What can be wrong with a Django database that holds sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.core.checks import CheckMessage

if TYPE_CHECKING:
    from agent_sessions.backends.database.backend import DatabaseBackend


def check_database(backend: DatabaseBackend) -> list[CheckMessage]:
    """Report settings under which a store loses speed or writes."""
    return []
