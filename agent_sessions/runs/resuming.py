"""Go on from a run that was paused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from django.views.decorators.debug import sensitive_variables

from agent_sessions import approvals
from agent_sessions.agui import FrameError, RunRequest, call_id_of, calls_of, interrupts
from agent_sessions.agui.content import as_dict
from agent_sessions.approvals import Pending
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import (
    InterruptExpired,
    InvalidApproval,
    UnknownInterrupt,
    UnreadableState,
)
from agent_sessions.items.kinds import own_key
from agent_sessions.runs import recovery
from agent_sessions.runs.failures import refusal_code
from agent_sessions.runs.setup import Conversation, RunSetup
from agent_sessions.runs.turns import NOT_APPROVED, is_answered_here, output_for

if TYPE_CHECKING:
    from agents import RunHooks, RunState


@sensitive_variables()
def dump_state(state: RunState[Any]) -> str:
    """Serialise a paused run without its context, which resuming gives anew.

    A context may hold what can't be stored, and whom a later answer must not trust.
    """
    data = state.to_json(context_serializer=lambda context: {})
    if data["context"]["context"] is not None:
        data["context"]["context"] = {}
    return json.dumps(data)


def find_waiting(conversation: Conversation, stale_after: float) -> Pending:
    """Return the paused run of a conversation. Raise UnknownInterrupt if there is none.

    Raise InterruptExpired and InvalidApproval with the approval withdrawn.
    """
    backend, key = conversation.backend, conversation.key
    run = approvals.newest_waiting(backend, conversation.pk)
    if run is None:
        # What a run that died was to carry out waits again.
        recovery.free(conversation, stale_after)
        run = approvals.newest_waiting(backend, conversation.pk)
    if run is None:
        raise UnknownInterrupt("Nothing waits for approval in this conversation.")
    try:
        found = approvals.open_pending(backend, key, run)
    except InvalidApproval:
        recovery.withdraw(
            conversation, run.session.fence, error_code="invalid_approval"
        )
        raise
    if found is None:
        recovery.withdraw(conversation, run.session.fence)
        raise InterruptExpired(
            "The time to approve this is over. Nothing was done; ask again."
        )
    return found


def claimable(
    conversation: Conversation, request: RunRequest, stale_after: float
) -> Pending | None:
    """Find the paused run whose open interrupts are exactly those that a run answers.

    Return None if the run's id was used before. Raise UnknownInterrupt, and with the
    approval withdrawn InterruptExpired and InvalidApproval; AG-UI asks that all open
    ones be answered at once.
    """
    if conversation.runs().filter(run_id=request.run_id).exists():
        return None
    found = find_waiting(conversation, stale_after)
    answered = {entry["interruptId"] for entry in request.resume}
    if answered != {interrupt["id"] for interrupt in found.interrupts}:
        raise UnknownInterrupt(
            "Answer every open approval of this conversation, and no other."
        )
    return found


@sensitive_variables()
async def restore(
    pending: Pending, request: RunRequest, setup: RunSetup
) -> RunState[Any]:
    """Rebuild a paused run's state with the answers to its approvals.

    The state never left the server; clients only send which calls they approve.
    Raises UnreadableState, FrameError, and InvalidApproval where it waits for other calls than
    those that a person was shown.
    """
    from agents import RunState

    try:
        state: RunState[Any] = await RunState.from_string(
            setup.agent, pending.paused.state, context_override=setup.context
        )
        restored = interrupts(state.get_interruptions())
    except Exception as exc:
        # Whatever the SDK stumbles over in a state of another version.
        raise UnreadableState(
            f"The paused run can't be resumed ({type(exc).__name__}). It was stored "
            f"with openai-agents {pending.run.sdk_version} and the agents of that time. "
            "It was withdrawn; ask again."
        ) from None
    if calls_of(restored) != calls_of(pending.interrupts):
        raise InvalidApproval(pending.run.run_id)
    if gone := [i.name for i in state.get_interruptions() if _is_gone(i)]:
        raise UnreadableState(
            f"The agent has no tool {gone[0]!r} any more. The approval was withdrawn; "
            "ask again."
        )
    try:
        _give_answers(state, pending, request)
    except Exception as exc:
        # The SDK keeps no lasting answer about a tool without a name of its own.
        raise FrameError(
            "bad_request",
            f"The SDK doesn't take this answer ({type(exc).__name__}). Answer without "
            '"always".',
            run_id=request.run_id,
        ) from None
    return state


def _give_answers(state: RunState[Any], pending: Pending, request: RunRequest) -> None:
    """Apply the lasting answers first, then each call's own.

    A lasting one makes the SDK forget what was said about single calls of its tool: a
    call that was refused would run. Where lasting ones contradict each other, the
    refusal is kept.
    """
    answers = {entry["interruptId"]: entry for entry in request.resume}
    given = [
        (
            item,
            _decision(
                answers[each["id"]]
                for each in pending.interrupts
                if each["toolCallId"] == call_id_of(item)
            ),
        )
        for item in state.get_interruptions()
    ]
    lasting = [(item, answer) for item, answer in given if _is_lasting(answer)]
    for item, answer in sorted(lasting, key=lambda each: not _is_approved(each[1])):
        _answer(state, item, answer, always=True)
    for item, answer in given:
        _answer(state, item, answer, always=False)


def _decision(answers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Choose what holds for a call's id, which several calls may have: a refusal."""
    found = list(answers)
    refusals = [answer for answer in found if not _is_approved(answer)]
    return next(filter(_is_lasting, refusals or found), (refusals or found)[0])


