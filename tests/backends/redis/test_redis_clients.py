"""How Redis is reached: aliases of django-redis, URLs, and what the checks say."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import redis
from agents import Agent
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.core.cache import caches
from django.test import override_settings
from redis.asyncio import Redis as AsyncRedis

from agent_sessions import RedisSession, get_session, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.redis import RedisBackend
from agent_sessions.checks import check_backends
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.handler import open_session
from agent_sessions.runs.setup import create_conversation
from tests.servers import Server
from tests.servers.process import HOST
from tests.servers.redis import PASSWORD, SERVICE, Watched, url
from tests.servers.redis import redis as run_redis
from tests.support.chat import Socket, make_user, text_of

pytestmark = pytest.mark.one_database

BACKEND = "agent_sessions.backends.redis.RedisBackend"
MESSAGES: list[Any] = [{"role": "user", "content": f"item {n}"} for n in range(3)]


def alias(location: Any, **options: Any) -> dict[str, Any]:
    """Return an alias of CACHES."""
    return {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": location,
        "OPTIONS": options,
    }


async def works(cache: dict[str, Any], session_id: str = "") -> None:
    """Write and read through an alias, beside django-redis itself."""
    with override_settings(CACHES={"default": cache}):
        session = RedisSession.from_cache(session_id or uuid.uuid4().hex)
        await session.add_items(MESSAGES)
        assert await session.get_items() == MESSAGES
        key = session.backend.names(session.key).items  # type: ignore[attr-defined]
        # The same server and database, as django-redis sees it.
        client = caches["default"].client.get_client()  # type: ignore[attr-defined]
        assert await sync_to_async(client.llen)(key) == 3
        await sync_to_async(client.connection_pool.disconnect)()
        await session.close()


# --- aliases of django-redis ---------------------------------------------------------


async def test_a_plain_alias(redis_server: Server) -> None:
    await works(alias(url(redis_server, 5)))


async def test_the_first_of_several_servers_is_the_primary(
    redis_server: Server,
) -> None:
    primary, replica = url(redis_server, 5), url(redis_server, 6)
    await works(alias([primary, replica]))
    await works(alias(f"{primary},{replica}"))


async def test_a_unix_socket(tmp_path: Path) -> None:
    # The path of a socket may have 107 characters.
    place = Path("/tmp") / f"{uuid.uuid4().hex}.sock"  # noqa: S108
    with run_redis("redis", "--unixsocket", str(place)):
        await works(alias(f"unix://{place}?db=2"))


async def test_passwords_and_users() -> None:
    with run_redis("redis", "--requirepass", PASSWORD) as server:
        plain, secret = url(server), f"redis://:{PASSWORD}@{HOST}:{server.port}/0"
        with redis.Redis(port=server.port, password=PASSWORD) as link:
            rights = {"keys": ["*"], "categories": ["+@all"]}
            link.acl_setuser("anna", enabled=True, passwords=["+annas"], **rights)
        await works(alias(secret))
        await works(alias(plain, PASSWORD=PASSWORD))
        await works(alias(plain, CONNECTION_POOL_KWARGS={"password": PASSWORD}))
        await works(alias(plain, USERNAME="anna", PASSWORD="annas"))
        # What the URL says wins.
        await works(alias(secret, PASSWORD="other"))


async def test_options_of_the_connection_are_taken(redis_server: Server) -> None:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    name = uuid.uuid4().hex
    cache = alias(
        url(redis_server),
        SOCKET_TIMEOUT=7,
        SOCKET_CONNECT_TIMEOUT=3,
        PARSER_CLASS="redis._parsers._RESP2Parser",
        CONNECTION_POOL_KWARGS={
            "max_connections": 2,
            "client_name": name,
            # A synchronous one, of no use here.
            "retry": Retry(NoBackoff(), 1),
        },
    )
    with override_settings(CACHES={"default": cache}):
        session = RedisSession.from_cache("many")
        jobs = [session.add_items(MESSAGES) for _ in range(20)]
        await asyncio.gather(*jobs)
        client: Any = await session.backend.client()  # type: ignore[attr-defined]
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (7, 3)
        with redis.Redis(port=redis_server.port) as link:
            found = [other["name"] for other in link.client_list()]
        # Twenty at once waited for two connections.
        assert found.count(name) == 2
        await session.clear_session()
        await session.close()


async def test_sentinels_of_which_one_is_gone(
    valkey_sentinel: Watched,
) -> None:
    cache = alias(
        f"redis://{SERVICE}/4",
        CLIENT_CLASS="django_redis.client.SentinelClient",
        CONNECTION_FACTORY="django_redis.pool.SentinelConnectionFactory",
        SENTINELS=[("127.0.0.1", 1), *valkey_sentinel.sentinels],
        SENTINEL_KWARGS={"socket_timeout": 5},
    )
    await works(cache)
    with redis.Redis(port=valkey_sentinel.primary(), db=4) as link:
        assert link.dbsize() > 0


async def test_the_caches_own_prefix_comes_first(redis_server: Server) -> None:
    """Sites that share a server keep apart, as their cache keys do."""
    cache = {**alias(url(redis_server)), "KEY_PREFIX": "site", "VERSION": 2}
    with override_settings(CACHES={"default": cache}):
        backend: Any = RedisSession.from_cache("x").backend
        assert backend.key_prefix == "site:2:agents:session"
        backend = RedisSession.from_cache("x", key_prefix="agents:session").backend
        assert backend.key_prefix == "agents:session"
    with override_settings(CACHES={"default": {**cache, "KEY_PREFIX": ""}}):
        backend = RedisSession.from_cache("x").backend
        assert backend.key_prefix == ":2:agents:session"


async def test_a_cache_that_is_another_one_now(redis_server: Server) -> None:
    """As between two tests: the client of the former server is not used again."""
    session_id = uuid.uuid4().hex
    for database in (1, 2):
        cache = alias(url(redis_server, database))
        with override_settings(CACHES={"default": cache}):
            session = RedisSession.from_cache(session_id)
            assert await session.get_items() == []
            await session.add_items(MESSAGES)
            await session.close()


def test_a_url_that_is_not_set_means_no_cache(redis_server: Server) -> None:
    """`os.environ.get("REDIS_URL")` must not end at another server."""
    unset: Any = None
    with (
        override_settings(CACHES={"default": alias(url(redis_server))}),
        pytest.raises(InvalidBackend, match="is no URL of a Redis server"),
    ):
        RedisSession.from_url("x", unset)


def by_tenant(key: str, prefix: str, version: int) -> str:
    """Name a cache's key as a project does whose tenants share a server."""
    return f"tenant:{prefix}:{version}:{key}"


