"""What is asked of OpenAI's Conversations service, one loop's client, named errors."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from agent_sessions.backends.openai.errors import NotSent, named, unsure, wait_after
from agent_sessions.exceptions import (
    HistoryGone,
    InvalidBackend,
    PartlyWritten,
    StorageError,
    StoreBusy,
    StoreUnavailable,
)
from agent_sessions.items import Item

T = TypeVar("T")

# The service's own limits.
WRITE_SIZE = 20
PAGE_SIZE = 100
# Longer than this (s) nothing is tried again: a longer wait is the caller's business.
LONGEST_WAIT = 10.0
# How often a reading is begun again whose cursor was popped.
_READINGS = 5


def make_client(options: dict[str, Any]) -> AsyncOpenAI:
    """Make a client for the running loop. Raises InvalidBackend without a key."""
    names = ("api_key", "base_url", "organization", "project", "timeout")
    given = {name: options[name] for name in names if options[name] is not None}
    try:
        return AsyncOpenAI(
            **given, max_retries=options["max_retries"], http_client=http_client()
        )
    except openai.OpenAIError:
        raise InvalidBackend(
            "There is no API key for OpenAI.",
            hint="Set OPENAI_API_KEY in the environment, or the option 'api_key'.",
            id="agent_sessions.W010",
        ) from None
    except (httpx2.InvalidURL, TypeError, ValueError) as exc:
        raise InvalidBackend(
            f"OpenAI's client can't be made from these options ({type(exc).__name__}).",
            hint="Run manage.py check.",
            id="agent_sessions.E018",
        ) from None


def http_client() -> DefaultAsyncHttpxClient:
    """Make the running loop's connections."""
    return DefaultAsyncHttpxClient(verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    # Reading them takes 0.1 s, and a view that uses async_to_sync has a new loop, and
    # so a new client, each time.
    return httpx2.create_ssl_context()


class Conversations:
    """The remote conversations, as one event loop sees them.

    Nothing that changes one is sent twice, except where the service said that it did
    nothing, or where it was not reached. Reads are retried as the client is set to.
    """

    def __init__(self, client: AsyncOpenAI) -> None:
        self.client = client
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def create(self) -> str:
        """Make an empty conversation; give its id."""
        made = await self._write("POST", "/conversations", b'{"items":[]}')
        return str(made["id"])

    async def delete(self, conversation: str) -> None:
        """Delete a conversation; one that is gone already is fine."""
        try:
            await self._write("DELETE", _path(conversation))
        except HistoryGone:
            return

    async def add(self, conversation: str, items: Sequence[str]) -> None:
        """Append items, given as JSON texts, in requests of 20.

        Where a later request fails, what the earlier ones wrote is removed again.
        Raises StorageError, and PartlyWritten where that failed too.
        """
        made: list[str] = []
        async with self._lock(conversation):
            for start in range(0, len(items), WRITE_SIZE):
                chunk = items[start : start + WRITE_SIZE]
                try:
                    made += await self._add(conversation, chunk)
                except StorageError as exc:
                    if start == 0 or isinstance(exc, HistoryGone):
                        raise
                    await self._undo(conversation, made, len(items), exc)
                    raise

    async def latest(self, conversation: str, limit: int | None) -> list[Item]:
        """Read the newest `limit` items, oldest first."""
        async with self._lock(conversation):
            return await self._latest(conversation, limit)

    async def following(
        self, conversation: str, after: str | None
    ) -> tuple[list[Item], bool]:
        """Read one page behind an item, or from the beginning; tell if more follow.

        Raises CursorLost where the item isn't there any more.
        """
        async with self._lock(conversation):
            page = await self._page(conversation, "asc", PAGE_SIZE, after)
        return page["data"], bool(page["has_more"])

    async def pop(self, conversation: str) -> Item | None:
        """Remove and return the newest item."""
        async with self._lock(conversation):
            while newest := await self._latest(conversation, 1):
                try:
                    await self._remove(conversation, newest[0]["id"])
                except HistoryGone:
                    # Popped by another process, or the whole conversation is gone:
                    # the next reading tells.
                    continue
                return newest[0]
        return None

    # -- requests --------------------------------------------------------------------

    async def _add(self, conversation: str, items: Sequence[str]) -> list[str]:
        # As they were encoded: the client's own encoder refuses lone surrogates.
        content = b'{"items":[' + ",".join(items).encode("ascii") + b"]}"
        made = await self._write("POST", _path(conversation, "items"), content)
        return [item["id"] for item in made["data"]]

    async def _remove(self, conversation: str, item: str) -> None:
        await self._write("DELETE", _path(conversation, "items", item))

    async def _latest(self, conversation: str, limit: int | None) -> list[Item]:
        for _ in range(_READINGS):
            try:
                return await self._read(conversation, limit)
            except CursorLost:
                continue
        raise StoreBusy(
            "OpenAI's conversation changes faster than it can be read. Try again."
        )

    async def _read(self, conversation: str, limit: int | None) -> list[Item]:
        """Read from the newest back. Raises CursorLost where a pop took the cursor."""
        found: list[Item] = []
        after: str | None = None
        while limit is None or len(found) < limit:
            size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            page = await self._page(conversation, "desc", size, after)
            found += [item for item in page["data"] if isinstance(item, dict)]
            if not page["has_more"]:
                break
            after = page["last_id"]
        return found[::-1]

    async def _page(
        self, conversation: str, order: str, size: int, after: str | None
    ) -> Any:
        query = {"order": order, "limit": size}
        if after is not None:
            query["after"] = after
        try:
            return await self._get(_path(conversation, "items"), query)
        except StorageError as exc:
            if after is not None and type(exc) in {HistoryGone, StorageError}:
                raise CursorLost from exc
            raise

    async def _undo(
        self, conversation: str, made: list[str], total: int, cause: StorageError
    ) -> None:
        """Remove what a batch's first requests wrote, the newest first.

        Raises PartlyWritten where something stays, or may have come late.
        """
        start = len(made)
        left = list(made)
        # What can't be removed is told below.
        with suppress(StorageError):
            while left:
                # What somebody has popped is as good as removed.
                with suppress(HistoryGone):
                    await self._remove(conversation, left[-1])
                left.pop()
        doubtful = isinstance(cause, StoreUnavailable) and not isinstance(
            cause, NotSent
        )
        if not left and not doubtful:
            return
        end = min(start + WRITE_SIZE, total)
        told = [
            f"of a batch of {total} items the first {len(left)} are stored and could "
            "not be removed again"
            if left
            else f"the first {start} items of a batch of {total} were removed again"
        ]
        if doubtful:
            told.append(f"items {start + 1} to {end} may have arrived")
        raise PartlyWritten(
            f"OpenAI stopped answering in the middle of a write: {', and '.join(told)}. "
            "Read the session before you send the batch again.",
            stored=len(left),
            unsure=range(start, end) if doubtful else range(0),
        ) from cause

    async def _get(self, path: str, query: dict[str, Any]) -> Any:
        return await self._ask(
            lambda: self.client.get(
                path, cast_to=httpx2.Response, options={"params": query}
            ),
            writing=False,
        )

    async def _write(self, method: str, path: str, content: bytes | None = None) -> Any:
        send: Any = self.client.post if method == "POST" else self.client.delete
        # The client would send again after a lost answer, and so write twice.
        options = {
            "max_retries": 0,
            "headers": {"Content-Type": "application/json"},
        }

        def request() -> Awaitable[httpx2.Response]:
            return send(  # type: ignore[no-any-return]
                path, cast_to=httpx2.Response, content=content, options=options
            )

        return await self._ask(request, writing=True)

    async def _ask(
        self, request: Callable[[], Awaitable[httpx2.Response]], *, writing: bool
    ) -> Any:
        """Send a request; give the JSON of its answer. Raises StorageError."""
        begun, tries = time.monotonic(), 0
        while True:
            try:
                response = await request()
            except openai.OpenAIError as exc:
                left = LONGEST_WAIT - (time.monotonic() - begun)
                most = self.client.max_retries
                wait = wait_after(exc, tries, most, writing=writing)
                if wait is None or wait > left:
                    # Not the cause: its text and request may quote the items or the
                    # key.
                    raise named(exc, writing=writing) from None
            except UnicodeError:
                # Before anything is sent. Its text and its object hold the header.
                raise StorageError(
                    "The request to OpenAI can't be written: the option 'api_key', or "
                    "another header, is not ASCII. Run manage.py check."
                ) from None
            else:
                break
            tries += 1
            await asyncio.sleep(wait)
        try:
            answer = json.loads(response.content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise StoreUnavailable(
                "What answered at OpenAI's address speaks no JSON. Check the option "
                "'base_url'." + unsure(writing)
            )
        return answer

    def _lock(self, conversation: str) -> asyncio.Lock:
        # Requests of one batch stay together, as far as this loop can see to it.
        return self._locks.setdefault(conversation, asyncio.Lock())


class CursorLost(Exception):
    """The item at which a reading was to go on has been removed."""


def _path(*parts: str) -> str:
    return "/conversations/" + "/".join(quote(part, safe="") for part in parts)
