"""What a stream tells of messages beside their text, in every later answer too.

That is their ids and who gave an answer. A stream names messages before they are
stored. So a run writes down which place each took, with the time of the item there:
places are given again, and to other branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from agent_sessions.agui.content import message_text
from agent_sessions.agui.messages import own_id
from agent_sessions.backends.base import Page
from agent_sessions.backends.reading import place_of
from agent_sessions.backends.run_rows import Runs
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import StoredItem
from agent_sessions.items.kinds import opens_turn, type_and_role
from agent_sessions.runs.setup import Conversation

# So many items of a run are looked through for its messages.
NAMED = 1_000


async def find_ids(
    conversation: Conversation,
    base: int | None,
    asked: Sequence[dict[str, Any]],
    said: Sequence[tuple[str, str, str]],
) -> list[list[Any]]:
    """Find what a run has stored after `base`, and under which ids that was told.

    A store that fails then doesn't fail the run, which may have ended well.
    """
    if base is None:
        return []
    read, key = conversation.backend.apage, conversation.key
    try:
        page = await read(key, after=base, limit=NAMED)
    except AgentSessionError:
        return []
    return pair(page.items, [message["id"] for message in asked], said)


def pair(
    stored: Iterable[StoredItem],
    asked: Sequence[str],
    said: Sequence[tuple[str, str, str]],
) -> list[list[Any]]:
    """Return place, id, time and agent of the messages that a run has stored.

    `asked` are the ids of the user's messages, `said` ids, texts and agents of the
    answers.
    """
    questions, answers = list(asked), list(said)
    found: list[list[Any]] = []
    for entry in stored:
        item = entry.item or {}
        name, agent = None, ""
        if opens_turn(item):
            name = questions.pop(0) if questions else None
        elif type_and_role(item) == ("message", "assistant"):
            text = message_text(item)[0]
            index = next((n for n, told in enumerate(answers) if told[1] == text), None)
            if index is not None:
                name, _, agent = answers.pop(index)
        if name and (agent or name != own_id(item.get("id"))):
            position, moment = place_of(entry)
            found.append([position, name, moment, agent])
    return found


def named(page: Page, runs: Runs, ids: Sequence[Any] = ()) -> Page:
    """Return a page whose items have the ids and agents with which they streamed.

    `ids` are those that no run's row has yet.
    """
    if not page.items:
        return page
    first, last = page.items[0].position, page.items[-1].position
    rows = runs.filter(first_position__lte=last, last_position__gte=first)
    found = list(rows.order_by("pk").values_list("message_ids", flat=True))
    known = {
        (place, moment): {"message_id": name, "agent_name": agent}
        for own in (*found, ids)
        for place, name, moment, agent in own
    }
    items = [replace(entry, **known.get(place_of(entry), {})) for entry in page.items]
    return replace(page, items=items)
