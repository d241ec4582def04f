"""The doors of docs/doors.md in Python, and what processes keep."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, RunContextWrapper, Runner
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import async_to_sync
from cryptography.fernet import Fernet
from django.contrib.auth.models import AnonymousUser
from django.test import TestCase

import agent_sessions
from agent_sessions import get_session, sessions, usage
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.leases import this_process
from agent_sessions.backends.redis.scripts import Names
from agent_sessions.encryption import Memory
from agent_sessions.exceptions import (
    InvalidOwner,
    SessionDoesNotExist,
    UnknownEncryptionKey,
)
from agent_sessions.memory import encrypted
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.ratelimit import RateLimit, Rates
from agent_sessions.runs import Conversation, Subscription, get_run_manager
from agent_sessions.signals import session_cleared
from tests.checks.test_doors import tables
from tests.checks.test_doors_inside import Pair, private_settings, said

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]
ROOT = Path(agent_sessions.__file__).parent


@pytest.fixture
def pair(settings: Any) -> Pair:
    settings.AGENT_SESSIONS = private_settings()
    return Pair()


# -- Python ----------------------------------------------------------------------------


def refuses(user: Any, *, call: Any = get_session) -> None:
    """Try all that a session does for somebody who isn't its owner."""
    acts: list[Callable[[Any], Any]] = [
        lambda sync: sync.get_items(),
        lambda sync: sync.add_items([{"role": "user", "content": "x"}]),
        lambda sync: sync.pop_item(),
        lambda sync: sync.clear_session(),
    ]
    for act in acts:
        with pytest.raises(SessionDoesNotExist) as error:
            act(call("ours-id", user=user).sync)
        assert not said("ours", str(error.value))


def open_for_others(pair: Pair, name: str) -> None:
    call: Any = getattr(agent_sessions, name)
    for user in (pair.them, None):
        refuses(user, call=call)
    with pytest.raises(InvalidOwner):
        call("ours-id", user=AnonymousUser())
    assert said("ours", json.dumps(call("ours-id", user=pair.us).sync.get_items()))


def has_the_owner_in_its_key(pair: Pair, name: str) -> None:
    def call(session_id: str, user: Any) -> Any:
        key = SessionKey(session_id, user and user.pk)
        return agent_sessions.BackendSession(sessions["default"], key)

    for user in (pair.them, None):
        refuses(user, call=call)


def knows_no_owner(pair: Pair, name: str) -> None:
    assert "user" not in inspect.signature(getattr(agent_sessions, name)).parameters
    # What it calls a history is what no owner's is called.
    owned = Names("agents:session", "ours-id", "default", pair.us.pk)
    assert not set(Names("agents:session", "ours-id").keys) & set(owned.keys)


def needs_the_key(pair: Pair, name: str) -> None:
    assert agent_sessions.EncryptSession is encrypted.EncryptedSession
    inner = get_session("sealed", user=pair.us)
    first, second = (Fernet.generate_key().decode() for _ in range(2))
    item: Any = {"role": "user", "content": "ours-question"}
    async_to_sync(encrypted.EncryptedSession(inner, first).add_items)([item])
    assert not said("ours", json.dumps(inner.sync.get_items()))
    other = encrypted.EncryptedSession(inner, second)
    with pytest.raises(UnknownEncryptionKey):
        async_to_sync(other.get_items)()


def keys_have_owners(pair: Pair, name: str) -> None:
    for user in (pair.them.pk, None):
        with pytest.raises(SessionDoesNotExist):
            sessions["default"].page(SessionKey("ours-id", user))


def finds_own_rows(pair: Pair, name: str) -> None:
    for model, count in (
        (AgentSession, 1),
        (Branch, 1),
        (SessionItem, 2),
        (AgentRun, 1),
    ):
        rows: Any = model._default_manager
        assert rows.for_user(pair.us).count() == count
        assert rows.for_user(None).count() == 0
        assert rows.for_user(AnonymousUser()).count() == 0
        assert not set(rows.for_user(pair.us)) & set(rows.for_user(pair.them))