def test_an_alias_whose_keys_a_function_names_is_refused() -> None:
    """Else one tenant would read what another one said."""
    default = "django.core.cache.backends.base.default_key_func"
    for function in (by_tenant, f"{__name__}.by_tenant"):
        cache = {**PLAIN, "KEY_FUNCTION": function}
        with override_settings(CACHES={"default": cache}):
            with pytest.raises(InvalidBackend, match="KEY_FUNCTION") as caught:
                _ = RedisSession.from_cache("x").backend.key_prefix  # type: ignore[attr-defined]
            assert caught.value.id == "agent_sessions.E021"
            # Whoever names a prefix has decided.
            RedisSession.from_cache("x", key_prefix="mine")
            setting = {"default": {"BACKEND": BACKEND}}
            with override_settings(AGENT_SESSIONS=setting):
                [found] = check_backends()
            assert (found.id, "KEY_FUNCTION" in found.msg) == (
                "agent_sessions.E021",
                True,
            )
    with override_settings(CACHES={"default": {**PLAIN, "KEY_FUNCTION": default}}):
        backend: Any = RedisSession.from_cache("x").backend
        assert backend.key_prefix == "agents:session"


def test_a_function_may_make_the_client(redis_server: Server) -> None:
    """One for each event loop, closed with it."""
    made: list[Any] = []

    def make() -> Any:
        made.append(AsyncRedis.from_url(url(redis_server)))
        return made[-1]

    backend = RedisBackend("x", {"client": make}, listed=False)
    session: Any = open_session(backend, SessionKey(uuid.uuid4().hex))

    async def use() -> None:
        await session.add_items(MESSAGES[:1])
        await session.add_items(MESSAGES[:1])

    asyncio.run(use())
    asyncio.run(use())
    assert len(made) == 2
    assert all(not pool._in_use_connections for pool in _pools(made))
    assert not any(c.is_connected for pool in _pools(made) for c in _idle(pool))


def _pools(made: list[Any]) -> list[Any]:
    return [client.connection_pool for client in made]


def _idle(pool: Any) -> list[Any]:
    return list(pool._available_connections)


# --- TLS -----------------------------------------------------------------------------


