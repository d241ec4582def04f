"""Importing AdvancedSQLiteSession: branches that are forks, usage that is runs."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agents.extensions.memory import AdvancedSQLiteSession
from agents.usage import Usage
from asgiref.sync import sync_to_async
from django.core.management import CommandError
from openai.types.responses.response_usage import (
    InputTokensDetails,
    OutputTokensDetails,
)

from agent_sessions import DjangoSession, sessions
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from tests.support.import_sources import (
    conversation,
    imported,
    run_import,
    write_sqlite,
)

pytestmark = pytest.mark.django_db

Write = Callable[[Any], Awaitable[None]]


@pytest.fixture(autouse=True)
def fresh_backends() -> None:
    """Forget the lineages: a test that is rolled back leaves its ids to the next."""
    sessions.reset()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "advanced.sqlite3"


def write(path: Path, script: Write, session_id: str = "one") -> None:
    session = AdvancedSQLiteSession(
        session_id=session_id, db_path=path, create_tables=True
    )
    asyncio.run(script(session))  # type: ignore[arg-type]
    session.close()


def read(path: Path, session_id: str = "one") -> dict[str, list[Any]]:
    """Read every branch with the source's own class."""
    session = AdvancedSQLiteSession(session_id=session_id, db_path=path)

    async def ask() -> dict[str, list[Any]]:
        return {
            branch["branch_id"]: await session.get_items(branch_id=branch["branch_id"])
            for branch in await session.list_branches()
        }

    try:
        return asyncio.run(ask())
    finally:
        session.close()


def ours(session_id: str = "one") -> dict[str, list[Any]]:
    names = Branch.objects.filter(archived_at=None).values_list("name", flat=True)
    return {name: imported(session_id, branch=name) for name in names}


def forks() -> dict[str, tuple[str | None, int | None]]:
    return {
        branch.name: (
            branch.parent.name if branch.parent else None,
            branch.fork_position,
        )
        for branch in Branch.objects.select_related("parent")
    }


async def grow_branches(session: Any) -> None:
    await session.add_items(conversation(4))
    await session.create_branch_from_turn(3, "b1")
    await session.add_items(conversation(2, about="b1"))
    await session.create_branch_from_turn(4, "b2")
    await session.add_items(conversation(1, about="b2"))
    await session.create_branch_from_turn(2, "b3")
    await session.add_items(conversation(1, about="b3"))
    await session.switch_to_branch("main")
    await session.create_branch_from_turn(1, "fresh")
    await session.add_items(conversation(1, about="fresh"))
    await session.create_branch_from_turn(1, "empty")
    await session.switch_to_branch("main")
    await session.add_items(conversation(1, about="main"))


def test_branches_are_forks_and_nothing_is_stored_twice(path: Path) -> None:
    write(path, grow_branches)
    out, _ = run_import("advanced-sqlite", path)
    assert "sessions new 1" in out
    assert ours() == read(path)
    assert forks() == {
        "main": (None, None),
        "b1": ("main", 8),
        "b2": ("b1", 12),
        "b3": ("main", 4),
        "fresh": ("main", 0),
    }
    with closing(sqlite3.connect(path)) as source:
        (count,) = source.execute("SELECT COUNT(*) FROM agent_messages").fetchone()
    assert SessionItem.objects.count() == count == 40
    row = AgentSession.objects.get()
    assert (row.item_count, row.branch and row.branch.name) == (40, "main")
    heads = {branch.name: (branch.head, branch.turn) for branch in row.branches.all()}
    assert heads == {
        "main": (20, 5),
        "b1": (16, 4),
        "b2": (16, 4),
        "b3": (8, 2),
        "fresh": (4, 1),
    }


def test_what_writers_mixed_up_comes_as_the_source_reads_it(path: Path) -> None:
    """One message twice, another in no branch, and two out of order."""
    write(path, lambda session: session.add_items(conversation(2)))
    with closing(sqlite3.connect(path)) as source:
        for message, place in ((2, 1), (6, 5), (5, 6)):
            source.execute(
                "UPDATE message_structure SET message_id = ? WHERE sequence_number = ?",
                (message, place),
            )
        source.commit()
    run_import("advanced-sqlite", path)
    assert ours() == read(path)
    assert len(ours()["main"]) == 8
    write(path, lambda session: session.add_items(conversation(1, about="more")))
    run_import("advanced-sqlite", path)
    assert ours() == read(path)


def test_branches_that_grow_are_completed(path: Path) -> None:
    write(path, grow_branches)
    run_import("advanced-sqlite", path)

    async def fill(session: Any) -> None:
        await session.create_branch_from_turn(2, "b4")
        await session.add_items(conversation(1, about="b4"))
        await session.switch_to_branch("b1")
        await session.add_items(conversation(1, about="b1 again"))

    write(path, fill)
    out, _ = run_import("advanced-sqlite", path)
    assert "Imported 8 items: sessions new 0, grown 1" in out
    assert ours() == read(path)
    assert "unchanged 1" in run_import("advanced-sqlite", path)[0]


