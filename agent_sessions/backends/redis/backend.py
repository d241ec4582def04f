"""The backend over Redis and what speaks its protocol, single or as a cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from django.core import checks

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.keys import Asking, anything
from agent_sessions.backends.redis import clients, scripts
from agent_sessions.backends.redis.clients import (
    CHECK_ID,
    Client,
    Endpoint,
    given_client,
    is_cluster,
    named_errors,
    unanswered,
)
from agent_sessions.backends.redis.scripts import (
    Names,
    Script,
    evaluate,
    id_of,
    pattern,
    unowned,
)
from agent_sessions.backends.remote.base import RemoteBackend, Stretch, read_readable
from agent_sessions.backends.remote.listed import in_one_database
from agent_sessions.concurrency.loops import HomeLoop, PerLoop
from agent_sessions.exceptions import InvalidBackend, MissingExtra, StorageError
from agent_sessions.items import Batch, Item, StoredItem, decode, encode_batch

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


KEY_PREFIX = "agents:session"
_EVERYTHING = 2**62
# The options that say under which keys a history lies.
_PLACES = ("cache", "url", "client", "key_prefix")
# How many texts a pop looks at where the newest has no mark; then all of them.
_WINDOW = 32
# The arguments of a script that writes nothing: no token, fence or ttl.
_READ = ("", "", 0, 0)


class RedisBackend(RemoteBackend):
    """Keep items in Redis lists, each operation one step of the server.

    OPTIONS: `cache`, an alias of CACHES that django-redis serves ("default"), or `url`,
    or `client`, an asyncio client that stays yours to close, or a function that makes
    one for each event loop, closed with it; `cluster`, whether the URL is a cluster's;
    `client_options`, what else redis-py's asyncio client takes; `ttl`, a timedelta,
    seconds or "30d", after which a history is forgotten; `sliding`, whether each use
    starts the ttl anew (True) or it counts from the first write; `max_items`, how many
    of the newest items are kept; `key_prefix` ("agents:session", as the SDK has it).
    """

    supports_listing = True
    supports_pop_if = True
    requires = "redis"
    check_id = CHECK_ID
    session_class = "agent_sessions.memory.redis.RedisSession"
    option_defaults: ClassVar[dict[str, Any]] = {
        **RemoteBackend.option_defaults,
        "cache": None,
        "url": None,
        "client": None,
        "cluster": False,
        "client_options": None,
        "ttl": None,
        "sliding": True,
        "max_items": None,
        "key_prefix": None,
    }

    def __init__(
        self, alias: str, options: dict[str, Any], *, listed: bool = True
    ) -> None:
        super().__init__(alias, options, listed=listed)
        ttl = self.read_ttl()
        self.ttl_ms = 0 if ttl is None else max(ttl // timedelta(milliseconds=1), 1)
        limited = self.options["max_items"] is not None
        self.max_items = self.read_whole("max_items", 1) if limited else 0
        self.trims = limited or ttl is not None
        client = self.options["client"]
        # A client of the caller's, which belongs to the loop that uses it first.
        self.given: Redis | RedisCluster | None = None
        if client is not None and not callable(client):
            self.given = given_client(client)
        self._home = HomeLoop()
        self._clients = PerLoop(self._connect, self._close)

    # -- configuration -----------------------------------------------------------

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is. Raises InvalidBackend."""
        url = self.options["url"]
        extra = dict(self.options["client_options"] or {})
        places = [name for name in ("cache", "url", "client") if self.options[name]]
        if len(places) > 1:
            raise self.invalid_option(
                " and the option ".join(places), "Keep one of them.", "are both given"
            )
        if self.options["client"] is not None:
            return Endpoint("", make=self.options["client"])
        cluster: bool = self.options["cluster"]
        if url is not None:
            return clients.from_url(url, extra, cluster=cluster)
        if cluster:
            raise self.invalid_option(
                "cluster",
                "django-redis has no clusters: give the option url instead of cache.",
                "needs a url",
            )
        return clients.from_cache(self._cache, extra)

    @property
    def _cache(self) -> str:
        return self.options["cache"] or "default"

    @property
    def key_prefix(self) -> str:
        """What names of keys begin with; a cache's KEY_PREFIX comes before it."""
        if (prefix := self.options["key_prefix"]) is not None:
            return str(prefix)
        if self.options["url"] is None and self.options["client"] is None:
            return clients.cache_prefix(self._cache) + KEY_PREFIX
        return KEY_PREFIX

    def check(self) -> list[checks.CheckMessage]:
        """Report a server that can't be reached by these options; nothing is sent."""
        try:
            if self.given is None:
                _ = self.endpoint, self.key_prefix
        except InvalidBackend as exc:
            return [checks.Error(exc.message, hint=exc.hint, id=exc.id)]
        except MissingExtra as exc:
            return [checks.Error(str(exc), id="agent_sessions.E006")]
        return [*super().check(), *self._check_shared()]

    def _check_shared(self) -> list[checks.CheckMessage]:
        from django.conf import settings

        mine = {name: self.options[name] for name in _PLACES}
        for alias, params in getattr(settings, "AGENT_SESSIONS", {}).items():
            if alias == self.alias:
                break
            options = params.get("OPTIONS") or {}
            if "RedisBackend" in str(params.get("BACKEND")) and mine == {
                name: options.get(name) for name in mine
            }:
                return [
                    checks.Warning(
                        f"AGENT_SESSIONS[{alias!r}] and [{self.alias!r}] keep sessions "
                        "without an owner under the same keys.",
                        hint="Give one of them another key_prefix.",
                        id="agent_sessions.W007",
                    )
                ]
        return []

    # -- clients -----------------------------------------------------------------

    async def _connect(self) -> Client:
        if self.given is None:
            return await self.endpoint.connect()
        if not self._home.is_here():
            raise StorageError(
                "This Redis client belongs to the event loop that used it first. Make a "
                "client in each loop, or use from_url() or from_cache(), which do."
            )
        if is_cluster(self.given):
            # Here, where one task is: several that find a new client race in redis-py 8.
            await self.given.initialize()
        return Client(self.given)

    async def _close(self, client: Client) -> None:
        if self.given is None:
            await client.aclose()

    async def client(self) -> Redis | RedisCluster:
        """Return the running loop's client: the one given, or one of our own."""
        with named_errors(self.alias):
            return (await self._clients.get()).redis

    async def disconnect(self) -> None:
        """Close the running loop's idle connections if the client was made here."""
        if self.given is not None:
            return
        client: Any = await self.client()
        if is_cluster(client):
            for node in client.get_nodes():
                await node.disconnect_free_connections()
        else:
            await client.connection_pool.disconnect(inuse_connections=False)

    async def ping(self) -> bool:
        """Return whether the server answers."""
        client = await self.client()
        try:
            with named_errors(self.alias):
                return bool(await client.ping())
        except StorageError:
            return False

    def names(self, key: SessionKey) -> Names:
        mark = self.database_mark
        return Names(
            self.key_prefix,
            key.session_id,
            self.alias + mark,
            key.user_id,
            self.namespace + mark,
        )

    async def _run(self, script: Script, names: Names, *args: Any) -> Any:
        keys: Sequence[bytes] = names.keys
        client = await self.client()
        if (self.ttl_ms or script is scripts.CLEAR) and not is_cluster(client):
            # There they expire, or go, with the items.
            keys = (*keys, *names.sdk_keys)
        with named_errors(self.alias):
            return await evaluate(client, script, keys, args)

    async def _write(self, script: Script, names: Names, *args: Any) -> Any:
        """Run a script that is done once however often it arrives.

        Raises StoreUnavailable where the server doesn't answer in time.
        """
        token = (b"p" if script is scripts.POP else b"w") + os.urandom(8)
        try:
            async with asyncio.timeout(scripts.SENDING_S):
                return await self._run(script, names, token, *args)
        except TimeoutError as exc:
            raise unanswered(self.alias, scripts.SENDING_S) from exc

    def _terms(self, key: SessionKey) -> tuple[str, int, int]:
        """Return the arguments that every operation has: fence, ttl and its kind."""
        fence = "" if key.fence is None else str(key.fence)
        return fence, self.ttl_ms, int(bool(self.options["sliding"]))

    # -- the store ---------------------------------------------------------------

    async def store_append(
        self, key: SessionKey, batch: Batch, *, replaces: bool = False
    ) -> int:
        texts = [row.data + scripts.MARK for row in batch.rows]
        terms = (*self._terms(key), self.max_items, int(replaces))
        names = self.names(key)
        return int(await self._write(scripts.APPEND, names, *terms, *texts))

    @in_one_database
    async def areplace(self, key: SessionKey, items: Sequence[Item]) -> None:
        """Put a batch in the place of the whole history, in one step."""
        store = partial(self.store_append, replaces=True)
        await self._add(key, encode_batch(items), store, replaces=True)

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        names = self.names(key)
        return await read_readable(
            lambda window: self._newest(key, names, window or _EVERYTHING), _read, limit
        )

    async def _newest(self, key: SessionKey, names: Names, window: int) -> list[bytes]:
        fence, ttl, sliding = self._terms(key)
        ttl *= sliding
        texts: list[bytes]
        if fence or ttl:
            terms = ("", fence, ttl, sliding, window)
            texts = await self._run(scripts.LATEST, names, *terms)
            return texts
        # Nothing to write down: a plain command does, on a replica too.
        client = await self.client()
        with named_errors(self.alias):
            texts = await client.execute_command(
                "LRANGE", names.items, -window, -1, NEVER_DECODE=True
            )
        return texts

    async def store_pop(self, key: SessionKey) -> Item | None:
        return await self._take(key, None)

    async def store_pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        return await self._take(key, asking)

    async def _take(self, key: SessionKey, asking: Asking | None) -> Item | None:
        names, terms = self.names(key), self._terms(key)
        # The server chooses where the newest has its mark and the caller has no say.
        first = (0 if asking is None else -1, 0, b"")
        window, choice = (_WINDOW if asking is None else 1), first
        while True:
            found, *answer = await self._write(
                scripts.POP, names, *terms, window, *choice
            )
            if found:
                return _read(answer[0])
            count, texts = answer
            choice, accept = first, (asking or anything)()
            for place, text in enumerate(reversed(texts), 1):
                item = _read(text)
                if item is not None and accept(item):
                    choice = (place, count, text)
                    break
            else:
                if len(texts) == count:
                    return None
                window = _EVERYTHING if window > 1 else _WINDOW

    async def store_clear(self, key: SessionKey) -> int:
        names, fence = self.names(key), self._terms(key)[0]
        return int(await self._write(scripts.CLEAR, names, fence))

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Page:
        edges = ("" if edge is None else edge for edge in (wanted.before, wanted.after))
        base, count, start, stamps, texts = await self._run(
            scripts.PAGE, self.names(key), *_READ, *edges, wanted.limit
        )
        times = [tuple(map(int, stamp.split(b":"))) for stamp in stamps]
        items = []
        made = 0
        for position, text in enumerate(texts, base + start + 1):
            while times and times[0][0] <= position:
                made = times.pop(0)[1]
            moment = datetime.fromtimestamp(made / 1000, UTC)
            raw = text.decode("utf-8", "backslashreplace").removesuffix(scripts.MARK)
            items.append(StoredItem(position, 0, _read(text), raw, moment))
        more = start + len(texts) < count
        return Page(items, start > 0 and count > 0, more, total=count)

    async def store_ids(self) -> AsyncIterator[str]:
        client = await self.client()
        seen: set[str] = set()
        prefix = unowned(self.key_prefix, self.namespace + self.database_mark)
        with named_errors(self.alias):
            async for name in client.scan_iter(
                match=pattern(prefix), count=1000, _type="list"
            ):
                session_id = id_of(prefix, name)
                if session_id is not None and session_id not in seen:
                    seen.add(session_id)
                    yield session_id


def _read(text: bytes) -> Item | None:
    try:
        return decode(text.decode())
    except UnicodeDecodeError:
        return None