@asynccontextmanager
async def secured(server: Server, directory: Path) -> AsyncIterator[tuple[int, Path]]:
    """Offer a server through TLS; its builds from pip have none. Port, certificate."""
    certificate, key = _certificate(directory)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    serving: set[asyncio.Task[Any]] = set()

    async def serve(reader: Any, writer: Any) -> None:
        task: Any = asyncio.current_task()
        serving.add(task)
        back, forth = await asyncio.open_connection(server.host, server.port)
        pumps = {
            asyncio.create_task(_pump(reader, forth)),
            asyncio.create_task(_pump(back, writer)),
        }
        await asyncio.wait(pumps)

    listener = await asyncio.start_server(serve, HOST, 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1], certificate
    finally:
        listener.close()
        if serving:
            await asyncio.wait(serving)


async def _pump(source: Any, target: Any) -> None:
    with suppress(ConnectionError, ssl.SSLError):
        while text := await source.read(65_536):
            target.write(text)
    target.close()
    with suppress(ConnectionError, ssl.SSLError):
        await target.wait_closed()


def _certificate(directory: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(HOST))]), False
        )
        .sign(key, hashes.SHA256())
    )
    certificate, secret = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate, secret


async def test_tls(redis_server: Server, tmp_path: Path) -> None:
    async with secured(redis_server, tmp_path) as (port, certificate):
        trusted = {"ssl_ca_certs": str(certificate)}
        cache = alias(f"rediss://{HOST}:{port}/0", CONNECTION_POOL_KWARGS=trusted)
        await works(cache)
        session = RedisSession.from_url(uuid.uuid4().hex, f"rediss://{HOST}:{port}/0")
        # A certificate that nobody vouches for.
        assert not await session.ping()


# --- checks --------------------------------------------------------------------------

PLAIN = alias("redis://127.0.0.1:6379/0")
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown_cache": ({"cache": "defalt"}, "doesn't have", "'default'"),
    "other_cache": ({"cache": "memory"}, "not served by django-redis", "url"),
    "cache_without_location": ({"cache": "nowhere"}, "no LOCATION", "redis://"),
    "both": ({"cache": "default", "url": "redis://h"}, "both given", "Keep one"),
    "no_url": ({"url": "http://h"}, "no URL of a Redis", "rediss://"),
    "url_of_a_kind": ({"url": 7}, "no URL of a Redis", "redis://"),
    "cluster_by_socket": ({"url": "unix:///x", "cluster": True}, "no URL", "redis://"),
    "cluster_of_a_cache": ({"cluster": True}, "needs a url", "instead of cache"),
    "ttl_of_nothing": ({"ttl": 0}, "ttl", "more than 0"),
    "negative_ttl": ({"ttl": timedelta(-1)}, "ttl", "more than 0"),
    "endless_ttl": ({"ttl": 1e300}, "ttl", "100 years"),
    "ttl_as_text": ({"ttl": "30 moons"}, "ttl", "timedelta"),
    "client": ({"client": 7}, "is a int", "redis.asyncio"),
    "client_and_cache": ({"client": dict, "cache": "default"}, "both", "Keep one"),
    "ttl_as_truth": ({"ttl": True}, "ttl", "timedelta"),
    "max_items": ({"max_items": 0}, "max_items", "1 or more"),
    "max_items_as_truth": ({"max_items": True}, "max_items", "1 or more"),
}


@pytest.mark.parametrize(("options", "message", "hint"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_an_error_with_a_hint(
    options: dict[str, Any], message: str, hint: str
) -> None:
    memory = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
    known = {"default": PLAIN, "memory": memory, "nowhere": alias("")}
    setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
    with override_settings(CACHES=known, AGENT_SESSIONS=setting):
        [found] = check_backends()
    assert found.id == "agent_sessions.E021"
    assert message in found.msg
    assert hint in str(found.hint)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": "default", "ttl": timedelta(days=30), "sliding": False},
        {"url": "rediss://user:secret@redis:6380/1", "ttl": 3600, "max_items": 500},
        {"url": "unix:///run/redis.sock", "ttl": "30d"},
        {"client": dict},
        {"url": "redis://node", "cluster": True},
    ],
)
def test_good_options_pass_the_checks(options: dict[str, Any]) -> None:
    setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
    with override_settings(CACHES={"default": PLAIN}, AGENT_SESSIONS=setting):
        assert check_backends() == []


