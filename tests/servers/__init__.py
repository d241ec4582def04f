"""Real servers for the tests: each on a free port, in a directory of its own."""

from __future__ import annotations

from tests.servers import chromium as _chromium
from tests.servers import dapr as _dapr
from tests.servers import mariadb as _mariadb
from tests.servers import memcached as _memcached
from tests.servers import postgres as _postgres
from tests.servers import redis as _redis
from tests.servers import valkey as _valkey
from tests.servers.process import Server, ServerError, serve

# What a test can ask for by the name of a fixture -> what is missing, if anything.
PARTS = {
    "chromium": _chromium.missing,
    "dapr_server": _dapr.missing,
    "mariadb_server": _mariadb.missing,
    "memcached_server": _memcached.missing,
    "postgres_server": _postgres.missing,
    "redis_cluster": _redis.missing,
    "redis_server": _redis.missing,
    "valkey_sentinel": _valkey.missing,
    "valkey_server": _valkey.missing,
}

__all__ = ["PARTS", "Server", "ServerError", "serve"]
