"""What runs used, by turn and branch, beside the SDK's AdvancedSQLiteSession."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agents import Runner
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model

from agent_sessions import DjangoSession
from agent_sessions.exceptions import SessionDoesNotExist
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.usage import since, snapshot
from tests.support.usages import advanced, agent, ask, call, nothing, say, store, used

pytestmark = pytest.mark.django_db(transaction=True)


async def user(session: Any, text: str) -> None:
    await session.add_items([{"role": "user", "content": text}])


# -- the same code on both classes -----------------------------------------------------


async def two_turns(session: Any) -> list[Any]:
    first = await ask(session, "one", used(50, 30, cached=10, reasoning=5))
    await session.store_run_usage(first)
    second = await ask(session, "two", used(75, 45))
    await session.store_run_usage(second)
    return [
        await session.get_session_usage(),
        await session.get_session_usage("main"),
        await nothing(session.get_session_usage("nowhere")),
        await session.get_turn_usage(1),
        await session.get_turn_usage(user_turn_number=2, branch_id="main"),
        await session.get_turn_usage(3),
        await session.get_turn_usage(),
        await nothing(session.get_turn_usage(branch_id="nowhere")),
    ]


async def nothing_yet(session: Any) -> list[Any]:
    before = [await session.get_session_usage(), await session.get_turn_usage()]
    # A run that no user message belongs to is nobody's turn.
    other = DjangoSession("other") if isinstance(session, DjangoSession) else None
    result = await ask(other, "elsewhere")
    await session.store_run_usage(result)
    return [*before, await session.get_session_usage(), await session.get_turn_usage(1)]


async def said_twice(session: Any) -> list[Any]:
    result = await ask(session, "one")
    await session.store_run_usage(result)
    await session.store_run_usage(result)
    seen = [await session.get_session_usage()]
    # The turn's last word counts, as for a resumed run, which counts on.
    result.context_wrapper.usage.add(used())
    await session.store_run_usage(result)
    return [*seen, await session.get_session_usage(), await session.get_turn_usage()]


async def after_a_clear(session: Any) -> list[Any]:
    """openai-agents #4821, PR #3755: after a clear, accounts were wrong."""
    stale = await ask(session, "one")
    await session.store_run_usage(stale)
    await session.clear_session()
    seen = [await session.get_session_usage(), await session.get_turn_usage()]
    await session.store_run_usage(stale)
    seen.append(await session.get_session_usage())
    await session.store_run_usage(await ask(session, "new", used(3, 2)))
    return [*seen, await session.get_session_usage(), await session.get_turn_usage()]


async def after_a_clear_on_a_branch(session: Any) -> list[Any]:
    """openai-agents #4981: the same for the accounts of branches."""
    await session.store_run_usage(await ask(session, "one"))
    await user(session, "two")
    await session.create_branch_from_turn(2, "side")
    await session.store_run_usage(await ask(session, "on the side", used(100, 1)))
    await session.clear_session()
    seen = [
        await session.get_session_usage(),
        await nothing(session.get_session_usage("side")),
    ]
    await session.store_run_usage(await ask(session, "new"))
    return [
        *seen,
        await session.get_session_usage(),
        await nothing(session.get_session_usage("side")),
        await session.get_turn_usage(),
    ]


async def after_pops(session: Any) -> list[Any]:
    """A turn that was popped takes its usage with it; a half one keeps it."""
    await session.store_run_usage(await ask(session, "one"))
    await session.store_run_usage(await ask(session, "two", used(100, 1)))
    await session.pop_item()
    seen = [await session.get_turn_usage(2)]
    await session.pop_item()
    seen += [await session.get_turn_usage(2), await session.get_session_usage()]
    await user(session, "two again")
    return [*seen, await session.get_turn_usage(2), await session.get_turn_usage()]


async def on_branches(session: Any) -> list[Any]:
    await session.store_run_usage(await ask(session, "one", used(1)))
    await session.store_run_usage(await ask(session, "two", used(10)))
    await session.create_branch_from_turn(2, "side")
    # A copy of what main has, but none of its usage.
    seen = [await session.get_turn_usage(), await session.get_session_usage("side")]
    await session.store_run_usage(await ask(session, "two, otherwise", used(100)))
    seen += [
        await session.get_turn_usage(),
        await session.get_turn_usage(2, "main"),
        await session.get_session_usage("main"),
        await session.get_session_usage("side"),
        await session.get_session_usage(),
    ]
    await session.switch_to_branch("main")
    seen.append(await session.get_turn_usage())
    await session.delete_branch("side")
    return [
        *seen,
        await session.get_session_usage(),
        await nothing(session.get_turn_usage(branch_id="side")),
    ]


