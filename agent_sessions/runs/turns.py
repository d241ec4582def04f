"""The turn of a run in its history: sent again, stopped in the middle, or blocked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from django.utils.module_loading import import_string

from agent_sessions.agui import output_call_id
from agent_sessions.agui.content import as_dict, message_text
from agent_sessions.backends.wrapping import innermost
from agent_sessions.items.kinds import (
    CALL_OF,
    CALLS,
    ENDED_EARLY,
    KINDS,
    OUTPUTS,
    ended_early,
    opens_turn,
    own_key,
    type_and_role,
)

if TYPE_CHECKING:
    from agents import Agent, RunConfig
    from agents.memory import Session

    from agent_sessions.memory import BackendSession
    from agent_sessions.runs.log import Event
    from agent_sessions.runs.setup import Blocked

BLOCKED_NOTE = "[blocked]"
NOT_APPROVED = "Tool execution was not approved."
UNKNOWN_RESULT = "This call was started; its result is not known."
_OUTPUT_OF = {call: output for output, call in CALL_OF.items()}


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


async def take_up(
    session: Session, items: list[dict[str, Any]], *, stopped: bool
) -> int:
    """Count the items of the turn that a failed run began with these messages.

    Return 0 if it stored none of them. Else the next run goes on with the turn, and
    no message leaves the history. The words of an answer that ended early do: the
    model answers anew. Only a person who stopped an answer asks anew by the same words.
    """
    asked, after = await newest_turn(session)
    if not _are_same(asked[-len(items) :], items) or (
        after and stopped and after[-1].get("role") == "assistant"
    ):
        return 0
    words = list(takewhile(ended_early, reversed(after)))
    for _ in words:
        await session.pop_item()
    return len(items) + len(after) - len(words)


def is_answered_here(item: Mapping[str, Any]) -> bool:
    """Return whether an item is a call whose output comes from the app."""
    kind = type_and_role(item)[0]
    return kind == "mcp_approval_request" or (
        kind in KINDS and KINDS[kind].answered_here
    )


def output_for(call: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the output that tells a model what became of a call that did not run.

    It is as the SDK writes it where a person has refused the call.
    """
    kind, call_id = own_key(call)
    made: dict[str, Any] = {"type": _OUTPUT_OF[kind]}
    if kind == "mcp_approval_request":
        made |= {"approval_request_id": call_id, "approve": False, "reason": text}
    elif kind == "shell_call":
        outcome = {"type": "exit", "exit_code": 1}
        output = {"stdout": "", "stderr": text, "outcome": outcome}
        made |= {"call_id": call_id, "output": [output]}
    else:
        made |= {"call_id": call_id, "output": text}
    if kind == "apply_patch_call":
        made["status"] = "failed"
    # An output goes back to the program that made the call.
    return made | ({"caller": call["caller"]} if call.get("caller") else {})