def test_aliases_that_share_their_keys_are_warned_of() -> None:
    setting = {
        "default": {"BACKEND": BACKEND},
        "second": {"BACKEND": BACKEND, "OPTIONS": {"ttl": 60}},
        "third": {"BACKEND": BACKEND, "OPTIONS": {"key_prefix": "third"}},
    }
    with override_settings(CACHES={"default": PLAIN}, AGENT_SESSIONS=setting):
        [found] = check_backends()
    assert found.id == "agent_sessions.W007"
    assert "['default'] and ['second']" in found.msg


async def test_an_option_that_the_client_does_not_take_is_told() -> None:
    session = RedisSession.from_url("x", "redis://h", redis_kwargs={"colour": "red"})
    with pytest.raises(InvalidBackend, match="can't be made") as caught:
        await session.get_items()
    assert caught.value.id == "agent_sessions.E021"


def test_a_mistake_is_told_where_the_session_is_opened() -> None:
    with pytest.raises(InvalidBackend, match="no URL"):
        RedisSession.from_url("x", "localhost:6379")
    with pytest.raises(InvalidBackend, match="unknown OPTIONS: tll"):
        RedisSession.from_url("x", "redis://localhost", tll=4)


def test_the_checks_import_no_client_and_no_sdk() -> None:
    code = (
        "import sys, django\n"
        "from django.conf import settings\n"
        "settings.AGENT_SESSIONS = {'default': {'BACKEND': "
        f"{BACKEND!r}, 'OPTIONS': {{'url': 'redis://h'}}}}}}\n"
        "django.setup()\n"
        "from agent_sessions.checks import check_backends\n"
        "assert check_backends() == []\n"
        "heavy = {'redis', 'django_redis', 'agents'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_missing_extra_is_named() -> None:
    """In a process that can't find redis, as if it were not installed."""
    code = (
        "import sys, django\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'redis':\n"
        "            raise ModuleNotFoundError(name)\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = (\n"
        "    lambda name, *rest: None if name == 'redis' else real(name, *rest))\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from django.conf import settings\n"
        f"settings.AGENT_SESSIONS = {{'default': {{'BACKEND': {BACKEND!r}}}}}\n"
        "django.setup()\n"
        "from agent_sessions.checks import check_backends\n"
        "[found] = check_backends()\n"
        "print(found.id, found.msg)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("agent_sessions.E006")
    assert 'pip install "django-agent-sessions[redis]"' in done.stdout


# --- a chat --------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
async def test_a_chat_over_a_websocket(redis_cluster: list[Server]) -> None:
    """The consumer's runs, with their lease, write to the store and read from it."""
    options = {"url": url(redis_cluster[0]), "cluster": True, "ttl": 600}
    setting = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
    with override_settings(AGENT_SESSIONS=setting):
        user = await sync_to_async(make_user)()
        row = await sync_to_async(create_conversation)(user)
        steps = [[assistant_message("Hello.")], [assistant_message("Goodbye.")]]
        agent: Agent[Any] = Agent(name="speaker", model=ScriptedModel(steps))
        async with Socket(row.session_id, user, agent) as tab:
            await tab.say("r1", "Hi")
            assert text_of(await tab.to_end()) == "Hello."
            await tab.say("r2", "Bye")
            assert text_of(await tab.to_end()) == "Goodbye."
        session = get_session(row.session_id, user=user)
        items: Any = await session.get_items()
        await row.arefresh_from_db()
        backend: Any = sessions["default"]
        assert isinstance(backend, RedisBackend)
        client: Any = await backend.client()
        name = backend.names(session.key)
        assert await client.hget(name.keys[1], "fence") == str(row.fence).encode()
        assert f"-of:default:{user.pk}:" in name.items.decode()
    assert [item["role"] for item in items] == ["user", "assistant"] * 2
    assert (row.user_id, row.title) == (user.pk, "Hi")


# --- the page of the docs ------------------------------------------------------------


def test_the_docs_tell_every_option() -> None:
    page = (Path(__file__).parents[3] / "docs" / "redis.md").read_text()
    rows = page.partition("| option |")[2].partition("\n\n")[0].splitlines()[2:]
    told = {
        row.split("|")[1].strip(" `"): row.split("|")[2].strip(" `") for row in rows
    }
    assert told.keys() == RedisBackend.option_defaults.keys()
    different = {"cache": '"default"'}  # None there, so that a url can be told apart
    assert told == {
        name: different.get(name, repr(value))
        for name, value in RedisBackend.option_defaults.items()
    }