async def on_a_fresh_branch(session: Any) -> list[Any]:
    """The last turn of a new branch is one it has from its parent."""
    await session.store_run_usage(await ask(session, "one", used(1)))
    late = await ask(session, "two", used(10))
    await session.create_branch_from_turn(2, "side")
    await session.store_run_usage(late)
    return [await session.get_turn_usage(), await session.get_turn_usage(None, "main")]


async def with_tools(session: Any) -> list[Any]:
    from tests.support.approvals import lookup

    result = await Runner.run(
        agent(call("lookup", order="1"), say("ok"), tools=[lookup]),
        "x",
        session=session,
    )
    await session.store_run_usage(result)
    return [await session.get_session_usage(), await session.get_turn_usage(1)]


async def without_usage(session: Any) -> list[Any]:
    result = await ask(session, "one")
    result.context_wrapper.usage = None  # type: ignore[assignment]
    await session.store_run_usage(result)
    return [await session.get_session_usage()]


async def without_details(session: Any) -> list[Any]:
    result = await ask(session, "one")
    usage: Any = result.context_wrapper.usage
    usage.input_tokens_details = usage.output_tokens_details = None
    await session.store_run_usage(result)
    return [await session.get_session_usage(), await session.get_turn_usage()]


async def of_a_result_that_names_no_agent(session: Any) -> list[Any]:
    counted = (await ask(session, "one")).context_wrapper.usage
    await session.store_run_usage(
        SimpleNamespace(context_wrapper=SimpleNamespace(usage=counted))
    )
    return [await session.get_session_usage(), await session.get_turn_usage()]


async def before_any_user_message(session: Any) -> list[Any]:
    """What is used before the first turn is that of turn 0."""
    await session.add_items(
        [
            {"role": "developer", "content": "Greet."},
            {"role": "assistant", "content": "Welcome!"},
        ]
    )
    await store(session, 3)
    await store(session, 4)
    seen = [await session.get_turn_usage(0), await session.get_session_usage()]
    await session.store_run_usage(await ask(session, "one"))
    seen += [await session.get_turn_usage(), await session.get_session_usage("main")]
    await session.create_branch_from_turn(1, "side")
    seen += [await session.get_turn_usage(), await session.get_session_usage()]
    await session.switch_to_branch("main")
    for _ in range(3):
        await session.pop_item()
    seen.append(await session.get_turn_usage())
    await session.pop_item()
    return [*seen, await session.get_turn_usage(0, "main")]


