"""Edit, regenerate, switch: what a client asks of branches. All is synchronous."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from agent_sessions.agui import RunRequest, StreamOptions, messages_from_items
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import ended_in
from agent_sessions.backends.reading import place_of
from agent_sessions.exceptions import (
    BranchesUnsupported,
    SessionDoesNotExist,
    UnknownMessage,
)
from agent_sessions.items import StoredItem, decode
from agent_sessions.items.kinds import OPENING
from agent_sessions.models import AgentSession, Branch
from agent_sessions.runs import records, recovery
from agent_sessions.runs.setup import Conversation

# The id of a message that no run has named is this and its position.
UNNAMED = "item-"


class Fork:
    """The branch that a run begins before a message of the user, which it asks anew."""

    def __init__(
        self, conversation: Conversation, request: RunRequest, options: StreamOptions
    ) -> None:
        """Raise BranchesUnsupported where the store has none."""
        _assert_branches(conversation)
        self.conversation = conversation
        self.request = request
        self._asked = request
        self._options = options

    def begin(self, row: AgentSession) -> None:
        """Fork and switch there, within the lease's transaction.

        Nothing is copied. Raises UnknownMessage.
        """
        conversation, asked = self.conversation, self._asked
        current = row.branch_id
        branches = Branches(conversation.backend.directory, conversation.key, current)
        source = branches.current()
        if source is None:
            raise UnknownMessage("There is no message to ask again.")
        message = _find(conversation, branches, source, asked.edit)
        # Where code forks too: a page looks for its siblings there.
        last, turn = message.position - 1, max(message.turn - 1, 0)
        name = f"turn_{message.turn}_{secrets.token_hex(6)}"
        agent = _agent_at(conversation, branches, source, last)
        row.branch = branches.fork(source, last, turn, name)
        row.agent_name = agent
        if asked.regenerate:
            [shown] = messages_from_items([message], self._options)
            shown = {**shown, "id": asked.again_id}
            again: Any = [message.item]
            self.request = replace(asked, user_messages=[shown], again=again)


def switch(conversation: Conversation, name: str, stale_after: float) -> None:
    """Make a branch the current one, while no run goes on and nothing waits.

    Raises BranchesUnsupported, BranchDoesNotExist, SessionBusy and InterruptsPending.
    """
    rows = _assert_branches(conversation)
    recovery.recover(conversation, stale_after)

    def point(branches: Branches) -> None:
        row = conversation.rows().first()
        if row is None:
            raise SessionDoesNotExist(conversation.session_id)
        if row.state != AgentSession.State.IDLE:
            raise records.refusal(row)
        branches.switch(name)
        branch = branches.current()
        if branch is not None:
            agent = _agent_at(conversation, branches, branch, branch.head)
            conversation.rows().update(agent_name=agent)

    rows.change(conversation.key, point)


def _assert_branches(conversation: Conversation) -> Any:
    if conversation.backend.in_database is None:
        raise BranchesUnsupported(
            f"The backend {conversation.backend.alias!r} keeps no branches. Use one "
            "over a database, without encryption."
        )
    return conversation.backend.in_database


def _find(
    conversation: Conversation, branches: Branches, source: Branch, message_id: str
) -> StoredItem:
    """Find a message of the user by the id that clients know; the last one without."""
    rows = branches.items(source).filter(**OPENING).order_by("-position")
    columns = ("position", "turn", "data", "created_at")

    def read(**wanted: Any) -> Iterator[StoredItem]:
        for position, turn, data, moment in rows.filter(**wanted).values_list(*columns):
            item = decode(data)
            if item is not None:
                yield StoredItem(position, turn, item, data, moment)

    def candidates() -> Iterator[StoredItem]:
        if not message_id:
            yield from read()
            return
        runs = conversation.runs().exclude(message_ids=[]).order_by("-pk")
        for own in runs.values_list("message_ids", flat=True).iterator():
            for position, name, moment, _ in own:
                if name == message_id:
                    found = read(position=position)
                    yield from (e for e in found if place_of(e) == (position, moment))
        number = message_id.removeprefix(UNNAMED)
        if number != message_id and number.isdecimal() and len(number) < 19:
            yield from read(position=int(number))
        # What came from elsewhere has an id of its own.
        for entry in read(data__contains=json.dumps(message_id)):
            if entry.item is not None and entry.item.get("id") == message_id:
                yield entry

    found = next(candidates(), None)
    if found is None:
        raise UnknownMessage("No message of the user on the current branch has the id.")
    return found


def _agent_at(
    conversation: Conversation, branches: Branches, branch: Branch, position: int
) -> str:
    """Return the agent that a history goes on with after a position, "" for the first."""
    seen = ended_in(branches.segments(branch), upto=position)
    runs = conversation.runs().filter(seen).order_by("-last_position")
    return runs.values_list("agent_name", flat=True).first() or ""
