"""The session that sockets and runs are about, as found for its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.db import transaction

from agent_sessions.backends.base import BaseSessionBackend, SessionKey, make_key
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.models import AgentSession

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser


@dataclass(frozen=True, slots=True)
class Conversation:
    """An existing, owned session: its directory row's key and its backend."""

    pk: int
    backend: BaseSessionBackend
    key: SessionKey

    @property
    def session_id(self) -> str:
        """The id by which its owner knows the session."""
        return self.key.session_id

    @classmethod
    async def find(
        cls,
        session_id: str,
        *,
        user: AbstractBaseUser,
        backend: str = DEFAULT_ALIAS,
    ) -> Conversation:
        """Find a user's own session. Raises SessionDoesNotExist for any other."""
        store = sessions[backend]
        key = make_key(session_id, user)
        pk = await store.threads.run(
            lambda: store.directory.rows(key).values_list("pk", flat=True).first()
        )
        if pk is None:
            raise SessionDoesNotExist(session_id)
        return cls(pk, store, key)

    def rows(self) -> Any:
        """Return the directory's row as a query set."""
        return self.backend.directory.rows(self.key).filter(pk=self.pk)

    def exists(self) -> bool:
        """Return whether the session is still there and its owner's."""
        found: bool = self.rows().exists()
        return found


def create_conversation(
    user: AbstractBaseUser, *, backend: str = DEFAULT_ALIAS
) -> AgentSession:
    """Make an empty session with an id that can't be guessed."""
    store = sessions[backend]
    key = make_key(AgentSession.new_id(), user)
    with transaction.atomic(store.directory.using):
        store.directory.create(key)
    return store.directory.rows(key).get()
