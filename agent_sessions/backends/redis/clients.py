"""Asyncio clients, made from a URL or from what a CACHES alias says.

django-redis is synchronous, so its alias is read and its client built again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from django.utils.module_loading import import_string

from agent_sessions.backends.options import ENCODE, did_you_mean_alias, is_misread
from agent_sessions.exceptions import InvalidBackend, MissingExtra

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.retry import Retry

CHECK_ID = "agent_sessions.E021"
# About 0.6 s: a server that is being replaced is waited for, a dead one is told.
RETRIES = 6
_DEFAULT_KEYS = "django.core.cache.backends.base.default_key_func"
_DJANGO_REDIS = "django_redis.cache.RedisCache"
# Parts of a synchronous client; the asyncio one has its own.
_SYNC_ONLY = frozenset({"retry", "parser_class", "connection_class", "queue_class"})


def _invalid(message: str, hint: str) -> InvalidBackend:
    return InvalidBackend(message, hint=hint, id=CHECK_ID)


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and how to get there; secrets stay out of its repr."""

    url: str = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    cluster: bool = False
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_options: dict[str, Any] | None = field(default=None, repr=False)
    make: Callable[[], Redis | RedisCluster] | None = field(default=None, repr=False)

    async def connect(self) -> Client:
        """Make a client in the running loop; only a cluster's nodes are asked for.

        Raises InvalidBackend where redis-py doesn't take the URL or the options.
        """
        try:
            if self.sentinels:
                return self._through_sentinels()
            client = self._made()
        except (TypeError, ValueError, AttributeError) as exc:
            raise _invalid(
                "The Redis client can't be made from these options "
                f"({type(exc).__name__}).",
                "Compare the URL and its options with those of redis-py.",
            ) from None
        # Here, where one task is: several that find a new client race in redis-py 8.
        if is_cluster(client):
            await client.initialize()
        return Client(client)

    def _made(self) -> Redis | RedisCluster:
        if self.make is not None:
            return self.make()
        return self._cluster() if self.cluster else self._single()

    def _single(self) -> Redis:
        from redis.asyncio import BlockingConnectionPool, Redis

        # Where all connections are in use, a caller waits for one.
        options = {"retry": _retry(), **self.options}
        pool = BlockingConnectionPool.from_url(self.url, **options)
        # Made to no use but to see whether it takes the options.
        pool.connection_class(**pool.connection_kwargs)
        return Redis.from_pool(pool)

    def _cluster(self) -> RedisCluster:
        from redis.asyncio import RedisCluster

        return RedisCluster.from_url(self.url, **self.options)

    def _through_sentinels(self) -> Client:
        from redis.asyncio.connection import parse_url
        from redis.asyncio.sentinel import (
            Sentinel,
            SentinelManagedConnection,
            SentinelManagedSSLConnection,
        )

        options = {"retry": _retry(), **self.options, **parse_url(self.url)}
        service, secure = options.pop("host", None), self.url.startswith("rediss")
        options.pop("port", None)
        options["connection_class"] = (
            SentinelManagedSSLConnection if secure else SentinelManagedConnection
        )
        manager = Sentinel(  # type: ignore[no-untyped-call]
            self.sentinels, sentinel_kwargs=self.sentinel_options, **options
        )
        if not service:
            raise ValueError("LOCATION lacks the name of the service.")
        return Client(manager.master_for(service), tuple(manager.sentinels))


@dataclass(frozen=True)
class Client:
    """A client that was made here, and the sentinels' to close with it."""

    redis: Redis | RedisCluster
    # A Sentinel that closes its clients itself came with redis-py 8.
    sentinels: Sequence[Redis] = ()

    async def aclose(self) -> None:
        """Close all connections, also where closing one of them fails."""
        async with AsyncExitStack() as stack:
            for client in (*self.sentinels, self.redis):
                stack.push_async_callback(client.aclose)


def given_client(client: Any) -> Redis | RedisCluster:
    """Return a client that the caller made. Raises InvalidBackend for anything else."""
    from redis.asyncio import Redis, RedisCluster

    if isinstance(client, Redis | RedisCluster):
        return client
    raise _invalid(
        f"The Redis client is a {type(client).__name__} of {type(client).__module__}.",
        "Give a client of redis.asyncio, or use a URL or a cache.",
    )


def is_cluster(client: Redis | RedisCluster) -> bool:
    from redis.asyncio import RedisCluster

    return isinstance(client, RedisCluster)


def _retry() -> Retry:
    from redis.asyncio.retry import Retry
    from redis.backoff import ExponentialWithJitterBackoff

    return Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.5), RETRIES)


