"""Pages of a history as clients read them: what fits, with ids, names and siblings."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

from agent_sessions.agui import StreamOptions, messages_from_items, snapshot
from agent_sessions.backends.base import Page
from agent_sessions.backends.database.siblings import with_siblings
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import CALL_OF, Key, call_key, own_key, type_and_role
from agent_sessions.runs.log import Event
from agent_sessions.runs.naming import named
from agent_sessions.runs.setup import Conversation

SNAPSHOT_LIMIT = 100
# So many times longer is a page that would hold nothing but outputs of earlier calls.
WIDER = 10
# One snapshot's messages as JSON: a client that asks again and again gets no more.
SNAPSHOT_BYTES = 512 * 1024


async def read_page(
    conversation: Conversation, before: int | None = None, ids: Sequence[Any] = ()
) -> Page:
    """Read the newest page of a history before a position, as a snapshot has it.

    `ids` are those of messages whose run has not written them down yet.
    """
    read, key = conversation.backend.apage, conversation.key
    page = await read(key, before=before, limit=SNAPSHOT_LIMIT)
    if lacks_calls(page):
        page = await read(key, before=before, limit=SNAPSHOT_LIMIT * WIDER)
    return await conversation.backend.threads.run(
        told_of, page, conversation, before, ids
    )


def told_of(
    page: Page,
    conversation: Conversation,
    before: int | None = None,
    ids: Sequence[Any] = (),
) -> Page:
    """Return a page with what clients are told beside its items; see named().

    Messages have their ids, and turns their place among the branches beside them.
    """
    page = named(page, conversation.runs(), ids)
    rows = conversation.backend.in_database
    if rows is None:
        return page
    return rows.ask(conversation.key, partial(with_siblings, page=page, before=before))


def shown(
    page: Page, options: StreamOptions, room: int = SNAPSHOT_BYTES
) -> tuple[list[Event], Event]:
    """Return a page's newest AG-UI messages that fit, and what snapshot() says of them.

    `room` is in bytes of JSON. Raises EncryptionError.
    """
    messages, before = _newest(page, options, room)
    about = {"before": before, "branch": page.branch, "siblings": page.siblings}
    return messages, about


def _newest(
    page: Page, options: StreamOptions, room: int
) -> tuple[list[Event], str | None]:
    # Left out, the conversation would look empty.
    page.assert_open()
    items, first = page.items, 0
    messages = messages_from_items(items, options)
    fitting = _fitting(messages, room)
    if fitting < len(messages):
        # Not every item is a message of its own.
        first = bisect_left(
            range(len(items)),
            True,
            key=lambda n: len(messages_from_items(items[n:], options)) <= fitting,
        )
    if first or page.has_earlier:
        found, fits = _beginnings(items), first
        first = next((n for n in found if n >= fits), fits)
        if found and found[-1] < fits < len(items):
            # Calls at once whose outputs don't all fit.
            first = found[-1]
        messages = messages_from_items(items[first:], options)
        if first < fits:
            _shorten(messages, room)
    if not items or not (page.has_earlier or first):
        return messages, None
    # Where not even the newest item fits, the cursor lies behind it.
    before = items[first].position if first < len(items) else items[-1].position + 1
    return messages, str(before)


def restated(page: Page, options: StreamOptions, asked: Sequence[Event] = ()) -> Event:
    """Return the snapshot of a page, and of messages that are not stored yet."""
    room = SNAPSHOT_BYTES - len(_written(asked))
    messages, about = shown(page, options, room)
    if asked and (siblings := about.pop("siblings")):
        asked = [{**asked[0], "metadata": {"siblings": siblings}}, *asked[1:]]
    return snapshot([*messages, *asked], **about)


def lacks_calls(page: Page) -> bool:
    """Return whether a page is full of outputs whose calls lie before it."""
    return bool(page.items and page.has_earlier and not _beginnings(page.items))


def _beginnings(items: Sequence[StoredItem]) -> list[int]:
    """Return where a page may begin: no output after it has its call before it."""
    unanswered: set[Key] = set()
    found = []
    for index in range(len(items) - 1, -1, -1):
        item = items[index].item or {}
        if type_and_role(item)[0] in CALL_OF:
            unanswered.add(call_key(item))
        else:
            unanswered.discard(own_key(item))
        if not unanswered:
            found.append(index)
    return found[::-1]


def _fitting(messages: list[Event], room: int) -> int:
    """Count the newest messages that fit, as written to the wire."""
    for count, message in enumerate(reversed(messages)):
        room -= len(_written(message)) + len(",")
        if room < len("[]"):
            return count
    return len(messages)


def _shorten(messages: list[Event], room: int) -> None:
    """Leave out what the oldest tools were given and gave, until the messages fit."""
    excess = len(_written(messages)) - room
    for message in messages:
        size = len(_written(message))
        if excess > 0 and message["role"] == "tool":
            message |= {"content": "", "metadata": {"truncated": True}}
        for call in message.get("toolCalls", ()) if excess > 0 else ():
            call["function"]["arguments"] = ""
        excess -= size - len(_written(message))


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