def _answer(
    state: RunState[Any], item: Any, answer: dict[str, Any], *, always: bool
) -> None:
    if _is_approved(answer):
        state.approve(item, always_approve=always)
        return
    reason = (answer.get("payload") or {}).get("reason") or None
    state.reject(item, always_reject=always, rejection_message=reason)


def before_tools(
    call: Callable[[], Awaitable[None]], hooks: RunHooks[Any] | None
) -> RunHooks[Any]:
    """Return hooks that call something before each tool, and do what `hooks` do."""
    from agents import RunHooks

    inner: RunHooks[Any] = RunHooks() if hooks is None else hooks
    made: Any = RunHooks()
    for name in dir(inner):
        if name.startswith("on_"):
            setattr(made, name, getattr(inner, name))

    async def on_tool_start(*args: Any, **kwargs: Any) -> None:
        await call()
        await inner.on_tool_start(*args, **kwargs)

    made.on_tool_start = on_tool_start
    return made  # type: ignore[no-any-return]


def refuses_all(request: RunRequest) -> bool:
    """Return whether a run only refuses and cancels what is asked."""
    return not any(map(_is_approved, request.resume))


def refusals(
    pending: Pending, request: RunRequest, turn: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return what tells a model that its calls were refused, where no state does.

    `turn` is what the history has of the turn: the calls, unless they were not stored.
    """
    answers = {entry["interruptId"]: entry for entry in request.resume}
    calls = {own_key(i)[1]: i for i in turn if is_answered_here(i)}
    made: list[dict[str, Any]] = []
    for asked in pending.interrupts:
        call = calls.get(asked["toolCallId"])
        reason = (answers[asked["id"]].get("payload") or {}).get("reason")
        if call is None:
            tool = asked["metadata"]
            call = {
                "type": "function_call",
                "call_id": asked["toolCallId"],
                "name": tool["toolName"],
                "arguments": tool["arguments"],
            }
            made.append(call)
        made.append(output_for(call, reason or NOT_APPROVED))
    return made


def _is_gone(item: Any) -> bool:
    """Return whether the agent has lost the tool that an approval is about.

    Servers offer tools of their own, which aren't asked for here.
    """
    kind = as_dict(item.raw_item).get("type")
    if item.agent.mcp_servers or kind == "mcp_approval_request":
        return False
    return item.name not in {tool.name for tool in item.agent.tools}


def _is_approved(answer: dict[str, Any]) -> bool:
    payload = answer.get("payload") or {}
    return answer["status"] == "resolved" and payload.get("approved") is True


def _is_lasting(answer: dict[str, Any]) -> bool:
    return (answer.get("payload") or {}).get("always") is True


async def restore_or_withdraw(
    conversation: Conversation,
    waiting: Pending,
    request: RunRequest,
    setup: RunSetup,
) -> RunState[Any] | None:
    """Rebuild a paused run; None where it can't be, but need not be.

    One that can't be, or would do what nobody was shown, is withdrawn.
    """
    try:
        return await restore(waiting, request, setup)
    except (InvalidApproval, UnreadableState) as exc:
        # The agent that it needs may be opened with the run.
        may_wait = refuses_all(request) or setup.open_run is not None
        if isinstance(exc, UnreadableState) and may_wait:
            return None
        withdraw = partial(
            recovery.withdraw,
            conversation,
            waiting.fence,
            error_code=refusal_code(exc) or "",
        )
        await settle(conversation.backend.threads.run(withdraw))
        raise
