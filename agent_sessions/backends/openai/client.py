"""What is asked of OpenAI's Conversations service, one loop's client, named errors."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from agent_sessions.backends.base import Page
from agent_sessions.backends.openai.errors import UNSURE, NotSent, named, wait_after
from agent_sessions.backends.remote.base import Stretch
from agent_sessions.exceptions import (
    HistoryGone,
    InvalidBackend,
    PartlyWritten,
    StorageError,
    StoreBusy,
    StoreUnavailable,
)
from agent_sessions.items import Item
from agent_sessions.items.kinds import opens_turn

T = TypeVar("T")

# The service's own limits.
WRITE_SIZE = 20
PAGE_SIZE = 100
# Longer than this (s) nothing is tried again: a longer wait is the caller's business.
LONGEST_WAIT = 10.0
# How often a reading is begun again whose cursor was popped.
_READINGS = 5
# Of how many conversations a client knows where earlier readings went on.
_KNOWN = 500


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
    return DefaultAsyncHttpxClient(verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    # Reading them takes 0.1 s, and a view that uses async_to_sync has a new loop, and
    # so a new client, each time.
    return httpx2.create_ssl_context()


@dataclass(frozen=True, slots=True)
class Cursor:
    """Behind the item of this number and id; `turn` is the one that is open there.

    The service knows its items by id, and pages are asked for by number. An item that
    is still there has all items before it, since they are removed from the end alone.
    """

    position: int = 0
    item: str | None = None
    turn: int = 0

    def behind(self, items: Sequence[Item]) -> Cursor:
        return Cursor(
            self.position + len(items),
            str(items[-1]["id"]),
            self.turn + sum(map(opens_turn, items)),
        )


class CursorLost(Exception):
    """The item at which a reading was to go on has been removed."""


class Conversations:
    """The remote conversations, as one event loop sees them.

    Nothing that changes one is sent twice, except where the service said that it did
    nothing, or where it was not reached. Reads are retried as the client is set to.
    """

    def __init__(self, client: AsyncOpenAI) -> None:
        self.client = client
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # By conversation, those that were used last, and position.
        self._cursors: OrderedDict[str, dict[int, Cursor]] = OrderedDict()

    async def create(self) -> str:
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
        async with self._lock(conversation):
            return await self._latest(conversation, limit)

    async def page(self, conversation: str, wanted: Stretch) -> Page:
        """Read from the nearest known cursor to the end of a page."""
        known = self._cursors.setdefault(conversation, {})
        self._cursors.move_to_end(conversation)
        if len(self._cursors) > _KNOWN:
            self._cursors.popitem(last=False)
        end = max(known, default=0) if wanted.last is None else wanted.last
        fitting = [place for place in known if place <= end - wanted.limit]
        begin = known[max(fitting)] if fitting else Cursor()
        while True:
            try:
                async with self._lock(conversation):
                    items, more = await self._follow(conversation, wanted, begin)
            except CursorLost:
                known.clear()
                begin = Cursor()
                continue
            end = begin.position + len(items)
            first, _ = wanted.bounds(end)
            if first >= begin.position:
                page = wanted.cut(items, skipped=begin.position, turn=begin.turn)
                later = page.has_later or more
                return replace(page, has_later=later, total=None if more else end)
            # The page begins earlier: items were removed since.
            begin = Cursor()

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

    async def _follow(
        self, conversation: str, wanted: Stretch, cursor: Cursor
    ) -> tuple[list[Item], bool]:
        """Read what lies behind a cursor, as far as a page goes; tell if more does."""
        items: list[Item] = []
        more, last = True, wanted.last
        while more and (last is None or cursor.position < last):
            page = await self._page(conversation, "asc", PAGE_SIZE, cursor.item)
            more = bool(page["has_more"])
            if page["data"]:
                cursor = cursor.behind(page["data"])
                self._cursors.get(conversation, {})[cursor.position] = cursor
                items += page["data"]
        return items, more

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
        options: Any = {"params": query}
        send = partial(self.client.get, path, cast_to=httpx2.Response, options=options)
        return await self._ask(send, writing=False)

    async def _write(self, method: str, path: str, content: bytes | None = None) -> Any:
        call: Any = self.client.post if method == "POST" else self.client.delete
        # The client would send again after a lost answer, and so write twice.
        options = {"max_retries": 0, "headers": {"Content-Type": "application/json"}}
        send = partial(
            call, path, cast_to=httpx2.Response, content=content, options=options
        )
        return await self._ask(send, writing=True)

    async def _ask(
        self, send: Callable[[], Awaitable[httpx2.Response]], *, writing: bool
    ) -> Any:
        """Send a request; return the JSON of its answer. Raises StorageError."""
        end, tries = time.monotonic() + LONGEST_WAIT, 0
        while True:
            try:
                response = await send()
                break
            except (openai.OpenAIError, UnicodeError) as exc:
                wait = wait_after(exc, tries, self.client.max_retries, writing=writing)
                if wait is None or time.monotonic() + wait > end:
                    # Not the cause: its text and request may quote the items or the
                    # key.
                    raise named(exc, writing=writing) from None
            tries += 1
            await asyncio.sleep(wait)
        try:
            answer = json.loads(response.content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise StoreUnavailable(
                "What answered at OpenAI's address speaks no JSON. Check the option "
                "'base_url'." + (UNSURE if writing else "")
            )
        return answer

    def _lock(self, conversation: str) -> asyncio.Lock:
        # Requests of one batch stay together, as far as this loop can see to it.
        return self._locks.setdefault(conversation, asyncio.Lock())


def _path(*parts: str) -> str:
    return "/conversations/" + "/".join(quote(part, safe="") for part in parts)
