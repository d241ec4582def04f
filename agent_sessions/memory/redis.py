"""The session over Redis, usable without any setting."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self, cast

from django.core.signals import setting_changed
from django.dispatch import receiver

from agent_sessions.backends.base import make_key
from agent_sessions.backends.redis import RedisBackend
from agent_sessions.backends.redis.clients import given_client
from agent_sessions.memory.base import ClosableSession, stores_plain_items
from agent_sessions.reports import guard_public_methods, guarded

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from redis.asyncio import Redis, RedisCluster

    from agent_sessions.memory.base import Settings

ALIAS = "RedisSession"


@guard_public_methods
class RedisSession(ClosableSession):
    """A conversation in Redis: `RedisSession("user_123", redis_client)`.

    The client is one of redis.asyncio, of a cluster too; it stays the caller's to
    close, and then close() ends nothing. `options` are `ttl`, `sliding`, `max_items` and `key_prefix`, see
    RedisBackend. Histories of the SDK's RedisSession open as they are.
    """

    def __init__(
        self,
        session_id: str,
        redis_client: Redis | RedisCluster,
        *,
        session_settings: Settings = None,
        **options: Any,
    ) -> None:
        backend = RedisBackend(ALIAS, options | {"client": redis_client}, listed=False)
        # Not a function that makes one.
        backend.given = given_client(redis_client)
        super().__init__(
            backend, make_key(session_id, None), session_settings=session_settings
        )

    @classmethod
    def from_url(
        cls,
        session_id: str,
        url: str,
        *,
        redis_kwargs: dict[str, Any] | None = None,
        session_settings: Settings = None,
        **options: Any,
    ) -> Self:
        """Open a session on the server of a URL, or with `cluster=True` its cluster.

        All sessions of a URL share a client in each event loop, closed with the loop.
        `redis_kwargs` go to it.
        """
        if redis_kwargs:
            # A tuple can be compared, so that the sessions of a URL find its client.
            options["client_options"] = tuple(sorted(redis_kwargs.items()))
        # None, as of a variable that isn't set, would mean a cache's server.
        backend = _backend(url=url or "", **options)
        return cls.from_key(
            backend, make_key(session_id, None), session_settings=session_settings
        )

    @classmethod
    def from_cache(
        cls,
        session_id: str,
        cache: str = "default",
        *,
        session_settings: Settings = None,
        **options: Any,
    ) -> Self:
        """Open a session on the server of a CACHES alias that django-redis serves."""
        backend = _backend(cache=cache, **options)
        return cls.from_key(
            backend, make_key(session_id, None), session_settings=session_settings
        )

    @guarded
    async def _atomic_replace_items(self, items: list[TResponseInputItem]) -> bool:
        """Replace the whole history in one step, for the SDK's compaction.

        The SDK's private hook (0.24), which it looks up on the class. Without it, a
        crash between its clear and its add would lose the history.
        """
        if not stores_plain_items(self, RedisSession):
            return False
        self._assert_open()
        backend = cast("RedisBackend", self.backend)
        await backend.areplace(self.key, items)  # type: ignore[arg-type]
        return True

    def _owns_client(self) -> bool:
        return cast("RedisBackend", self.backend).given is None


def _backend(**options: Any) -> RedisBackend:
    try:
        return _shared(**options)
    except TypeError:
        # An option can't be compared: a session with a client of its own.
        return _shared.__wrapped__(**options)


@receiver(setting_changed)
def _forget_caches(*, setting: str, **kwargs: Any) -> None:
    """Follow override_settings: the server of a cache may be another one now."""
    if setting == "CACHES":
        _shared.cache_clear()


@lru_cache(maxsize=64)
def _shared(**options: Any) -> RedisBackend:
    backend = RedisBackend(ALIAS, options, listed=False)
    _ = (
        backend.endpoint,
        backend.key_prefix,
    )  # a mistake is told here, not at the first use
    return backend
