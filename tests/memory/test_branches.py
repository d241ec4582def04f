"""Branches, turns and undo, beside the SDK's AdvancedSQLiteSession."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Runner
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from agent_sessions import DjangoSession
from agent_sessions.doctor import examine
from agent_sessions.exceptions import (
    BranchDoesNotExist,
    InvalidBranch,
    SessionDoesNotExist,
)
from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.support.usages import advanced

pytestmark = pytest.mark.django_db(transaction=True)


def user(text: Any) -> Any:
    return {"role": "user", "content": text}


def answer(text: str) -> Any:
    return {"role": "assistant", "content": text}


def call(name: str, call_id: str = "c", **more: Any) -> list[Any]:
    return [
        {
            "type": "function_call",
            "name": name,
            "call_id": call_id,
            "arguments": "{}",
            **more,
        },
        {"type": "function_call_output", "call_id": call_id, "output": "x"},
    ]


async def three_turns(session: Any) -> None:
    await session.add_items([user("first"), answer("one")])
    await session.add_items([user("second"), *call("lookup"), answer("two")])
    await session.add_items([user("third about Rome"), answer("three")])


def texts(items: list[Any]) -> list[str]:
    return [item.get("content") or item["type"] for item in items]


def without_times(value: Any) -> Any:
    """Drop what differs from run to run."""
    if isinstance(value, list):
        return [without_times(entry) for entry in value]
    if isinstance(value, dict):
        return {
            key: without_times(entry)
            for key, entry in value.items()
            if key not in {"timestamp", "created_at"}
        }
    return value


Scenario = Callable[[Any], Any]


async def browse(session: Any) -> Any:
    await three_turns(session)
    return [
        await session.get_conversation_turns(),
        await session.find_turns_by_content("ROME"),
        await session.find_turns_by_content("nothing"),
        await session.get_conversation_by_turns(),
        await session.get_tool_usage(),
        await session.list_branches(),
    ]


async def fork_and_go_on(session: Any) -> Any:
    await three_turns(session)
    name = await session.create_branch_from_turn(2, "other")
    await session.add_items([user("instead"), *call("weather"), answer("sun")])
    return [
        name,
        await session.get_items(),
        await session.get_items(limit=3),
        await session.get_items(branch_id="main"),
        await session.get_items(2, "main"),
        await session.list_branches(),
        await session.get_conversation_turns(),
        await session.get_tool_usage(),
        await session.get_tool_usage("main"),
        await session.get_conversation_by_turns("main"),
    ]


async def switch_and_delete(session: Any) -> Any:
    await three_turns(session)
    await session.create_branch_from_content("second", "by content")
    await session.add_items([user("b"), answer("B")])
    seen = [await session.get_items()]
    await session.switch_to_branch("main")
    seen.append(await session.get_items())
    await session.delete_branch("by content")
    seen.append(await session.list_branches())
    return seen


async def pop_on_a_branch(session: Any) -> Any:
    await three_turns(session)
    await session.create_branch_from_turn(3, "short")
    popped = [await session.pop_item() for _ in range(2)]
    return [
        popped,
        await session.get_items(),
        await session.get_items(branch_id="main"),
        await session.list_branches(),
    ]


async def lists_of_parts(session: Any) -> Any:
    parts = [{"type": "input_text", "text": "What is in Oslo?"}]
    image = {"type": "input_image", "image_url": "https://x/y.png", "detail": "auto"}
    await session.add_items([user(parts), answer("a"), user([*parts, image])])
    await session.add_items([user("Oslo " * 40)])
    return [
        await session.find_turns_by_content("oslo"),
        await session.get_conversation_turns(),
    ]


async def odd_tools(session: Any) -> Any:
    await session.add_items([user("hi"), *call("search", namespace="crm")])
    await session.add_items(
        [
            *call("loose", "c2", namespace="loose"),
            {"type": "web_search_call", "id": "ws", "status": "completed"},
            {"type": "mcp_call", "server_label": "git", "name": "log", "id": "m"},
            {"type": "shell_call", "call_id": "sh", "action": {"commands": ["ls"]}},
            {"type": "tool_search_call", "call_id": "ts"},
            {"type": "tool_search_output", "call_id": "ts"},
        ]
    )
    await session.add_items([user("again"), {"type": "tool_search_output"}])
    return sorted(await session.get_tool_usage())


@pytest.mark.parametrize(
    "scenario",
    [
        browse,
        fork_and_go_on,
        switch_and_delete,
        pop_on_a_branch,
        lists_of_parts,
        odd_tools,
    ],
    ids=lambda scenario: scenario.__name__,
)
async def test_code_for_advanced_sqlite_session_runs_unchanged(
    scenario: Scenario, tmp_path: Path
) -> None:
    async with advanced(tmp_path) as theirs:
        expected = without_times(await scenario(theirs))
    assert without_times(await scenario(DjangoSession("s"))) == expected


@pytest.mark.parametrize("kind", ["advanced", "django"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s.create_branch_from_turn(9),
        lambda s: s.create_branch_from_turn(1, " "),
        lambda s: s.create_branch_from_turn(1, "taken"),
        lambda s: s.create_branch_from_content("nowhere"),
        lambda s: s.switch_to_branch("unknown"),
        lambda s: s.delete_branch("main"),
        lambda s: s.delete_branch("unknown"),
        lambda s: s.delete_branch(""),
        lambda s: s.delete_branch("taken"),
    ],
    ids=[str(n) for n in range(9)],
)
async def test_the_same_mistakes_are_value_errors(
    kind: str, wrong: Callable[[Any], Any], tmp_path: Path
) -> None:
    async with advanced(tmp_path) as theirs:
        session: Any = theirs if kind == "advanced" else DjangoSession("s")
        await three_turns(session)
        await session.create_branch_from_turn(2, "taken")
        await session.add_items([user("b")])
        before = await session.get_items()
        with pytest.raises(ValueError, match=r"\w"):
            await wrong(session)
        assert await session.get_items() == before


async def test_the_sync_face_does_the_same() -> None:
    session = DjangoSession("s")
    await three_turns(session)

    def use(sync: Any) -> list[Any]:
        name = sync.create_branch_from_turn(2)
        sync.add_items([user("b")])
        sync.switch_to_branch("main")
        other = sync.create_branch_from_content("Rome", "rome")
        sync.switch_to_branch("main")
        sync.delete_branch("rome")
        undone = sync.undo_turn()
        return [
            name.startswith("branch_from_turn_2_"),
            other,
            undone,
            len(sync.get_items()),
            len(sync.get_items(None, name)),
            len(sync.list_branches()),
            [turn["turn"] for turn in sync.get_conversation_turns()],
            [turn["turn"] for turn in sync.find_turns_by_content("second")],
            sorted(sync.get_conversation_by_turns()),
            sync.get_tool_usage(),
            sync.list_archived(),
            sync.fork(1),
        ]

    result = await sync_to_async(use)(session.sync)
    assert result[:10] == [
        True,
        "rome",
        3,
        6,
        3,
        2,
        [1, 2],
        [2],
        [1, 2],
        [("lookup", 1, 2)],
    ]


# -- nothing is copied, nothing that is needed is lost ---------------------------------


async def test_a_fork_copies_nothing() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    before = await SessionItem.objects.acount()
    await session.create_branch_from_turn(3)
    assert await SessionItem.objects.acount() == before


async def test_the_window_goes_across_forks() -> None:
    session = DjangoSession("s")
    wanted: list[Any] = []
    for depth in range(5):
        items = [user(f"u{depth}"), answer(f"a{depth}")]
        await session.add_items(items)
        wanted += items
        await session.add_items([user("thrown away")])
        await session.create_branch_from_turn(depth + 2, f"b{depth}")
    assert await session.get_items() == wanted
    for limit in range(1, 12):
        assert await session.get_items(limit) == wanted[-limit:]
    page = await session.backend.apage(session.key, limit=4)
    assert [stored.item for stored in page.items] == wanted[-4:]
    assert page.has_earlier
    earlier = await session.backend.apage(
        session.key, before=page.items[0].position, limit=100
    )
    assert [stored.item for stored in earlier.items] == wanted[:-4]


async def test_unreadable_rows_do_not_count_across_forks() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await SessionItem.objects.filter(position__in=[2, 6]).aupdate(data="{broken")
    await session.create_branch_from_turn(3)
    await session.add_items([user("new")])
    assert texts(await session.get_items(4)) == [
        "second",
        "function_call",
        "function_call_output",
        "new",
    ]


async def test_a_pop_on_a_fork_leaves_the_parent_alone() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(3, "fork")
    for expected in ("two", "function_call_output"):
        item: Any = await session.pop_item()
        assert texts([item]) == [expected]
    await session.add_items([answer("new")])
    assert texts(await session.get_items(2)) == ["function_call", "new"]
    assert len(await session.get_items(branch_id="main")) == 8


async def test_a_pop_leaves_what_a_child_shows() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(3, "child")
    await session.switch_to_branch("main")
    for _ in range(4):
        await session.pop_item()
    assert texts(await session.get_items()) == [
        "first",
        "one",
        "second",
        "function_call",
    ]
    assert len(await session.get_items(branch_id="child")) == 6


async def test_deleting_a_parent_keeps_what_a_child_shows() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(2, "parent")
    await session.add_items([user("p1"), answer("p2"), user("p3"), answer("p4")])
    await session.create_branch_from_turn(3, "child")
    await session.add_items([user("c")])
    await session.delete_branch("parent")
    assert texts(await session.get_items()) == ["first", "one", "p1", "p2", "c"]
    row = await AgentSession.objects.aget()
    assert row.item_count == await SessionItem.objects.acount() == 11
    with pytest.raises(BranchDoesNotExist):
        await session.get_items(branch_id="parent")


async def test_names_stay_reserved_after_a_delete_and_a_clear() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(2, "draft")
    stale = DjangoSession("s", branch="draft")
    await session.delete_branch("draft", force=True)
    with pytest.raises(InvalidBranch, match="already been used"):
        await session.create_branch_from_turn(2, "draft")
    await session.clear_session()
    await three_turns(session)
    with pytest.raises(InvalidBranch, match="already been used"):
        await session.create_branch_from_turn(2, "draft")
    with pytest.raises(BranchDoesNotExist):
        await stale.add_items([user("late")])
    assert len(await session.get_items()) == 8


async def test_a_clear_goes_back_to_main_and_gives_no_position_twice() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(2, "draft")
    await session.clear_session()
    assert await session.get_items() == []
    await session.add_items([user("new")])
    assert [branch["branch_id"] for branch in await session.list_branches()] == ["main"]
    assert (await SessionItem.objects.aget()).position == 9
    assert [turn["turn"] for turn in await session.get_conversation_turns()] == [1]


async def test_a_session_on_a_branch_of_its_own_goes_on_after_its_clear() -> None:
    for clear in (lambda s: s.clear_session(), lambda s: sync_to_async(s.sync.clear)()):
        mine = DjangoSession("s", branch="main")
        await three_turns(mine)
        await mine.create_branch_from_turn(2)
        await clear(mine)
        assert await mine.get_items() == []
        await mine.add_items([user("new")])
        assert texts(await DjangoSession("s").get_items()) == ["new"]


async def test_the_branch_that_others_are_on_is_not_deleted_by_the_way() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(2, "draft")
    for branch in ("main", "draft"):
        with pytest.raises(InvalidBranch, match="Cannot delete current branch"):
            await DjangoSession("s", branch=branch).delete_branch("draft")
    await DjangoSession("s", branch="draft").delete_branch("draft", force=True)
    assert [
        (b["branch_id"], b["is_current"]) for b in await session.list_branches()
    ] == [("main", True)]
    assert len(await session.get_items()) == 8
    assert (await sync_to_async(examine)()).is_clean


async def test_a_deleted_branch_is_not_among_what_can_be_restored() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(2, "draft")
    await session.delete_branch("draft", force=True)
    assert await session.list_archived() == []
    with pytest.raises(BranchDoesNotExist):
        await session.restore_branch("draft")


async def test_what_was_replaced_keeps_the_branchs_name() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    for turn in (3, 2):
        assert await session.undo_turn() == turn
    branches = [branch async for branch in Branch.objects.order_by("pk")]
    assert {branch.name for branch in branches} == {"main"}
    assert [bool(branch.version) for branch in branches] == [True, True, False]
    archived = await session.list_archived()
    assert archived == [branch.label for branch in branches[:2]]
    assert await session.restore_branch(archived[0]) == "main_restored"
    assert len(await session.get_items()) == 8


async def test_another_process_sees_the_switch_and_an_own_branch_stays() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    await session.create_branch_from_turn(2, "draft")
    assert len(await DjangoSession("s").get_items()) == 2
    mine = DjangoSession("s", branch="main")
    assert len(await mine.get_items()) == 8
    await mine.create_branch_from_turn(3, "mine")
    assert len(await mine.get_items()) == 6
    assert len(await DjangoSession("s").get_items()) == 2
    await mine.switch_to_branch("main")
    assert len(await mine.get_items()) == 8


async def test_forks_at_the_same_time_get_names_of_their_own() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    sessions = [DjangoSession("s", branch="main") for _ in range(8)]
    names = await asyncio.gather(*(s.create_branch_from_turn(2) for s in sessions))
    assert len(set(names)) == 8
    assert len(await session.list_branches()) == 9


async def test_a_branch_belongs_to_its_owner(django_user_model: Any) -> None:
    owner = await django_user_model.objects.acreate_user("owner")
    session = DjangoSession("s", user=owner)
    await three_turns(session)
    await session.create_branch_from_turn(2, "draft")
    stranger = DjangoSession("s")
    for attempt in (
        stranger.list_branches(),
        stranger.switch_to_branch("main"),
        stranger.get_items(branch_id="draft"),
        stranger.get_conversation_turns(),
        stranger.undo_turn(),
        stranger.fork(0),
    ):
        with pytest.raises((BranchDoesNotExist, Exception), match="does not exist"):
            await attempt


# -- undo and fork by turn -------------------------------------------------------------


async def test_undo_takes_whole_turns_and_destroys_nothing() -> None:
    """openai-agents-python 2825: delete, retry and edit the last message."""
    session = DjangoSession("s")
    await three_turns(session)
    assert await session.undo_turn() == 3
    assert await session.undo_turn() == 2
    assert texts(await session.get_items()) == ["first", "one"]
    assert await SessionItem.objects.acount() == 8
    await session.add_items([user("again")])
    assert [t["turn"] for t in await session.get_conversation_turns()] == [1, 2]
    archived = await session.list_archived()
    await session.restore_branch(archived[0])
    assert len(await session.get_items()) == 8
    await session.switch_to_branch("main")
    assert texts(await session.get_items()) == ["first", "one", "again"]


async def test_undo_ends_at_the_beginning() -> None:
    session = DjangoSession("s")
    assert await session.undo_turn() is None
    await session.add_items([answer("greeting"), user("hi")])
    assert await session.undo_turn() == 1
    assert await session.undo_turn() is None
    assert texts(await session.get_items()) == ["greeting"]


async def test_a_fork_ends_with_its_turn() -> None:
    session = DjangoSession("s")
    await three_turns(session)
    name = await session.fork(2, "after two")
    assert name == "after two"
    assert texts(await session.get_items(1)) == ["two"]
    await session.add_items([user("other third")])
    assert [t["turn"] for t in await session.get_conversation_turns()] == [1, 2, 3]
    await session.fork(0)
    assert await session.get_items() == []
    await session.switch_to_branch("main")
    await session.fork(3)
    assert len(await session.get_items()) == 8
    with pytest.raises(InvalidBranch, match="turns 0 to 3"):
        await session.fork(4)
    wrong: Any
    for wrong in (True, 1.0, "1", None):
        for fork in (session.fork, session.create_branch_from_turn):
            with pytest.raises(InvalidBranch, match="whole number"):
                await fork(wrong)
    with pytest.raises(InvalidBranch, match="no items yet"):
        await DjangoSession("new").fork(0)


async def test_a_run_goes_on_after_undo() -> None:
    session = DjangoSession("s")
    replies = [[assistant_message(text)] for text in ("one", "two", "better")]
    model = ScriptedModel(replies)
    agent = Agent(name="a", model=model)
    await Runner.run(agent, "first", session=session)
    await Runner.run(agent, "second", session=session)
    await session.undo_turn()
    await Runner.run(agent, "second, please", session=session)
    seen = [item["content"] for item in model.calls[2].input if item["role"] == "user"]
    assert seen == ["first", "second, please"]


async def test_a_question_is_asked_again_and_edited_as_the_docs_say() -> None:
    session: Any = DjangoSession("s")
    replies = [[assistant_message(text)] for text in ("one", "better", "other")]
    agent = Agent(name="a", model=ScriptedModel(replies))
    await Runner.run(agent, "first", session=session)
    turns = await session.get_conversation_turns()
    question = turns[-1]["full_content"]
    await session.undo_turn()
    await Runner.run(agent, [user(question)], session=session)
    shown = await session.get_conversation_turns()
    assert [(t["turn"], t["full_content"]) for t in shown] == [(1, "first")]
    assert "better" in str(await session.get_items())
    await session.fork(at=0)
    await Runner.run(agent, "edited", session=session)
    assert "better" not in str(await session.get_items())
    assert "better" in str(await session.get_items(branch_id="main"))


async def test_turns_are_found_composed_or_not() -> None:
    session = DjangoSession("s")
    await session.add_items([user("Cafe\u0301"), user("Caf\u00e9")])
    for term in ("caf\u00e9", "Cafe\u0301"):
        assert len(await session.find_turns_by_content(term)) == 2


async def test_turns_are_read_in_pages() -> None:
    session = DjangoSession("s")
    await session.add_items([user(f"word {n}") for n in range(1, 8)])
    page = await session.get_conversation_turns(after=2, limit=3)
    assert [turn["turn"] for turn in page] == [3, 4, 5]
    found = await session.find_turns_by_content("WORD", after=5, limit=1)
    assert [turn["turn"] for turn in found] == [6]


async def test_a_fork_of_a_long_history_is_two_rows_and_few_statements(
    django_assert_num_queries: Any,
) -> None:
    session = DjangoSession("s")
    await session.add_items([user(f"u{n}") for n in range(3_000)])
    rows = await SessionItem.objects.acount()

    def fork() -> None:
        # Some of them look for the turn, the more the longer the history is.
        with django_assert_num_queries(16, exact=False):
            session.sync.create_branch_from_turn(2_999)

    await sync_to_async(fork)()
    assert await SessionItem.objects.acount() == rows
    assert await Branch.objects.acount() == 2


async def test_a_rolled_back_branch_leaves_no_trace() -> None:
    """SQLite gives the ids of a rolled-back transaction again."""
    session = DjangoSession("s")
    await three_turns(session)

    def fork_and_roll_back() -> None:
        with transaction.atomic():
            session.sync.create_branch_from_turn(3, "gone")
            assert len(session.sync.get_items()) == 6
            transaction.set_rollback(True)

    await sync_to_async(fork_and_roll_back)()
    await session.create_branch_from_turn(2, "stays")
    assert texts(await session.get_items()) == ["first", "one"]


@pytest.mark.django_db(transaction=True)
class TestLongHistories:
    """A turn is found without reading what lies before it."""

    async def test_turns_of_very_different_lengths_are_found(self) -> None:
        session = DjangoSession("uneven")
        items: list[Any] = []
        begins = {}
        for number in range(1, 90):
            begins[number] = len(items)
            items.append({"role": "user", "content": f"question {number}"})
            items += [{"type": "reasoning"}] * (
                400 if number in (3, 70) else number % 3
            )
        await session.add_items(items)
        for number in (1, 2, 3, 4, 40, 69, 70, 71, 89):
            await session.create_branch_from_turn(number, f"before {number}")
            assert len(await session.get_items()) == begins[number]
            await session.switch_to_branch("main")
        with pytest.raises(InvalidBranch, match="Turn 90"):
            await session.create_branch_from_turn(90)

    def test_finding_one_takes_few_queries(self) -> None:
        session = DjangoSession("long").sync
        session.add_items([{"role": "user", "content": str(n)} for n in range(6_000)])
        with CaptureQueriesContext(connection) as captured:
            session.create_branch_from_turn(5_000, "late")
        assert len(captured) <= 25
        assert len(session.get_items()) == 4_999


READS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("get_items", (), {}),
    ("get_items", (0,), {}),
    ("get_items", (3,), {}),
    ("get_conversation_turns", (), {}),
    ("get_conversation_turns", (), {"limit": 0}),
    ("find_turns_by_content", ("first",), {}),
    ("get_conversation_by_turns", (), {}),
    ("get_tool_usage", (), {}),
    ("get_session_usage", (), {}),
    ("get_turn_usage", (), {}),
    ("get_turn_usage", (1,), {}),
]


@pytest.mark.parametrize(("method", "args", "options"), READS)
class TestABranchThatIsNotThere:
    async def test_every_read_of_it_raises(
        self, method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        session = DjangoSession("s")
        await three_turns(session)
        await session.create_branch_from_turn(2, "gone")
        await session.delete_branch("gone", force=True)
        await session.undo_turn()
        [archived] = await session.list_archived()
        for name in ("never", "gone", archived):
            with pytest.raises(BranchDoesNotExist, match="does not exist"):
                await getattr(session, method)(*args, branch_id=name, **options)
        with pytest.raises(BranchDoesNotExist):
            await getattr(DjangoSession("new"), method)(
                *args, branch_id="never", **options
            )

    def test_without_an_event_loop_too(
        self, method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        session = DjangoSession("s").sync
        session.add_items([user("first")])
        with pytest.raises(BranchDoesNotExist):
            getattr(session, method)(*args, branch_id="never", **options)

    async def test_the_main_branch_of_an_empty_session_reads_as_empty(
        self, method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        assert not await getattr(DjangoSession("new"), method)(
            *args, branch_id="main", **options
        )

    async def test_somebody_elses_session_does_not_exist(
        self, method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        await three_turns(DjangoSession("s"))
        stranger = await get_user_model().objects.acreate_user("stranger")
        session = DjangoSession("s", user=stranger)
        for name in ("main", "never"):
            with pytest.raises(SessionDoesNotExist):
                await getattr(session, method)(*args, branch_id=name, **options)