def test_deleted_branches_leave_nothing(path: Path) -> None:
    async def delete(session: Any) -> None:
        await grow_branches(session)
        await session.delete_branch("b2")

    write(path, delete)
    out, _ = run_import("advanced-sqlite", path)
    assert ours() == read(path)
    assert SessionItem.objects.count() == 36
    assert "left out" not in out
    assert not Branch.objects.filter(name="b2").exists()


def test_messages_of_no_branch_are_counted_and_left_out(path: Path) -> None:
    write(path, grow_branches)
    with closing(sqlite3.connect(path)) as source, source:
        source.execute(
            "INSERT INTO agent_messages (session_id, message_data) VALUES ('one', '{}')"
        )
    out, _ = run_import("advanced-sqlite", path)
    assert "In no branch of the source, left out: 1." in out
    assert ours() == read(path)


def test_a_popped_and_regrown_branch_is_refused(path: Path) -> None:
    write(path, grow_branches)
    run_import("advanced-sqlite", path)
    before = list(SessionItem.objects.order_by("pk").values())

    async def regrow(session: Any) -> None:
        await session.pop_item()
        await session.add_items(conversation(1))

    write(path, regrow)
    with pytest.raises(CommandError, match="1 session was not imported"):
        run_import("advanced-sqlite", path)
    assert list(SessionItem.objects.order_by("pk").values()) == before


def used(number: int) -> Any:
    usage = Usage(
        requests=1,
        input_tokens=number,
        input_tokens_details=InputTokensDetails.model_construct(
            cached_tokens=number - 1
        ),
        output_tokens=10 * number,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=number + 1),
        total_tokens=11 * number,
    )
    return SimpleNamespace(context_wrapper=SimpleNamespace(usage=usage))


async def use(session: Any) -> None:
    await session.add_items(conversation(1))
    await session.store_run_usage(used(5))
    await session.add_items(conversation(1))
    await session.store_run_usage(used(7))
    await session.create_branch_from_turn(2, "b1")
    await session.add_items(conversation(1, about="b1"))
    await session.store_run_usage(used(11))


def test_usage_becomes_runs_and_sums(path: Path) -> None:
    write(path, use)
    assert "runs 3." in run_import("advanced-sqlite", path)[0]
    row = AgentSession.objects.get()
    assert (row.requests, row.input_tokens, row.output_tokens) == (3, 23, 230)
    assert (row.cached_tokens, row.reasoning_tokens) == (20, 26)
    runs = {
        (run.branch and run.branch.name, run.first_position, run.last_position): run
        for run in AgentRun.objects.select_related("branch")
    }
    assert {place: run.input_tokens for place, run in runs.items()} == {
        ("main", 1, 4): 5,
        ("main", 5, 8): 7,
        ("b1", 5, 8): 11,
    }
    run = runs["b1", 5, 8]
    assert (run.status, run.usage["total_tokens"]) == ("completed", 121)
    assert run.usage["output_tokens_details"] == [{"reasoning_tokens": 12}]
    assert run.finished_at is not None
    assert run.finished_at == run.started_at


async def test_usage_is_told_by_turn_as_the_source_told_it(path: Path) -> None:
    source = AdvancedSQLiteSession(session_id="one", db_path=path, create_tables=True)
    try:
        await use(source)
        whole = await source.get_session_usage()
        turns = {
            name: await source.get_turn_usage(None, name) for name in ("main", "b1")
        }
    finally:
        source.close()
    await sync_to_async(run_import)("advanced-sqlite", path)
    session = DjangoSession("one")
    found = await session.get_session_usage()
    assert found == {name: (whole or {})[name] for name in found or {}}
    for name, expected in turns.items():
        assert await session.get_turn_usage(branch_id=name) == expected


def test_usage_that_grew_is_counted_once(path: Path) -> None:
    write(path, use)
    run_import("advanced-sqlite", path)
    assert "unchanged 1" in run_import("advanced-sqlite", path)[0]
    with closing(sqlite3.connect(path)) as source, source:
        source.execute(
            "UPDATE turn_usage SET input_tokens = 100 WHERE input_tokens = 7"
        )
    assert "grown 1" in run_import("advanced-sqlite", path)[0]
    assert AgentRun.objects.count() == 3
    assert AgentSession.objects.get().input_tokens == 23 + 93


def test_a_dry_run_of_branches_writes_nothing(path: Path) -> None:
    write(path, use)
    out, _ = run_import("advanced-sqlite", path, "--dry-run")
    assert "Would import 12 items: sessions new 1" in out
    assert "branches 2, runs 3." in out
    assert not AgentSession.objects.exists()


def test_a_plain_session_in_an_advanced_file(path: Path) -> None:
    write(path, use)
    write_sqlite(path, "plain", conversation(2))
    run_import("advanced-sqlite", path)
    assert imported("plain") == conversation(2)


def test_it_goes_on_in_the_imported_branch(path: Path) -> None:
    write(path, grow_branches)
    run_import("advanced-sqlite", path)
    more: Any = [{"role": "user", "content": "more"}]
    DjangoSession("one", branch="b2").sync.add_items(more)
    assert imported("one", branch="b2") == read(path)["b2"] + more
    assert ours() | {"b2": []} == read(path) | {"b2": []}
