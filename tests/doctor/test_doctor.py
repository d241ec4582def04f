"""The doctor: what it finds in stored histories, and what a repair makes of it."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from agents import Runner, SessionSettings
from asgiref.sync import sync_to_async
from django.core.exceptions import MultipleObjectsReturned, ObjectDoesNotExist
from django.db.models import F

from agent_sessions import DjangoSession
from agent_sessions.backends.leases import RUN_SILENCE
from agent_sessions.doctor import CODES, Report, examine, restore
from agent_sessions.doctor.session import RUN_LENGTH
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.testing.base import add, call, outline, say, scripted
from tests.support.waiting import wait

pytestmark = pytest.mark.django_db(transaction=True)


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def answer(text: str) -> Any:
    return {"role": "assistant", "content": text}


def calling(call_id: str) -> Any:
    return {
        "type": "function_call",
        "name": "add",
        "call_id": call_id,
        "arguments": "{}",
    }


def output(call_id: str) -> Any:
    return {"type": "function_call_output", "call_id": call_id, "output": "1"}


def open_session(*batches: list[Any], name: str = "s") -> DjangoSession:
    session = DjangoSession(name)
    for batch in batches:
        session.sync.add_items(batch)
    return session


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def rows() -> list[tuple[Any, ...]]:
    """Return every stored column but the branch."""
    return list(SessionItem.objects.order_by("pk").values_list())


def mend_once() -> Report:
    """Examine, repair, and see that the dry run wrote nothing and one repair is enough."""
    before = rows(), list(AgentSession.objects.values()), list(Branch.objects.values())
    dry = examine()
    assert before == (
        rows(),
        list(AgentSession.objects.values()),
        list(Branch.objects.values()),
    )
    assert not any(finding.repaired for finding in dry.findings)
    done = examine(repair=True)
    assert codes(done) == codes(dry)
    assert done.is_clean
    again = examine()
    assert again.left == []
    assert again.quarantined == done.quarantined
    return dry


def test_healthy_histories_have_no_findings() -> None:
    """Forks, undone turns, pops and a clear leave nothing that looks like damage."""
    session = open_session(
        [user("a"), calling("c1"), output("c1"), answer("A")], [user("b"), answer("B")]
    )
    session.sync.create_branch_from_turn(2, "other")
    session.sync.add_items([user("c"), calling("c2"), output("c2"), answer("C")])
    session.sync.undo_turn()
    session.sync.switch_to_branch("main")
    session.sync.pop_item()
    session.sync.add_items([answer("B2"), user("c")])
    open_session([user("x"), answer("X")], name="cleared").sync.clear()
    open_session([], name="unwritten")
    report = examine(batch_size=2)
    assert report.findings == []
    assert report.is_clean
    assert (report.sessions, report.items) == (2, 11)


async def test_an_orphan_output_no_longer_reaches_the_model() -> None:
    """#4827: an output stored without its call is sent with every request, for ever."""
    session = DjangoSession("s")
    await session.add_items([user("add"), output("lost"), answer("done")])
    agent, model = scripted([say("one")])
    await Runner.run(agent, "more", session=session)
    assert "output lost 1" in outline(model.calls[0].input)
    before = await session.get_items()
    report = await sync_to_async(mend_once)()
    assert codes(report) == ["orphan_output"]
    (finding,) = report.findings
    assert (finding.branch, finding.position) == ("main", 2)
    after = await session.get_items()
    assert json.dumps(after) == json.dumps([before[0], *before[2:]])
    agent, model = scripted([say("two")])
    await Runner.run(agent, "again", session=session)
    assert outline(model.calls[0].input) == [*outline(after), "user again"]


async def test_a_run_that_failed_is_retried_without_its_message_twice() -> None:
    """#4827, #1699: a run that fails leaves its message; the retry stores it again."""
    session = DjangoSession("s")
    for _ in range(2):
        agent, _ = scripted([RuntimeError("down")])
        with pytest.raises(RuntimeError, match="down"):
            await Runner.run(agent, "hi", session=session)
    agent, model = scripted([[call("add", "c1", a=1, b=1)], say("hello")], tools=[add])
    await Runner.run(agent, "hi", session=session)
    assert outline(model.calls[0].input) == ["user hi"] * 3
    report = await sync_to_async(mend_once)()
    assert codes(report) == ["duplicate_turn", "duplicate_turn"]
    assert [finding.position for finding in report.findings] == [2, 3]
    agent, model = scripted([say("bye")])
    await Runner.run(agent, "bye", session=session)
    assert outline(model.calls[0].input) == [
        "user hi",
        "call c1",
        "output c1 2",
        "assistant hello",
        "user bye",
    ]
    turns = await session.get_conversation_turns()
    assert [turn["turn"] for turn in turns] == [1, 2]


