"""Asyncio clients, made from a URL or from what a CACHES alias says, and their errors.

django-redis is synchronous, so its alias is read and its client built again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from django.utils.module_loading import import_string

from agent_sessions.backends.options import ENCODE, did_you_mean_alias, is_misread
from agent_sessions.backends.remote.base import (
    Advice,
    class_names,
    find_advice,
    translated,
)
from agent_sessions.exceptions import (
    InvalidBackend,
    LeaseLost,
    MissingExtra,
    StorageError,
    StoreFull,
    StoreReadOnly,
    StoreRefused,
    StoreUnavailable,
    WrongKeyType,
)

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
            client = self._from_url() if self.make is None else self.make()
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

    def _from_url(self) -> Redis | RedisCluster:
        from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster

        if self.cluster:
            return RedisCluster.from_url(self.url, **self.options)
        # Where all connections are in use, a caller waits for one.
        options = {"retry": _retry(), **self.options}
        pool = BlockingConnectionPool.from_url(self.url, **options)
        # Made to no use but to see whether it takes the options.
        pool.connection_class(**pool.connection_kwargs)
        return Redis.from_pool(pool)

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


# -- errors --------------------------------------------------------------------------

# The first word of what the server says -> the error, and what to do.
_WORDS: dict[str, Advice] = {
    "NOAUTH": (StoreRefused, "it wants a password. Set it in the URL or the cache."),
    "WRONGPASS": (StoreRefused, "it refuses the user or password. Check both."),
    "NOPERM": (
        StoreRefused,
        "its ACL refuses {what}. Allow the keys that begin with the alias's key_prefix, "
        "and the commands that docs/redis.md names; a client that may not say HELLO "
        "needs protocol=2 among its options.",
    ),
    "READONLY": (
        StoreReadOnly,
        "it is a replica and takes no writes. Connect to the primary, or through "
        "Sentinel, which finds it.",
    ),
    "OOM": (StoreFull, "its memory is full. Raise maxmemory, or clear sessions."),
    "MISCONF": (StoreFull, "it can't save to disk. Make room there."),
    "NOREPLICAS": (StoreUnavailable, "it has too few replicas to take writes."),
    "CLUSTERDOWN": (StoreUnavailable, "its cluster is down. Try again when it is up."),
    "MASTERDOWN": (StoreUnavailable, "its primary is down. Try again later."),
    "LOADING": (StoreUnavailable, "it is still loading its data. Try again."),
    "TRYAGAIN": (StoreUnavailable, "its cluster is moving the session. Try again."),
    "WRONGTYPE": (
        WrongKeyType,
        "a session's key holds something else, which was left alone. Choose another "
        "session id or key_prefix.",
    ),
}
# And the classes of redis-py that cut the server's word off.
_ADVICE = _WORDS | {
    "AuthorizationError": _WORDS["NOPERM"],
    "NoPermissionError": _WORDS["NOPERM"],
    "ReadOnlyError": _WORDS["READONLY"],
    "OutOfMemoryError": _WORDS["OOM"],
    "BusyLoadingError": _WORDS["LOADING"],
    "MasterDownError": _WORDS["MASTERDOWN"],
    "ClusterDownError": _WORDS["CLUSTERDOWN"],
    "TryAgainError": _WORDS["TRYAGAIN"],
}


def unanswered(alias: str, seconds: float) -> StoreUnavailable:
    return StoreUnavailable(
        f"Redis of {alias!r} didn't answer within {seconds} seconds. Check that it runs "
        "and can be reached; a write has arrived whole, or not at all."
    )


def named_errors(alias: str) -> AbstractContextManager[None]:
    """Raise what redis-py raises as a StorageError that tells what to do."""
    return translated(partial(_named, alias))


def _named(alias: str, exc: Exception) -> Exception:
    from redis.exceptions import (
        AuthenticationError,
        RedisClusterException,
        RedisError,
        ResponseError,
    )

    if not isinstance(exc, RedisError | RedisClusterException | OSError):
        return exc
    text = str(exc)
    # "UNBLOCKED …", or with an older server "ERR Error running script: UNBLOCKED …".
    words = text.replace(":", " ").split()
    if "LEASELOST" in words:
        return LeaseLost()
    if isinstance(exc, AuthenticationError):
        words = ["WRONGPASS"]
    elif "ACL failure in script" in text:
        words = ["NOPERM"]
    otherwise: Advice = (
        StoreUnavailable,
        f"it doesn't answer ({type(exc).__name__}). Check that it runs and can be "
        "reached; a write has arrived whole, or not at all.",
    )
    if isinstance(exc, ResponseError):
        otherwise = StorageError, f"it refused the operation ({_told(exc)})."
    kind, advice = find_advice([*words, *class_names(exc)], _ADVICE, otherwise)
    advice = advice.replace("{what}", _refused(text))
    return kind(f"Redis of {alias!r} could not be used: {advice}")


def _refused(text: str) -> str:
    """Return what an ACL refuses, by the server's words, which name commands alone."""
    found = re.search(r"'([A-Za-z|]{1,40})' (?:command|subcommand)", text)
    if found is not None:
        return f"the command {found[1].upper()}"
    return "a key" if "key" in text else "the operation"


def _told(exc: Exception) -> str:
    """Return the server's error code, the first word; the others may quote contents."""
    code = str(exc).partition(" ")[0]
    known = code.isascii() and code.isalpha() and code.isupper() and len(code) <= 16
    return f"{type(exc).__name__}, {code}" if known else type(exc).__name__