def missing_outputs(
    items: Iterable[Mapping[str, Any]], text: str, known: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return outputs for the calls among `items` that have none.

    Each says what is `known` of its call, by the call's id, or else `text`.
    """
    found = list(items)
    done = {own_key(item)[1] for item in found if type_and_role(item)[0] in CALL_OF}
    return [
        output_for(call, known.get(own_key(call)[1] or "", text))
        for call in found
        if is_answered_here(call) and own_key(call)[1] not in done
    ]


async def close_calls(session: Session, text: str) -> bool:
    """Store an output for each call of the newest turn that has none."""
    _, after = await newest_turn(session)
    closing: list[Any] = missing_outputs(after, text, {})
    if closing:
        await session.add_items(closing)
    return bool(closing)


class Words:
    """What a run has said in its turn, which the SDK stores at the turn's end."""

    def __init__(self) -> None:
        # What the newest response says, and the ids of its items.
        self._said: list[str] = []
        self._ids: set[str] = set()
        # All answers of the run, and who gave them, by their ids.
        self._texts: dict[str, str] = {}
        self._agents: dict[str, str] = {}

    def follow(self, event: Event) -> None:
        """Take in an event of the run."""
        if event["type"] == "TEXT_MESSAGE_START":
            self._said.append("")
            self._texts[event["messageId"]] = ""
            self._agents[event["messageId"]] = event.get("name", "")
        elif event["type"] == "TEXT_MESSAGE_CONTENT" and self._said:
            self._said[-1] += event["delta"]
            self._texts[event["messageId"]] += event["delta"]

    @property
    def told(self) -> list[tuple[str, str, str]]:
        """The ids and texts of all that the run has said, and its agents' names."""
        return [(key, text, self._agents[key]) for key, text in self._texts.items()]

    def hear(self, event: Any) -> None:
        """Take in an event of the SDK: at a new answer the turn before is stored."""
        if event.type == "raw_response_event":
            if event.data.type == "response.created":
                self._said.clear()
                self._ids.clear()
            item = getattr(event.data, "item", None)
        else:
            item = getattr(getattr(event, "item", None), "raw_item", None)
        if item is not None:
            self._ids.add(output_call_id(as_dict(item)))

    async def keep(self, session: Session, *, marked: bool) -> None:
        """Store what a turn that ends early would leave unsaid, with a mark.

        The mark is a field that the SDK takes off what it sends to a model.
        """
        _, after = await newest_turn(session) if any(self._said) else ([], [])
        stored = [message_text(i)[0] for i in takewhile(self._is_own, reversed(after))]
        kept: list[Any] = [
            {"role": "assistant", "content": text} | (ENDED_EARLY if marked else {})
            for text in self._said
            if text and text not in stored
        ]
        if kept:
            await session.add_items(kept)

    def _is_own(self, item: dict[str, Any]) -> bool:
        """Return whether an item may be of the newest response.

        Not every message has an id, but what made the model answer again has one.
        """
        is_message = item.get("type") not in CALLS | OUTPUTS
        return is_message or output_call_id(item) in self._ids


def checks_answers(agent: Agent[Any], config: RunConfig | None) -> bool:
    """Return whether an agent's answer counts only once guardrails have seen it."""
    of_run = getattr(config, "output_guardrails", None)
    return bool(agent.output_guardrails or of_run)


def changes_items(session: Session) -> bool:
    """Return whether a session of the project may store other items than it is given."""
    # Imports the SDK, which takes seconds: not before there is a run.
    from agent_sessions.memory import BackendSession

    return not isinstance(session, BackendSession) or (
        type(session) is not _kind_of(session)
    )


class Block:
    """Takes the messages whose turn a guardrail has blocked out of the history.

    What tools have done in the turn stays, below a note.
    """

    def __init__(self, items: list[dict[str, Any]], action: Blocked) -> None:
        # The run's messages; none where it answers approvals.
        self._items = items
        self._action = action
        # What is taken out, and what is put in its place.
        self._turn: list[Any] | None = None
        self._left: list[Any] = []

    async def apply(self, session: Session, count: int) -> None:
        """Take the newest `count` messages out; go on where that broke off before."""
        if self._action == "keep":
            return
        if self._turn is None:
            self._turn = await self._find(session, count)
        turn, left = self._turn, self._left
        stored: list[Any] = list(await session.get_items(limit=len(turn)))
        if left and _are_same(stored[-len(left) :], left):
            return
        sizes = range(min(len(turn), len(stored)), -1, -1)
        size = next(n for n in sizes if _are_same(stored[len(stored) - n :], turn[:n]))
        await _replace_newest(session, size, left)

    async def _find(self, session: Session, count: int) -> list[Any]:
        asked, after = await newest_turn(session)
        blocked = asked[-count:]
        if self._items and not _are_same(blocked, self._items):
            return []
        done = after if any(item.get("type") in OUTPUTS for item in after) else []
        if self._action == "redact" or done:
            self._left = [{"role": "user", "content": BLOCKED_NOTE}, *done]
        return [*blocked, *after]


def _are_same(items: Sequence[Any], others: Sequence[Any]) -> bool:
    return list(map(_said, items)) == list(map(_said, others))


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