def finds_own(pair: Pair, name: str) -> None:
    with pytest.raises(SessionDoesNotExist):
        async_to_sync(Conversation.find)("ours-id", user=pair.them)


def records_its_session(pair: Pair, name: str) -> None:
    runs = AgentRun.objects.filter(session=pair.ours)
    before = list(runs.values())
    agent = Agent(name="a", model=ScriptedModel([[assistant_message("hello")]]))
    hooks = agent_sessions.SessionHooks(get_session("ours-id", user=pair.them))
    with pytest.raises(SessionDoesNotExist):
        async_to_sync(Runner.run)(agent, "Hi", hooks=hooks)
    assert list(runs.values()) == before


def tells_no_contents(pair: Pair, name: str) -> None:
    told: list[dict[str, Any]] = []

    def hear(**arguments: Any) -> None:
        told.append(arguments)

    session_cleared.connect(hear)
    try:
        with TestCase.captureOnCommitCallbacks(execute=True):
            get_session("ours-id", user=pair.us).sync.clear_session()
    finally:
        session_cleared.disconnect(hear)
    (about,) = told
    assert (about["session_id"], about["user_id"]) == ("ours-id", pair.us.pk)
    assert not said("ours", str(about))


PYTHON: dict[str, Callable[[Pair, str], None]] = {
    "get_session": open_for_others,
    "BackendSession": has_the_owner_in_its_key,
    "DjangoSession": open_for_others,
    "RedisSession": knows_no_owner,
    "DaprSession": knows_no_owner,
    "OpenAIConversationsSession": knows_no_owner,
    "EncryptedSession": needs_the_key,
    "EncryptSession": needs_the_key,
    "SessionHooks": records_its_session,
    "sessions": keys_have_owners,
    "for_user": finds_own_rows,
    "Conversation.find": finds_own,
    "session_cleared": tells_no_contents,
}


def test_each_name_of_the_package_is_in_the_table_and_is_tried() -> None:
    names = set(agent_sessions.__all__) - {"__version__"}
    others = {"for_user", "Conversation.find", "session_cleared"}
    assert names | others == set(PYTHON)
    assert set(tables("Python")) == set(PYTHON)


@pytest.mark.parametrize("name", PYTHON)
def test_code_that_acts_for_another_user_finds_nothing(pair: Pair, name: str) -> None:
    PYTHON[name](pair, name)


# -- what processes keep ---------------------------------------------------------------


def limits(pair: Pair, settings: Any) -> None:
    keys: list[str] = []

    def remember(key: str, prefix: str, version: int) -> str:
        keys.append(key)
        return key

    kind = "django.core.cache.backends.locmem.LocMemCache"
    own = {"BACKEND": kind, "LOCATION": "doors", "KEY_FUNCTION": remember}
    settings.CACHES = {"default": own}
    for _ in range(3):
        assert RateLimit("runs", 3).take("us-name")
    taken = set(keys)
    form = r"agent_sessions:rate:[0-9a-f]{32}:\d+:(taken|\d+)"
    assert all(re.fullmatch(form, key) for key in taken)
    keys.clear()
    assert RateLimit("runs", 3).take("them-name")
    assert not taken & set(keys)
    found = Rates()
    assert found.take((pair.us.pk, "sync"), 1)
    assert not found.take((pair.us.pk, "sync"), 1)
    assert found.take((pair.them.pk, "sync"), 1)


def managed(pair: Pair, settings: Any) -> None:
    async def look() -> None:
        ours = await Conversation.find("ours-id", user=pair.us)
        key = SessionKey("ours-id", pair.them.pk)
        given_away = Conversation(ours.pk, ours.backend, key)
        manager = get_run_manager()
        manager.subscribe(ours, Subscription())
        assert manager.listeners(ours) == 1
        assert manager.listeners(given_away) == 0
        assert manager.active(given_away) is None

    async_to_sync(look)()


