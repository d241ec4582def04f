"""The session over the ORM, usable without any setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent_sessions.backends.base import make_key
from agent_sessions.handler import sessions
from agent_sessions.memory.compaction import CompactableSession
from agent_sessions.memory.usage import UsageSession

if TYPE_CHECKING:
    from agents.memory import SessionSettings
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser


class DjangoSession(CompactableSession, UsageSession):
    """A conversation in a Django database: `DjangoSession("user_123")`.

    `user` owns it; None means a session without an owner. `database` is an alias of
    DATABASES, else the router's choice. `branch` names a branch to work on, else the
    session's current one.
    """

    def __init__(
        self,
        session_id: str,
        *,
        user: AbstractBaseUser | AnonymousUser | None = None,
        database: str | None = None,
        branch: str | None = None,
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            sessions.database(database),
            make_key(session_id, user, branch=branch),
            session_settings=session_settings,
        )
