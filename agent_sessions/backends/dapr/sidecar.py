"""One state store as its sidecar shows it, through either of Dapr's clients."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from agent_sessions.backends.remote.base import Advice, find_advice
from agent_sessions.exceptions import StorageError
from agent_sessions.reports import place_of

T = TypeVar("T")

# Requests of one operation that are under way at the same time.
PARALLEL = 8
# Times that a request is made where the sidecar or its store doesn't answer.
TRIES = 4

# The aio client hides the code of a refused save, and each store words it its way.
_CONFLICTS = (
    "etag mismatch",
    "etag does not match",
    "precondition failed",
    "failed to set key",
)


class Conflict(Exception):
    """Someone else wrote a record since it was read."""


class Unreachable(StorageError):
    """The sidecar or its store gave no answer."""


class TooLarge(StorageError):
    """A request or its answer is larger than the sidecar or the client takes."""


_TOO_LARGE = (
    "A record is larger than the sidecar or the client takes. Store smaller items, or "
    "raise the sidecar's --max-body-size and the client's limit, "
    "DAPR_GRPC_MAX_INBOUND_MESSAGE_SIZE_BYTES."
)
_SILENT: Advice = (
    Unreachable,
    "The Dapr sidecar or its state store {store!r} can't be reached ({code}).",
)
_REFUSAL = "The state store {store!r} refused ({code}). "
_REFUSED: Advice = (
    StorageError,
    _REFUSAL + "Check that the sidecar has a state store of this name for this "
    "application.",
)
# By the code of gRPC.
_ADVICE: dict[str | None, Advice] = {
    None: _SILENT,
    "UNAVAILABLE": _SILENT,
    "DEADLINE_EXCEEDED": _SILENT,
    "INTERNAL": _SILENT,
    "UNKNOWN": _SILENT,
    "CANCELLED": _SILENT,
    "UNIMPLEMENTED": (
        StorageError,
        "The state store {store!r} or its sidecar lacks what is needed. Use a store "
        "with ETags and a sidecar of Dapr 1.14 or newer.",
    ),
    "RESOURCE_EXHAUSTED": (TooLarge, _REFUSAL + _TOO_LARGE),
    "UNAUTHENTICATED": (
        StorageError,
        _REFUSAL + "Set DAPR_API_TOKEN to the sidecar's token.",
    ),
    "PERMISSION_DENIED": (
        StorageError,
        _REFUSAL + "Give this application access to the state store.",
    ),
}


@dataclass(frozen=True, slots=True)
class Value:
    """What lies under a key; both are empty where there is nothing."""

    data: bytes = b""
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """A record to be written.

    `etag` is the one that it must still have, "" where there must be none. `ttl` are
    seconds; None keeps it for ever.
    """

    key: str
    data: bytes
    etag: str = ""
    ttl: int | None = None

    @property
    def metadata(self) -> dict[str, str]:
        return {} if self.ttl is None else {"ttlInSeconds": str(self.ttl)}


@dataclass(frozen=True, slots=True)
class _SaveOptions:
    """What the clients take for StateOptions, which have no public name."""

    consistency: str
    first_write: bool

    def get_proto(self) -> Any:
        from dapr.proto import common_v1

        kinds = common_v1.StateOptions
        writing = "FIRST_WRITE" if self.first_write else "LAST_WRITE"
        return kinds(
            concurrency=kinds.StateConcurrency.Value(f"CONCURRENCY_{writing}"),
            consistency=kinds.StateConsistency.Value(
                f"CONSISTENCY_{self.consistency.upper()}"
            ),
        )


class Sidecar:
    """Reads and writes records of one state store.

    `client` is a DaprClient, of either kind: what blocks runs in a thread. `open_client`
    makes another after put_away(). `timeout` are the seconds that a request may take.
    """

    def __init__(
        self,
        client: Any,
        store_name: str,
        *,
        consistency: str,
        timeout: float,
        open_client: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        self.client = client
        self._open_client = open_client
        self._opening = asyncio.Lock()
        self._under_way = 0
        self.store_name = store_name
        self.consistency = consistency
        self.timeout = timeout
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.blocks = not inspect.iscoroutinefunction(client.get_state)

    def lock(self, key: str) -> asyncio.Lock:
        """Return the lock of a record, for this loop.

        Without it the writers of one process would refuse one another's records.
        """
        return self._locks.setdefault(key, asyncio.Lock())

    async def read(self, key: str) -> Value:
        found = await self._retried(
            lambda: self._call(
                "get_state",
                store_name=self.store_name,
                key=key,
                state_metadata={"consistency": self.consistency},
            )
        )
        return Value(found.data, found.etag)

    async def read_many(self, keys: Sequence[str]) -> dict[str, Value]:
        """Read several records in as few requests as their size allows."""
        if not keys:
            return {}
        try:
            return await self._retried(lambda: self._read_bulk(keys))
        except TooLarge:
            if len(keys) == 1:
                raise
        half = len(keys) // 2
        return await self.read_many(keys[:half]) | await self.read_many(keys[half:])

    async def _read_bulk(self, keys: Sequence[str]) -> dict[str, Value]:
        found = await self._call(
            "get_bulk_state",
            store_name=self.store_name,
            keys=keys,
            parallelism=PARALLEL,
            states_metadata={"consistency": self.consistency},
        )
        if any(item.error for item in found.items):
            raise Unreachable(
                f"The state store {self.store_name!r} could not read every record. "
                "Nothing was changed; try again."
            )
        values = {item.key: Value(item.data, item.etag) for item in found.items}
        return {key: values.get(key, Value()) for key in keys}

    async def save(self, write: Write) -> None:
        """Write a record if nobody else did since. Raises Conflict."""
        await self._save(write, first_write=True)

    async def put_many(self, writes: Iterable[Write]) -> None:
        """Write records whatever lies there, or if it still has their etags.

        Tried once: they belong to a change, which is tried again as a whole.
        """
        await self._each(writes, self._save)

    async def _save(self, write: Write, *, first_write: bool = False) -> None:
        await self._call(
            "save_state",
            store_name=self.store_name,
            key=write.key,
            value=write.data,
            etag=write.etag or None,
            options=_SaveOptions(self.consistency, first_write or bool(write.etag)),
            state_metadata=write.metadata,
        )

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Delete records, whatever lies there."""
        await self._each(
            keys,
            lambda key: self._retried(
                lambda: self._call("delete_state", store_name=self.store_name, key=key)
            ),
        )

    async def _each(
        self, things: Iterable[T], work: Callable[[T], Awaitable[object]]
    ) -> None:
        """Work on all, some at a time; the first error is raised when all is still."""
        seats = asyncio.Semaphore(PARALLEL)

        async def seated(thing: T) -> None:
            async with seats:
                await work(thing)

        outcomes = await asyncio.gather(*map(seated, things), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def check_sizes(self, writes: Iterable[Write]) -> None:
        """Raise TooLarge if what is to be written could not be read again."""
        most = getattr(self.client, "most_bytes", None)
        if most is None:
            # A client that was given has limits of its own.
            return
        for write in writes:
            if len(write.data) > most:
                raise TooLarge(
                    f"A record has {len(write.data)} bytes and could not be read "
                    f"again; nothing was written. {_TOO_LARGE}"
                )

    async def _retried(self, request: Callable[[], Awaitable[T]]) -> T:
        attempt = 1
        while True:
            try:
                return await request()
            except Unreachable:
                if attempt >= getattr(self.client, "tries", TRIES):
                    raise
                await pause(attempt, first=0.1)
                attempt += 1

    async def close(self) -> None:
        client = self.client
        if self._open_client is not None and client is not None:
            self.client = None
            await client.close()

    async def put_away(self) -> None:
        """Close our own client when no request is under way; the next opens another."""
        if self._open_client is None or self.client is None:
            return
        closing, self.client = self.client, None
        # Meanwhile no request may open another.
        if self._under_way:
            async with self._opening:
                while self._under_way:  # noqa: ASYNC110 - a fork is rare
                    await asyncio.sleep(0.005)
                await closing.close()
        else:
            await closing.close()

    async def _opened(self) -> Any:
        if self._open_client is None:
            return self.client
        async with self._opening:
            if self.client is None:
                self.client = await self._open_client()
            return self.client

    async def _call(self, name: str, **arguments: Any) -> Any:
        client = self.client or await self._opened()
        method = getattr(client, name)
        self._under_way += 1
        try:
            async with asyncio.timeout(self.timeout):
                if self.blocks:
                    return await asyncio.to_thread(method, **arguments)
                return await method(**arguments)
        except TimeoutError:
            raise Unreachable(
                f"The Dapr sidecar gave no answer within {self.timeout:g} s."
            ) from None
        except Exception as exc:
            # Not the cause: its details and its request may quote the items.
            raise self._translated(exc) from None
        finally:
            self._under_way -= 1

    def _translated(self, exc: Exception) -> Exception:
        """Turn an error of the client into our own, without its details."""
        code, message = _code(exc), str(exc).lower()
        if code is None and type(exc).__module__.split(".")[0] not in {"dapr", "grpc"}:
            # A wrong argument or a bug: no outage may hide it, but it may quote items.
            return RuntimeError(f"Dapr's client failed: {place_of(exc)}.")
        if code == "ABORTED" or any(words in message for words in _CONFLICTS):
            return Conflict()
        kind, advice = find_advice([code], _ADVICE, _REFUSED)
        name = self.store_name
        return kind(advice.format(store=name, code=code or type(exc).__name__))


async def pause(attempt: int, *, first: float) -> None:
    """Wait before the next attempt, for a time that differs between writers.

    `attempt` is how many were made, `first` the longest wait (s) after one of them.
    """
    longest = min(first * 2 ** min(attempt - 1, 10), 0.5)
    await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - no secret


def _code(exc: BaseException) -> str | None:
    for error in (exc, exc.__cause__):
        code = getattr(error, "code", None)
        if callable(code):
            return getattr(code(), "name", None)
    return None