def named(pair: Pair, settings: Any) -> None:
    assert socket.gethostname() not in this_process()


def recorded(pair: Pair, settings: Any) -> None:
    contexts = [RunContextWrapper(None) for _ in range(2)]
    usage.remember(contexts[0], "run-1")
    assert list(map(usage.recorded_as, contexts)) == ["run-1", None]


def remembered(pair: Pair, settings: Any) -> None:
    memory = Memory(1_000_000)
    key_id, name = "k" * 16, "e" * 24
    envelope = {"__enc__": 1, "v": 2, "kid": key_id, "id": name, "payload": "p"}
    memory.keep(b"ours", envelope, b"ours-question", 1)
    assert memory.find(b"theirs", envelope, {key_id}) is None
    assert memory.find(b"ours", envelope, set()) is None
    for changed in ({"payload": "q"}, {"kid": "m" * 16}, {"v": 1}, {"id": "f" * 24}):
        assert memory.find(b"ours", envelope | changed, {key_id}) is None
    found = memory.find(b"ours", envelope, {key_id})
    assert found
    assert found.text == b"ours-question"
    assert "question" not in repr(memory)
    memory.close()


def sourced(pair: Pair, settings: Any) -> None:
    backend: Any = sessions["private"]
    (key,) = settings.AGENT_SESSIONS["private"]["OPTIONS"]["keys"]
    assert key not in repr((backend, backend.source, backend.source.get()))


def names_differ(pair: Pair, settings: Any) -> None:
    names = [
        set(Names("agents:session", "ours-id", alias, user).keys)
        for alias in ("default", "other")
        for user in (pair.us.pk, pair.them.pk)
    ]
    assert len(set().union(*names)) == 4 * 5


def texts_say_nothing(pair: Pair, settings: Any) -> None:
    """Look into what functions of a module remember, after sessions were used."""
    get_session("ours-id", user=pair.us).sync.get_items()
    for name in PLAIN:
        module = importlib.import_module(
            f"agent_sessions.{name[:-3].replace('/', '.')}"
        )
        for value in vars(module).values():
            if hasattr(value, "cache_info"):
                kept = str(gc.get_referents(value))
                assert "ours" not in kept, name


PLAIN = [
    "backends/sdk/opening.py",
    "backends/database/transport/postgresql.py",
    "backends/database/sql/sqlite.py",
    "concurrency/loops.py",
    "backends/dapr/sidecar.py",
    "memory/redis.py",
    "backends/openai/client.py",
    "backends/database/transport/sqlite.py",
]
KEPT: dict[str, Callable[[Pair, Any], None]] = {
    "ratelimit.py": limits,
    "runs/manager.py": managed,
    "backends/leases.py": named,
    "usage.py": recorded,
    "encryption/cache.py": remembered,
    "backends/encrypted/keys.py": sourced,
    "backends/redis/scripts.py": names_differ,
    **dict.fromkeys(PLAIN, texts_say_nothing),
}


def test_each_module_that_keeps_something_is_in_the_table() -> None:
    caches = re.compile(
        r"^@(?:functools\.)?(?:lru_)?cache\b|\bcaches\[self|"
        r"(?:OrderedDict|Weak\w+(?:Dictionary|Set))(?:\[.*\])? ?(?:\(\)|\[|$)",
        re.MULTILINE,
    )
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if caches.search(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 10
    assert found <= set(KEPT)
    assert set(tables("What processes keep")) == set(KEPT)


@pytest.mark.parametrize("check", sorted(set(KEPT.values()), key=str))
def test_what_is_kept_is_found_by_its_owner_alone(
    pair: Pair, settings: Any, check: Callable[[Pair, Any], None]
) -> None:
    check(pair, settings)
