"""The contract suite on OpenAIConversationsBackend, over a server with its rules.

The service gives each item an id of its own and a message's text the form of parts.
The suite compares what it stored with what it reads, so what is read is first put
back into the form in which the suite writes; known gaps are where that can't be told.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import pytest
from agents.memory import OpenAIConversationsSession, Session
from django.contrib.auth import get_user_model
from django.test import override_settings

from agent_sessions import get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.openai import OpenAIConversationsBackend
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.items import Item
from agent_sessions.testing.fidelity import json_items
from tests.servers.conversations import KEY, ConversationsServer, conversations_server
from tests.support.contract import OnThePool, StoreContract

T = TypeVar("T")

IDS = "the service replaces an item's id by its own"
TYPES = "the service adds the type to messages that have none"
COMPACTION = "the SDK refuses to compact a Conversations session"
BOTH = ("run", "run_streamed")


def as_written(item: Item) -> Item:
    """Take away what the service added, as far as that can be told."""
    item = {name: value for name, value in item.items() if name != "id"}
    match item.get("content"):
        case [{"type": "input_text" | "output_text", "text": str(text), **more}] if (
            item.get("type") == "message" and more in ({}, {"annotations": []})
        ):
            item["content"] = text
            if item.get("status") == "completed":
                del item["status"]
            del item["type"]
    return item


def is_left_alone(item: Item) -> bool:
    """Whether an item comes back the same but for what as_written() undoes."""
    return "id" not in item and "type" not in item


class AsWrittenBackend(OpenAIConversationsBackend):
    """Gives items as the suite wrote them."""

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        return [as_written(item) for item in await super().store_latest(key, limit)]

    async def store_pop(self, key: SessionKey) -> Item | None:
        item = await super().store_pop(key)
        return None if item is None else as_written(item)


@pytest.fixture(scope="module")
def server() -> Iterator[ConversationsServer]:
    with conversations_server() as running:
        yield running


class ConversationsContract(StoreContract):
    supports_owner = True
    supports_wrapper = True
    supports_clear_alias = True
    # The service refuses the envelopes of the SDK's EncryptedSession.
    supports_encryption = False
    foreign_error = SessionDoesNotExist
    examples = 8

    known_gaps: ClassVar[dict[str, str]] = {
        "test_duplicates_are_kept": IDS,
        "test_item_comes_back[unknown_keys]": IDS,
        **{
            f"test_item_comes_back[{name}]": IDS
            for name in ("assistant_message", "reasoning", "item_reference")
        },
        "test_item_comes_back[typed_message]": TYPES,
        **{f"test_compaction_session_wraps_it[{run}]": COMPACTION for run in BOTH},
    }

    # Items with ids come back with others.
    generated = json_items.filter(is_left_alone)

    server: ConversationsServer

    @pytest.fixture(autouse=True)
    def _alias(self, server: ConversationsServer) -> Iterator[None]:
        self.server = server
        options = {"base_url": server.url, "api_key": KEY}
        setting = {"default": {"BACKEND": AsWrittenBackend, "OPTIONS": options}}
        with override_settings(AGENT_SESSIONS=setting):
            yield

    async def make_session(self, session_id: str, **options: Any) -> Session:
        session: Any = get_session(session_id, **options)
        assert isinstance(session, OpenAIConversationsSession)
        return session  # the Runner has rules of its own for this class

    async def make_user(self, name: str) -> Any:
        create = get_user_model().objects.create_user
        threads = sessions["default"].threads
        return await threads.run(create, f"{name}-{uuid.uuid4()}")


@pytest.mark.one_database
class TestOnThePool(OnThePool, ConversationsContract):
    """No transaction is open: the directory's own threads serve, several at once."""

    supports_second_process = True

    def process_source(self) -> str:
        return f"""
import django
django.setup()
from django.test import override_settings
from agent_sessions import get_session
from tests.backends.openai.test_openai_contract import AsWrittenBackend

options = {{"base_url": {self.server.url!r}, "api_key": {KEY!r}}}
setting = {{"default": {{"BACKEND": AsWrittenBackend, "OPTIONS": options}}}}
override_settings(AGENT_SESSIONS=setting).enable()

async def make_session(session_id):
    return get_session(session_id)
"""
