"""The turn of a run in its history: sent again, stopped in the middle, or blocked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from django.utils.module_loading import import_string

from agent_sessions.agui.content import message_text
from agent_sessions.backends.wrapping import innermost
from agent_sessions.items.kinds import ENDED_EARLY, OUTPUTS, ended_early, opens_turn

if TYPE_CHECKING:
    from agents import Agent, RunConfig
    from agents.memory import Session

    from agent_sessions.memory import BackendSession
    from agent_sessions.runs.log import Event
    from agent_sessions.runs.setup import Blocked

BLOCKED_NOTE = "[blocked]"


async def newest_turn(session: Session) -> tuple[list[Any], list[Any]]:
    """Read the newest messages of the user that stand together, and what came after."""
    limit, known = 16, -1
    while True:
        stored: list[Any] = list(await session.get_items(limit=limit))
        after = list(takewhile(lambda item: not opens_turn(item), reversed(stored)))
        older = reversed(stored[: len(stored) - len(after)])
        asked = list(takewhile(opens_turn, older))[::-1]
        if len(asked) + len(after) < len(stored) or len(stored) == known:
            return asked, after[::-1]
        limit, known = limit * 4, len(stored)


def _said(item: Any) -> Any:
    """Return what a message says, however its store writes it.

    OpenAI's makes parts of a text, and adds an id and a status.
    """
    if item.get("role") != "user":
        return item
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    return item["role"], [
        {name: value for name, value in part.items() if value is not None}
        if isinstance(part, dict)
        else part
        for part in content or ()
    ]


class Words:
    """What a run has said in its turn, which the SDK stores at the turn's end."""

    def __init__(self) -> None:
        self._said: list[str] = []
        # All answers of the run, by their ids.
        self._texts: dict[str, str] = {}
        # Messages that were taken back, until the Runner has stored them again.
        self._asked: list[Any] = []

    async def take_up(
        self, session: Session, items: list[dict[str, Any]], *, stopped: bool
    ) -> tuple[bool, list[dict[str, Any]]]:
        """Return what is left to say of a message that a failed run was given before.

        A message that nothing followed is taken back, since the Runner stores it again,
        and so are the words of an answer that ended early. Where its turn came further
        nothing is left: the run goes on with that turn. Tell whether it is such a
        message. Only a person who stopped an answer asks anew by the same words.
        """
        asked, after = await newest_turn(session)
        same = len(items) <= len(asked) and list(map(_said, items)) == list(
            map(_said, asked[-len(items) :])
        )
        if not same or (after and stopped and after[-1].get("role") == "assistant"):
            return False, items
        words = list(takewhile(ended_early, reversed(after)))
        for _ in words:
            await session.pop_item()
        if len(after) > len(words):
            return True, []
        self._asked = items
        for _ in items:
            await session.pop_item()
        return True, items

    def follow(self, event: Event) -> None:
        """Take in an event of the run."""
        if event["type"] == "TEXT_MESSAGE_START":
            self._said.append("")
            self._texts[event["messageId"]] = ""
        elif event["type"] == "TEXT_MESSAGE_CONTENT" and self._said:
            self._said[-1] += event["delta"]
            self._texts[event["messageId"]] += event["delta"]

    @property
    def told(self) -> list[tuple[str, str]]:
        """The ids and texts of all that the run has said."""
        return list(self._texts.items())

    def hear(self, event: Any) -> None:
        """Take in an event of the SDK: at a new answer the turn before is stored."""
        if event.type != "agent_updated_stream_event":
            self._asked = []
        if event.type == "raw_response_event" and event.data.type == "response.created":
            self._said.clear()

    async def give_back(self, session: Session) -> None:
        """Store a message that was taken back, if the Runner has not come to that."""
        if not self._asked:
            return
        asked, after = await newest_turn(session)
        newest = [] if after else asked[-len(self._asked) :]
        if list(map(_said, newest)) != list(map(_said, self._asked)):
            await session.add_items(self._asked)

    async def keep(self, session: Session, *, marked: bool) -> None:
        """Store what a turn that ends early would leave unsaid, with a mark.

        The mark is a field that the SDK takes off what it sends to a model.
        """
        _, after = await newest_turn(session) if any(self._said) else ([], [])
        stored = {message_text(i)[0] for i in after if i.get("role") == "assistant"}
        kept: list[Any] = [
            {"role": "assistant", "content": text} | (ENDED_EARLY if marked else {})
            for text in self._said
            if text and text not in stored
        ]
        if kept:
            await session.add_items(kept)


def checks_answers(agent: Agent[Any], config: RunConfig | None) -> bool:
    """Return whether an agent's answer counts only once guardrails have seen it."""
    of_run = getattr(config, "output_guardrails", None)
    return bool(agent.output_guardrails or of_run)


async def clear_blocked(
    session: Session, items: Sequence[dict[str, Any]], action: Blocked
) -> None:
    """Take the message whose turn a guardrail has blocked out of the history.

    `items` are empty where the run answered approvals: it is the turn's message then.
    What tools have done in the turn stays, below a note.
    """
    if action == "keep":
        return
    asked, after = await newest_turn(session)
    count = len(items) or len(asked)
    if items and list(map(_said, asked[-count:])) != list(map(_said, items)):
        return
    done = after if any(item.get("type") in OUTPUTS for item in after) else []
    note: Any = {"role": "user", "content": BLOCKED_NOTE}
    left = [note, *done] if action == "redact" or done else []
    await _replace_newest(session, count + len(after), left)


async def _replace_newest(session: Session, count: int, items: list[Any]) -> None:
    """Put items in the place of the newest ones.

    In the database it is one transaction: tools were called, and a process that dies
    half-way must not forget that. A session around ours is asked step by step.
    """
    # Imports the SDK, which takes seconds: not before there is a run.
    from agent_sessions.memory import BackendSession

    own = session if isinstance(session, BackendSession) else None
    rows = None if own is None else innermost(own.backend).in_database
    if own is None or rows is None or type(own) is not _kind_of(own):
        for _ in range(count):
            await session.pop_item()
        if items:
            await session.add_items(items)
        return
    store, key = own.backend, own.key

    def replace() -> None:
        for _ in range(count):
            store.pop(key)
        store.append(key, items)

    await store.threads.finish(rows.engine.atomically, replace)


def _kind_of(session: BackendSession) -> type:
    kind: type = import_string(session.backend.session_class)
    return kind