async def test_a_limit_that_cuts_is_no_damage() -> None:
    """#4322: a window may begin with an output whose call is stored before it."""
    session = DjangoSession("s", session_settings=SessionSettings(limit=1))
    await session.add_items([user("a"), calling("c"), output("c")])
    assert outline(await session.get_items()) == ["output c 1"]
    assert (await sync_to_async(examine)()).findings == []


def test_unreadable_and_scalar_rows_are_put_away() -> None:
    """#3174: rows that readers pass over are moved as they are, and come back so."""
    session = open_session([user("a"), answer("b"), answer("c"), answer("d")])
    broken = {2: '{"role": "assist', 3: "42"}
    for position, data in broken.items():
        SessionItem.objects.filter(position=position).update(data=data)
    report = mend_once()
    assert codes(report) == ["unreadable_row", "scalar_row"]
    assert session.sync.get_items() == [user("a"), answer("d")]
    row = AgentSession.objects.get()
    assert [q.position for q in examine().quarantined] == [2, 3]
    assert row.item_count == 4
    for position in broken:
        restore(row, position)
    assert (
        dict(
            SessionItem.objects.filter(
                branch=row.branch, position__in=broken
            ).values_list("position", "data")
        )
        == broken
    )
    assert examine().quarantined == []
    with pytest.raises(ObjectDoesNotExist, match="no quarantined row of position 2"):
        restore(row, 2)


def test_a_dangling_call_is_told_and_left() -> None:
    session = open_session([user("a"), calling("c"), answer("b")])
    report = examine(repair=True)
    assert codes(report) == ["dangling_call"]
    assert report.is_clean
    assert report.quarantined == []
    assert len(session.sync.get_items()) == 3


def test_a_call_that_waits_for_approval_is_explained() -> None:
    open_session([user("a"), calling("c")])
    row = AgentSession.objects.get()
    wait(row, first_position=1)
    assert examine().findings == []


@pytest.mark.parametrize(
    ("kind", "call_kind", "own", "key"),
    [
        ("shell_call_output", "shell_call", "call_id", "call_id"),
        ("computer_call_output", "computer_call", "call_id", "call_id"),
        ("local_shell_call_output", "local_shell_call", "call_id", "id"),
        ("mcp_approval_response", "mcp_approval_request", "id", "approval_request_id"),
    ],
)
def test_every_kind_of_output_finds_its_call(
    kind: str, call_kind: str, own: str, key: str
) -> None:
    open_session([user("a"), {"type": call_kind, own: "x"}, {"type": kind, key: "x"}])
    assert examine().findings == []
    SessionItem.objects.filter(position=2).delete()
    AgentSession.objects.update(item_count=2)
    assert codes(examine()) == ["orphan_output"]


def test_a_fork_shows_the_calls_of_its_parent_up_to_the_fork_only() -> None:
    """An output is no orphan where an ancestor's call is seen, and one where it isn't."""
    session = open_session(
        [user("a"), calling("seen"), answer("x")],
        [user("b"), calling("unseen"), output("unseen")],
    )
    session.sync.create_branch_from_turn(2, "fork")
    session.sync.add_items([output("seen"), output("unseen")])
    report = mend_once()
    assert [(f.code, f.branch, f.position) for f in report.left] == [
        ("orphan_output", "fork", 5)
    ]
    assert outline(session.sync.get_items()) == [
        "user a",
        "call seen",
        "assistant x",
        "output seen 1",
    ]