def from_url(
    url: Any, options: dict[str, Any], *, cluster: bool = False, name: str = ""
) -> Endpoint:
    """Read a URL, the option's unless it has another name. Raises InvalidBackend."""
    name = name or "The option url"
    schemes = ("redis", "rediss") if cluster else ("redis", "rediss", "unix")
    if not isinstance(url, str) or url.partition("://")[0].lower() not in schemes:
        raise _invalid(
            f"{name} is no URL of a Redis server"
            + (" of a cluster." if cluster else "."),
            f"It begins with {' or '.join(f'{scheme}://' for scheme in schemes)}.",
        )
    if is_misread(url):
        raise _invalid(
            f"{name} has characters that are taken for something else.", ENCODE
        )
    return Endpoint(url, options, cluster)


def from_cache(alias: str, options: dict[str, Any]) -> Endpoint:
    """Read an alias of CACHES that django-redis serves.

    Raises InvalidBackend and MissingExtra.
    """
    from django.conf import settings

    caches = settings.CACHES
    if alias not in caches:
        raise _invalid(
            f"The option cache names {alias!r}, which CACHES doesn't have.",
            did_you_mean_alias(str(alias), caches)
            + f"CACHES has: {', '.join(sorted(caches)) or 'none'}.",
        )
    params = caches[alias]
    if not _is_django_redis(params.get("BACKEND")):
        raise _invalid(
            f"CACHES[{alias!r}] is not served by django-redis.",
            f"Its BACKEND must be {_DJANGO_REDIS!r}; or give the option url.",
        )
    # Lower case is what django-redis doesn't read.
    given = params.get("OPTIONS") or {}
    made = {**_connection_options(given), **options}
    # What the URL says wins, as with django-redis.
    url = _first(params.get("LOCATION"), alias)
    endpoint = from_url(url, made, name=f"The LOCATION of CACHES[{alias!r}]")
    if not given.get("SENTINELS"):
        return endpoint
    try:
        sentinels = tuple((str(host), int(port)) for host, port in given["SENTINELS"])
    except (TypeError, ValueError):
        raise _invalid(
            f"The SENTINELS of CACHES[{alias!r}] are no pairs of host and port.",
            'Write them as [("10.0.0.1", 26379)].',
        ) from None
    parts = urlsplit(url)
    # django-redis' own word: which of its two pools a URL is for.
    query = [(k, v) for k, v in parse_qsl(parts.query) if k != "is_master"]
    url = urlunsplit(parts._replace(query=urlencode(query)))
    return Endpoint(
        url, made, sentinels=sentinels, sentinel_options=given.get("SENTINEL_KWARGS")
    )


def cache_prefix(alias: str) -> str:
    """Return what the keys of a CACHES alias begin with, where it was told to differ.

    Raises InvalidBackend where only a function of the project's knows.
    """
    from django.conf import settings

    params = settings.CACHES[alias]
    if params.get("KEY_FUNCTION") not in {None, _DEFAULT_KEYS}:
        # It may tell tenants apart, by what the caller's thread knows.
        raise _invalid(
            f"CACHES[{alias!r}] names its keys by a KEY_FUNCTION, which sessions can't "
            "obey.",
            "Use another alias of CACHES or the option url, or give a key_prefix "
            "that holds for all of this alias's sessions.",
        )
    prefix, version = params.get("KEY_PREFIX") or "", params.get("VERSION") or 1
    if not prefix and version == 1:
        # As the SDK names them.
        return ""
    return f"{prefix}:{version}:"


def _is_django_redis(path: Any) -> bool:
    if find_spec("django_redis") is None:
        raise MissingExtra("RedisBackend's option cache", "redis")
    from django_redis.cache import RedisCache

    try:
        found = import_string(path) if isinstance(path, str) else path
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, RedisCache)


def _first(location: Any, alias: str) -> str:
    """Return the primary's URL: django-redis writes to the first one."""
    if isinstance(location, str):
        location = location.split(",")
    urls = [url for url in location or () if str(url).strip()]
    if not urls:
        raise _invalid(
            f"CACHES[{alias!r}] has no LOCATION.",
            'Set it to the server\'s URL, "redis://127.0.0.1:6379/1" for example.',
        )
    return str(urls[0]).strip()


def _connection_options(given: dict[str, Any]) -> dict[str, Any]:
    """Translate OPTIONS of django-redis into redis-py's."""
    options: dict[str, Any] = {
        name.lower(): given[name]
        for name in ("USERNAME", "PASSWORD", "SOCKET_TIMEOUT", "SOCKET_CONNECT_TIMEOUT")
        if given.get(name)
    }
    pool = given.get("CONNECTION_POOL_KWARGS") or {}
    options |= {name: value for name, value in pool.items() if name not in _SYNC_ONLY}
    return options
