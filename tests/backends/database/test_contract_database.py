"""The contract suite on DatabaseBackend, on whichever database the run is for."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

import pytest
from agents.memory import Session
from django.contrib.auth import get_user_model

from agent_sessions import get_session, sessions
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.models import SessionItem
from tests.support.contract import OnThePool, StoreContract

T = TypeVar("T")


class DatabaseContract(StoreContract):
    supports_corrupt = True
    supports_owner = True
    supports_wrapper = True
    supports_clear_alias = True
    foreign_error = SessionDoesNotExist

    async def make_session(self, session_id: str, **options: Any) -> Session:
        return get_session(session_id, **options)

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        threads = sessions["default"].threads
        return await threads.run(create, f"{name}-{uuid.uuid4()}")

    async def corrupt(self, session: Session, nth: int, data: str) -> str:
        threads = sessions["default"].threads
        return await threads.run(self._corrupt, session.session_id, nth, data)

    def _corrupt(self, session_id: str, nth: int, data: str) -> str:
        rows = SessionItem.objects.filter(branch__session__session_id=session_id)
        item = list(rows.order_by("position"))[nth]
        original, item.data = item.data, data
        item.save(update_fields=["data"])
        return str(original)


@pytest.mark.django_db
class TestInATransaction(DatabaseContract):
    """The caller holds a transaction, so its own connection serves all."""

    # Other threads have connections of their own, which can't see its rows.
    supports_threads = False


class TestOnThePool(OnThePool, DatabaseContract):
    """No transaction is open: the backend's own threads serve, several at once."""

    supports_second_process = True

    def process_source(self) -> str:
        return """
import django
django.setup()
from agent_sessions import get_session

async def make_session(session_id):
    return get_session(session_id)
"""