def test_a_message_repeated_after_a_fork_leaves_the_other_branch_alone() -> None:
    session = open_session([user("a"), answer("A")], [user("b")], [user("b")])
    session.sync.create_branch_from_turn(3, "fork")
    session.sync.add_items([user("b"), answer("fork")])
    report = mend_once()
    assert [(f.branch, f.position) for f in report.findings] == [
        ("main", 4),
        ("fork", 4),
    ]
    assert outline(session.sync.get_items())[-2:] == ["user b", "assistant fork"]
    row = AgentSession.objects.get()
    with pytest.raises(MultipleObjectsReturned, match="name the branch"):
        restore(row, 4)
    restore(row, 4, branch="fork")
    assert [q.branch for q in examine().quarantined] == ["main"]


def test_counters_are_recomputed() -> None:
    session = open_session([user("a"), answer("A")], [user("b"), answer("B")])
    right = rows(), list(AgentSession.objects.values("item_count", "title"))
    branch = Branch.objects.get()
    Branch.objects.update(head=2, turn=7)
    AgentSession.objects.update(item_count=9, title="")
    report = mend_once()
    assert codes(report) == [
        "wrong_branch_turn",
        "wrong_head",
        "wrong_item_count",
        "missing_title",
    ]
    assert right == (rows(), list(AgentSession.objects.values("item_count", "title")))
    branch.refresh_from_db()
    assert (branch.head, branch.turn) == (4, 2)
    SessionItem.objects.filter(position__gt=1).update(turn=F("turn") + 3)
    report = mend_once()
    assert codes(report) == ["wrong_turn"]
    assert "3 rows" in report.findings[0].message
    assert rows() == right[0]
    session.sync.add_items([user("c")])
    assert codes(examine()) == []


def test_columns_are_drawn_from_the_data_again() -> None:
    open_session([user("a"), calling("c"), output("c")])
    right = rows()
    SessionItem.objects.filter(position=1).update(role="", text="other")
    SessionItem.objects.filter(position=2).update(call_id="d", tool_name="x", size=1)
    assert codes(mend_once()) == ["wrong_columns", "wrong_columns"]
    assert rows() == right


def test_what_a_repeated_message_used_counts_for_the_one_that_stays() -> None:
    open_session([user("a")], [user("a"), answer("A")], [user("b")])
    row = AgentSession.objects.get()
    first, second, _, last = SessionItem.objects.order_by("position")
    for name, item in (("r1", first), ("r2", second), ("r3", last)):
        AgentRun.objects.create(
            session=row,
            run_id=name,
            status="completed",
            turn=item.turn,
            turn_item=item.pk,
        )
    mend_once()
    found = AgentRun.objects.order_by("pk").values_list("turn", "turn_item")
    assert list(found) == [(1, first.pk), (1, first.pk), (2, last.pk)]


def test_a_session_without_a_branch_shows_its_history_again() -> None:
    session = open_session([user("a")])
    AgentSession.objects.update(branch=None)
    assert session.sync.get_items() == []
    assert codes(mend_once()) == ["no_branch"]
    assert session.sync.get_items() == [user("a")]
    AgentSession.objects.create(session_id="empty")
    assert codes(mend_once()) == ["no_branch"]


def test_quarantined_rows_are_of_no_branch_and_go_with_the_session() -> None:
    session = open_session([user("a"), output("x"), answer("b")])
    examine(repair=True)
    assert [b["branch_id"] for b in session.sync.list_branches()] == ["main"]
    assert session.sync.list_archived() == []
    assert session.sync.pop_item() == answer("b")
    session.sync.clear()
    assert SessionItem.objects.count() == 0
    assert examine().findings == []
    session.sync.add_items([output("y")])
    assert codes(mend_once()) == ["orphan_output"]


@pytest.mark.one_database
def test_the_codes_of_the_docs_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    table = page.partition("## What it finds")[2].partition("## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE))
    assert listed.keys() == CODES.keys()
    assert {code for code, repair in listed.items() if repair == "none"} == {
        code for code, kind in CODES.items() if not kind.repair
    }
    moved = {code for code, repair in listed.items() if "quarantine" in repair}
    assert moved == {c for c, kind in CODES.items() if "quarantine" in kind.repair}
    assert f"{RUN_SILENCE.total_seconds():.0f} seconds" in listed_row(
        table, "stale_lease"
    )
    assert timedelta(days=1) == RUN_LENGTH


def listed_row(table: str, code: str) -> str:
    return next(line for line in table.splitlines() if f"`{code}`" in line)
