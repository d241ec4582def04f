"""Whose usage a turn's is where branches share it, are rebuilt or are deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent_sessions import DjangoSession
from agent_sessions.exceptions import BranchDoesNotExist
from agent_sessions.models import AgentRun, AgentSession
from tests.support.usages import advanced, nothing, store

pytestmark = pytest.mark.django_db(transaction=True)

# Longer than what the name of an archived branch keeps of it.
SHARED = "x" * 200


async def add(session: Any, *turns: str) -> None:
    """Write turns that nothing is recorded of."""
    for text in turns:
        await session.add_items(
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": f"on {text}"},
            ]
        )


async def told(session: Any, *branches: str) -> list[Any]:
    """Ask for everything that is told of the session and of some branches."""
    return [
        await session.get_session_usage(),
        await session.get_turn_usage(),
        *[await session.get_session_usage(name) for name in branches],
        *[await session.get_turn_usage(None, name) for name in branches],
        *[await session.get_turn_usage(1, name) for name in branches],
    ]


async def counted() -> tuple[int, int]:
    """Read what the session's row has counted."""
    row = await AgentSession.objects.aget(session_id="s")
    return row.requests, row.input_tokens


# -- the same code on both classes -----------------------------------------------------


async def again_after_a_pop_of_what_was_inherited(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await session.create_branch_from_turn(2, "side")
    await store(session, 100)
    await session.pop_item()
    seen = await told(session, "main", "side")
    await store(session, 7)
    return [*seen, *await told(session, "main", "side")]


async def again_after_a_pop_of_what_a_fork_shows(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await store(session, 1)
    await add(session, "three")
    await session.create_branch_from_turn(3, "side")
    await session.switch_to_branch("main")
    for _ in range(3):
        await session.pop_item()
    await session.add_items([{"role": "assistant", "content": "on two, again"}])
    await store(session, 2)
    return await told(session, "main", "side")


async def each_branch_of_one_turn_for_itself(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await session.create_branch_from_turn(2, "side")
    await store(session, 100)
    await session.switch_to_branch("main")
    await session.create_branch_from_turn(2, "other")
    await store(session, 10)
    await store(session, 20)
    return await told(session, "main", "side", "other")


async def after_the_deletion_of_a_fork(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await store(session, 1)
    await session.create_branch_from_turn(2, "side")
    await store(session, 100)
    await session.delete_branch("side", force=True)
    return [
        *await told(session, "main"),
        await nothing(session.get_session_usage("side")),
        await nothing(session.get_turn_usage(None, "side")),
        await nothing(session.get_turn_usage(1, "side")),
    ]


async def after_pops_on_a_fork(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await store(session, 1)
    await session.create_branch_from_turn(2, "side")
    await store(session, 100)
    await session.pop_item()
    await session.pop_item()
    return await told(session, "main", "side")


async def on_names_that_begin_alike(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await session.create_branch_from_turn(2, f"{SHARED}a")
    await store(session, 10)
    await session.switch_to_branch("main")
    await session.create_branch_from_turn(2, f"{SHARED}b")
    await store(session, 100)
    names = ("main", f"{SHARED}a", f"{SHARED}b")
    seen = await told(session, *names)
    seen.append(await nothing(session.get_session_usage(SHARED)))
    await session.switch_to_branch(f"{SHARED}a")
    # The name of the row that this archives is cut.
    await session.pop_item()
    seen += await told(session, *names)
    await store(session, 20)
    return [*seen, *await told(session, *names)]


async def on_a_name_that_begins_as_a_deleted_one(session: Any) -> list[Any]:
    await add(session, "one", "two")
    await session.create_branch_from_turn(2, f"{SHARED}a")
    await store(session, 10)
    await session.pop_item()
    await session.delete_branch(f"{SHARED}a", force=True)
    await session.create_branch_from_turn(2, f"{SHARED}b")
    return await told(session, "main", f"{SHARED}b")


SCRIPTS = [
    again_after_a_pop_of_what_was_inherited,
    again_after_a_pop_of_what_a_fork_shows,
    each_branch_of_one_turn_for_itself,
    after_the_deletion_of_a_fork,
    after_pops_on_a_fork,
    on_names_that_begin_alike,
    on_a_name_that_begins_as_a_deleted_one,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
async def test_the_same_answers_as_advanced_sqlite_session(
    script: Any, tmp_path: Path
) -> None:
    async with advanced(tmp_path) as theirs:
        expected = await script(theirs)
    assert await script(DjangoSession("s")) == expected


# -- ours ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "tokens"),
    [
        (again_after_a_pop_of_what_was_inherited, 7),
        (again_after_a_pop_of_what_a_fork_shows, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_replaces_usage_is_counted_in_its_place(
    script: Any, tokens: int
) -> None:
    await script(DjangoSession("s"))
    assert await counted() == (1, tokens)
    run = await AgentRun.objects.select_related("branch").aget()
    assert (run.input_tokens, run.branch and run.branch.archived_at) == (tokens, None)


async def test_the_session_counts_what_was_used_before_any_user_message() -> None:
    session = DjangoSession("s")
    await session.add_items([{"role": "developer", "content": "Greet."}])
    await store(session, 3)
    assert await counted() == (1, 3)
    run = await AgentRun.objects.aget()
    assert (run.turn, run.first_position, run.last_position) == (0, 1, 1)


async def test_the_session_keeps_the_count_of_what_a_deleted_fork_used() -> None:
    await after_the_deletion_of_a_fork(DjangoSession("s"))
    assert await counted() == (2, 101)


async def test_a_run_with_such_an_id_over_the_websocket_is_not_replaced() -> None:
    session = DjangoSession("s")
    await add(session, "one")
    await store(session, 5)
    # Clients choose the ids of their runs.
    await AgentRun.objects.aupdate(run_id="turn-mine", sdk_version="0.24.0")
    await store(session, 6)
    assert await counted() == (2, 11)


async def test_a_fork_takes_over_a_turn_that_its_branch_no_longer_shows() -> None:
    session = DjangoSession("s")
    await add(session, "one", "two")
    await store(session, 10)
    await add(session, "three")
    await session.create_branch_from_turn(3, "side")
    assert await session.get_session_usage("side") is None
    await session.switch_to_branch("main")
    await session.undo_turn()
    await session.undo_turn()
    assert await session.get_session_usage("main") is None
    usage = await session.get_session_usage("side")
    assert usage is not None
    assert (usage["input_tokens"], usage["total_turns"]) == (10, 1)


async def test_usage_of_a_rebuilt_branch_stays_after_an_undo_and_a_restore() -> None:
    session = DjangoSession("s")
    await again_after_a_pop_of_what_a_fork_shows(session)
    await session.delete_branch("side")
    await session.undo_turn()
    assert await session.get_session_usage() is None
    restored = await session.restore_branch((await session.list_archived())[-1])
    usage = await session.get_session_usage(restored)
    assert usage is not None
    assert usage["input_tokens"] == 2


async def test_an_archived_name_is_no_branch_to_ask_for() -> None:
    session = DjangoSession("s")
    await add(session, "one", "two")
    await store(session, 10)
    await session.undo_turn()
    await store(session, 20)
    (archived,) = await session.list_archived()
    for usage in (session.get_session_usage, session.get_turn_usage):
        with pytest.raises(BranchDoesNotExist):
            await usage(branch_id=archived)