SCRIPTS = [
    two_turns,
    nothing_yet,
    said_twice,
    after_a_clear,
    after_a_clear_on_a_branch,
    after_pops,
    on_branches,
    on_a_fresh_branch,
    with_tools,
    without_usage,
    without_details,
    of_a_result_that_names_no_agent,
    before_any_user_message,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
async def test_the_same_answers_as_advanced_sqlite_session(
    script: Any, tmp_path: Path
) -> None:
    async with advanced(tmp_path) as theirs:
        expected = await script(theirs)
    assert await script(DjangoSession("s")) == expected


# -- ours ------------------------------------------------------------------------------


async def test_the_shapes_of_the_answers() -> None:
    session = DjangoSession("s")
    counted = used(50, 30, cached=10, reasoning=5)
    await session.store_run_usage(await ask(session, "one", counted))
    usage = {
        "requests": 1,
        "input_tokens": 50,
        "output_tokens": 30,
        "total_tokens": 80,
    }
    details = {
        "input_tokens_details": vars(counted.input_tokens_details),
        "output_tokens_details": {"reasoning_tokens": 5},
    }
    assert await session.get_session_usage() == {**usage, "total_turns": 1}
    assert await session.get_turn_usage(1) == {**usage, **details}
    assert await session.get_turn_usage() == [
        {"user_turn_number": 1, **usage, **details}
    ]


async def test_the_run_has_a_row_and_the_session_counts() -> None:
    session = DjangoSession("s")
    result = await ask(session, "one", used(50, 30, cached=10, reasoning=5))
    await session.store_run_usage(result)
    await session.store_run_usage(result)
    run = await AgentRun.objects.aget()
    assert (run.status, run.agent_name, run.model) == (
        "completed",
        "speaker",
        "ScriptedModel",
    )
    assert (run.turn, run.first_position, run.last_position) == (1, 1, 2)
    assert (run.requests, run.input_tokens, run.total_tokens) == (1, 50, 80)
    assert len(run.usage["request_usage_entries"]) == 1
    row = await AgentSession.objects.aget()
    assert (row.requests, row.input_tokens, row.output_tokens) == (1, 50, 30)
    assert (row.cached_tokens, row.reasoning_tokens) == (10, 5)


async def test_the_sessions_counters_forget_nothing() -> None:
    session = DjangoSession("s")
    await session.store_run_usage(await ask(session, "one"))
    await session.clear_session()
    assert await session.get_session_usage() is None
    await session.store_run_usage(await ask(session, "two"))
    row = await AgentSession.objects.aget()
    assert (row.requests, row.input_tokens) == (2, 14)
    assert await AgentRun.objects.acount() == 2


async def test_a_restored_turn_brings_its_usage_back() -> None:
    session = DjangoSession("s")
    await two_turns(session)
    before = await session.get_session_usage()
    await session.undo_turn()
    (archived,) = await session.list_archived()
    restored = await session.restore_branch(archived)
    assert await session.get_session_usage() == before
    turns: Any = await session.get_turn_usage()
    assert [turn["user_turn_number"] for turn in turns] == [2]
    assert await session.get_session_usage(restored) == {
        "requests": 1,
        "input_tokens": 75,
        "output_tokens": 45,
        "total_tokens": 120,
        "total_turns": 1,
    }


async def test_an_undone_turn_takes_its_usage_with_it() -> None:
    session = DjangoSession("s")
    await session.store_run_usage(await ask(session, "one", used(1)))
    await session.store_run_usage(await ask(session, "two", used(10)))
    assert await session.undo_turn() == 2
    kept = await session.get_session_usage()
    assert kept is not None
    assert (kept["input_tokens"], kept["total_turns"]) == (1, 1)
    assert await session.get_turn_usage(2) == {}
    await session.store_run_usage(await ask(session, "two again", used(100)))
    turns = await session.get_turn_usage()
    assert [turn["input_tokens"] for turn in turns] == [1, 100]  # type: ignore[index]
    usage = await session.get_session_usage("main")
    assert usage is not None
    assert usage["input_tokens"] == 101


async def test_the_sync_methods_do_the_same() -> None:
    session = DjangoSession("s")
    result = await ask(session, "one")

    def synchronously() -> list[Any]:
        session.sync.store_run_usage(result)
        return [
            session.sync.get_session_usage(),
            session.sync.get_turn_usage(1),
            session.sync.get_turn_usage(),
        ]

    assert await sync_to_async(synchronously)() == [
        await session.get_session_usage(),
        await session.get_turn_usage(1),
        await session.get_turn_usage(),
    ]
    assert await AgentRun.objects.acount() == 1


async def test_usage_of_someone_else_is_not_told() -> None:
    owner = await get_user_model()._default_manager.acreate(username="owner")
    mine = DjangoSession("s", user=owner)
    result = await ask(mine, "one")
    await mine.store_run_usage(result)
    session = DjangoSession("s")
    for attempt in (
        session.store_run_usage(result),
        session.get_session_usage(),
        session.get_turn_usage(),
    ):
        with pytest.raises(SessionDoesNotExist):
            await attempt


async def test_a_released_agent_is_not_missed() -> None:
    session = DjangoSession("s")
    result = await ask(session, "one")
    result.release_agents()
    await session.store_run_usage(result)
    assert (await AgentRun.objects.aget()).input_tokens == 7


def test_what_was_used_since() -> None:
    before = used(50, 30, cached=10, reasoning=5)
    usage = snapshot(before)
    usage.add(used(7, 1, cached=2))
    rest = since(usage, before)
    assert (rest.requests, rest.input_tokens, rest.output_tokens) == (1, 7, 1)
    assert (rest.total_tokens, rest.input_tokens_details.cached_tokens) == (8, 2)
    assert rest.output_tokens_details.reasoning_tokens == 0
    assert before.requests == 1
