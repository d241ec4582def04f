"""Passwords in the settings: told where they are misread, and never quoted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.checks import CheckMessage, Error
from django.test import override_settings

from agent_sessions import DjangoSession, EncryptedSession, RedisSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.backends.options import has_password, is_misread
from agent_sessions.backends.redis import RedisBackend
from agent_sessions.backends.redis.clients import Endpoint
from agent_sessions.backends.sdk import SDKBackend
from agent_sessions.backends.wrapping import innermost
from agent_sessions.checks import (
    check_backends,
    check_layers,
    check_shown_passwords,
)
from agent_sessions.exceptions import InvalidBackend, StorageError
from agent_sessions.handler import open_session
from tests.support.reported import SECRET, aerror_of, assert_discreet, error_of

pytestmark = pytest.mark.one_database

BACKENDS = "agent_sessions.backends"
ODD = ["#", "/", "?", "@", "[", "]", " ", "%zz", "%", "é", "\n", "^", "{", '"', "\\"]
PASSWORDS = [f"{SECRET}{odd}rest" for odd in ODD] + [f"12{odd}{SECRET}" for odd in ODD]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("user", ["", "user"])
def test_odd_characters_in_a_password_are_seen(user: str, password: str) -> None:
    assert is_misread(f"redis://{user}:{password}@host:6379/0")
    assert is_misread(f"postgresql+asyncpg://{user}:{password}@host/name")


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://localhost",
        "redis://:pass@host:6379/1?db=3&client_name=a@b",
        "redis://user:p%40%23%5B%20@[::1]:6379",
        "redis://:a!$&'()*+,;=-._~:b@host",
        "unix:///run/redis.sock?db=1",
        "unix://:pass@/run/redis.sock",
        "mongodb://u:p@one:27017,two:27017/db",
        "sqlite+aiosqlite:////srv/a@b/chat.db",
        "https://api.openai.com/v1",
        "dns://127.0.0.1:50001",
    ],
)
def test_what_is_read_as_it_is_meant_is_fine(url: str) -> None:
    assert not is_misread(url)


def test_a_password_is_seen() -> None:
    assert has_password("redis://:x@host")
    assert has_password("redis://u:x@host")
    assert not has_password("redis://u@host")
    assert not has_password("redis://host:6379/0?a=b:c@d")


def redis_url(url: str) -> dict[str, Any]:
    return {"BACKEND": f"{BACKENDS}.redis.RedisBackend", "OPTIONS": {"url": url}}


def sdk_url(url: str) -> dict[str, Any]:
    target = "agents.extensions.memory.SQLAlchemySession.from_url"
    return {
        "BACKEND": f"{BACKENDS}.sdk.SDKBackend",
        "OPTIONS": {"session": target, "url": url},
    }


def openai_url(url: str) -> dict[str, Any]:
    return {
        "BACKEND": f"{BACKENDS}.openai.OpenAIConversationsBackend",
        "OPTIONS": {"api_key": "k", "base_url": url},
    }


def dapr_address(address: str) -> dict[str, Any]:
    return {
        "BACKEND": f"{BACKENDS}.dapr.DaprBackend",
        "OPTIONS": {"store_name": "s", "address": address},
    }


def assert_told(messages: list[CheckMessage], id: str) -> None:
    """Assert that one error says what to do, and quotes nothing."""
    (message,) = messages
    assert (message.id, type(message)) == (id, Error)
    assert "Percent-encode" in str(message.hint)
    assert SECRET not in repr(message) + str(message)


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    ("make", "scheme", "id"),
    [
        (redis_url, "redis", "agent_sessions.E021"),
        (sdk_url, "postgresql+asyncpg", "agent_sessions.E020"),
        (openai_url, "https", "agent_sessions.E018"),
        (dapr_address, "https", "agent_sessions.E017"),
    ],
)
def test_check_tells_a_misread_address(
    make: Any, scheme: str, id: str, password: str
) -> None:
    alias = make(f"{scheme}://user:{password}@host:1/0")
    with override_settings(AGENT_SESSIONS={"default": alias}):
        assert_told(check_backends(), id)


@pytest.mark.parametrize("sentinels", [None, [("127.0.0.1", 26379)]])
@pytest.mark.parametrize("password", PASSWORDS)
def test_check_tells_a_misread_cache(password: str, sentinels: Any) -> None:
    cache = {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": [f"redis://:{password}@host:6379/0"],
        "OPTIONS": {"SENTINELS": sentinels} if sentinels else {},
    }
    backend = {"BACKEND": f"{BACKENDS}.redis.RedisBackend"}
    with override_settings(
        CACHES={"default": cache}, AGENT_SESSIONS={"default": backend}
    ):
        assert_told(check_backends(), "agent_sessions.E021")


def test_check_tells_sentinels_that_are_none() -> None:
    cache = {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": "redis://service/0",
        "OPTIONS": {"SENTINELS": [f"redis://:{SECRET}@host"]},
    }
    backend = {"BACKEND": f"{BACKENDS}.redis.RedisBackend"}
    with override_settings(
        CACHES={"default": cache}, AGENT_SESSIONS={"default": backend}
    ):
        (message,) = check_backends()
    assert message.id == "agent_sessions.E021"
    assert SECRET not in str(message)


@pytest.mark.parametrize("password", PASSWORDS)
def test_check_tells_a_misread_channel_layer(password: str) -> None:
    address = f"redis://:{password}@host:6379/0"
    for hosts in ([address], [{"address": address}]):
        layer = {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {"hosts": hosts},
        }
        with override_settings(CHANNEL_LAYERS={"default": layer}):
            assert_told(check_layers(), "agent_sessions.E030")
    with override_settings(CHANNEL_LAYERS={"default": {"BACKEND": "x"}}):
        assert check_layers() == []


def address(number: int) -> str:
    return f"redis://user:{PASSWORDS[number]}@host:6379/0"


@pytest.mark.parametrize("number", range(len(PASSWORDS)))
def test_a_misread_address_is_refused_without_being_shown(number: int) -> None:
    error = error_of(lambda: RedisSession.from_url("s", address(number)))
    assert isinstance(error, InvalidBackend)
    assert_discreet(error, address(number))


def test_options_that_redis_refuses_are_not_shown() -> None:
    session = RedisSession.from_url("s", f"redis://:{SECRET}@127.0.0.1:1/0?db={SECRET}")
    for error in (
        error_of(lambda: session.sync.get_items()),
        asyncio.run(aerror_of(session.get_items)),
    ):
        assert isinstance(error, InvalidBackend)
        assert_discreet(error)


@pytest.mark.parametrize("password", PASSWORDS[:4])
async def test_an_engine_that_cannot_be_made_is_not_shown(password: str) -> None:
    options = sdk_url(f"postgresql+asyncpg://u:{password}@host/db")["OPTIONS"]
    backend = SDKBackend("sdk", options, listed=False)
    session = open_session(backend, SessionKey("s"))
    error = await aerror_of(session.get_items)
    assert isinstance(error, StorageError)
    assert_discreet(error)


def test_a_token_that_cannot_be_sent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPR_API_TOKEN", f"{SECRET} é")
    backend = DaprBackend("dapr", {"store_name": "s"}, listed=False)
    (message,) = backend.check()
    assert message.id == "agent_sessions.E017"
    assert SECRET not in str(message)


# -- what reports list -----------------------------------------------------------------


def test_passwords_that_reports_list_are_told() -> None:
    address = f"redis://:{SECRET}@host:6379/0"
    cache = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": address}
    aliases = {
        "default": {"BACKEND": f"{BACKENDS}.database.DatabaseBackend"},
        "redis": redis_url(address),
        "cached": {"BACKEND": f"{BACKENDS}.redis.RedisBackend"},
        "sdk": sdk_url(f"postgresql+asyncpg://u:{SECRET}@host/db"),
    }
    layers = {"default": {"CONFIG": {"hosts": [address]}}}
    with override_settings(
        AGENT_SESSIONS=aliases, CACHES={"default": cache}, CHANNEL_LAYERS=layers
    ):
        messages = check_shown_passwords()
    assert {message.id for message in messages} == {"agent_sessions.W030"}
    assert sorted({str(message.msg).partition(" ")[0] for message in messages}) == [
        "AGENT_SESSIONS['redis']['OPTIONS']['url']",
        "AGENT_SESSIONS['sdk']['OPTIONS']['url']",
        "CACHES['default']['LOCATION']",
        "CHANNEL_LAYERS['default']['CONFIG']['hosts'][0]",
    ]
    assert SECRET not in str(messages)


def test_passwords_under_names_that_are_hidden_are_fine() -> None:
    redis = redis_url("redis://host:6379/0")
    redis["OPTIONS"]["client_options"] = {"password": SECRET}
    layers = {
        "default": {
            "CONFIG": {"hosts": [{"address": "redis://host", "password": SECRET}]}
        }
    }
    encrypted = {
        "BACKEND": f"{BACKENDS}.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "default", "keys": [f"https://u:{SECRET}@key"]},
    }
    aliases = {"default": redis, "private": encrypted}
    with override_settings(AGENT_SESSIONS=aliases, CHANNEL_LAYERS=layers, CACHES={}):
        assert check_shown_passwords() == []


# -- what objects tell of themselves ---------------------------------------------------


def ours(found: list[Any]) -> list[Any]:
    """Return what is reached from objects and is of a class of this package."""
    seen: dict[int, Any] = {}
    while found:
        each = found.pop()
        if id(each) in seen:
            continue
        if isinstance(each, dict):
            found += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            found += each
        elif type(each).__module__.partition(".")[0] == "agent_sessions":
            seen[id(each)] = each
            found += getattr(each, "__dict__", {}).values()
            slots = getattr(type(each), "__slots__", ())
            found += [getattr(each, slot) for slot in slots if hasattr(each, slot)]
    return list(seen.values())


def made_with_secrets() -> list[Any]:
    address = f"redis://:{SECRET}@host:6379/0"
    openai = openai_url("https://host")["OPTIONS"] | {"api_key": SECRET}
    aliases = {
        "default": redis_url(address),
        "openai": openai_url("https://host") | {"OPTIONS": openai},
        "sdk": sdk_url(f"postgresql+asyncpg://u:{SECRET}@host/db"),
        "private": {
            "BACKEND": f"{BACKENDS}.encrypted.EncryptedBackend",
            "OPTIONS": {"backend": "default", "keys": [SECRET]},
        },
    }
    with override_settings(AGENT_SESSIONS=aliases):
        backends = [sessions[alias] for alias in aliases]
        return [
            sessions,
            *backends,
            *(open_session(backend, SessionKey("s")) for backend in backends),
            innermost(sessions["private"]),
            sessions["private"].source.get(),  # type: ignore[attr-defined]
            RedisBackend("r", {"url": address}).endpoint,
            Endpoint(address, {"password": SECRET}, make=lambda secret=SECRET: secret),  # type: ignore[misc]
            EncryptedSession(DjangoSession("s"), SECRET),
            RedisSession.from_url("s", address, redis_kwargs={"password": SECRET}),
        ]


def test_no_object_tells_a_secret_of_itself() -> None:
    found = ours(made_with_secrets())
    assert len({type(each) for each in found}) > 15
    for each in found:
        assert SECRET not in repr(each), type(each)
        assert SECRET not in str(each), type(each)


async def test_no_client_tells_a_secret_of_itself() -> None:
    place = RedisBackend("r", {"url": f"redis://:{SECRET}@host:6379/0"}).endpoint
    client = await place.connect()
    assert SECRET not in repr(client)
    await client.aclose()
