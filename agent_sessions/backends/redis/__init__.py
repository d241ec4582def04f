"""Sessions in Redis, Valkey and other servers of the Redis protocol."""

from __future__ import annotations

from agent_sessions.backends.redis.backend import RedisBackend

__all__ = ["RedisBackend"]
