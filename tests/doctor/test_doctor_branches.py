"""The doctor on branches: which is current, where they begin and end, quarantines."""

from __future__ import annotations

import pytest
from django.utils import timezone

from agent_sessions.doctor import examine, restore
from agent_sessions.models import AgentSession, Branch, SessionItem
from tests.doctor.test_doctor import (
    answer,
    codes,
    mend_once,
    open_session,
    output,
    rows,
    user,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("current", ["main", None])
def test_an_archived_main_branch_is_there_again(current: str | None) -> None:
    session = open_session([user("a"), answer("A")])
    Branch.objects.update(archived_at=timezone.now(), turn=7)
    if current is None:
        AgentSession.objects.update(branch=None)
    AgentSession.objects.update(title="")
    assert codes(mend_once()) == ["no_branch", "wrong_branch_turn", "missing_title"]
    assert session.sync.get_items() == [user("a"), answer("A")]
    session.sync.add_items([user("b")])
    assert session.sync.get_items() == [user("a"), answer("A"), user("b")]
    assert examine().findings == []


def test_a_fork_ends_no_earlier_than_it_begins() -> None:
    """What is written before the fork's position is not shown."""
    session = open_session([user("a"), answer("A")], [user("b"), answer("B")])
    session.sync.create_branch_from_turn(2, "fork")
    Branch.objects.filter(name="fork").update(head=0)
    assert codes(mend_once()) == ["wrong_head"]
    session.sync.add_items([user("c")])
    assert session.sync.get_items() == [user("a"), answer("A"), user("c")]
    assert examine().findings == []


def test_rows_before_their_branch_begins_are_told_and_left() -> None:
    session = open_session([user("a"), answer("A")], [user("b"), answer("B")])
    session.sync.create_branch_from_turn(2, "fork")
    Branch.objects.filter(name="fork").update(head=0)
    session.sync.add_items([output("x")])
    before = rows()
    report = mend_once()
    assert [(f.code, f.branch, f.position) for f in report.findings] == [
        ("hidden_rows", "fork", 1),
        ("wrong_head", "fork", None),
    ]
    assert report.findings[0].message.startswith("1 rows")
    assert [f.code for f in examine().findings] == ["hidden_rows"]
    assert rows() == before
    assert Branch.objects.get(name="fork").head == 2


def test_each_branch_has_a_quarantine_of_its_own() -> None:
    session = open_session([user("a"), output("x"), answer("A")], [user("b")])
    session.sync.create_branch_from_turn(2, "fork")
    session.sync.add_items([user("c")])
    examine(repair=True)
    main, fork = Branch.objects.filter(version=0).order_by("pk")
    assert [main.name, fork.name] == ["main", "fork"]
    session.sync.add_items([output("y")])
    report = examine(repair=True)
    assert report.is_clean
    assert [(q.branch, q.position) for q in report.quarantined] == [
        ("main", 2),
        ("fork", 5),
    ]
    session.sync.switch_to_branch("main")
    session.sync.add_items([output("z")])
    assert examine(repair=True).is_clean
    assert Branch.objects.filter(is_quarantine=True).count() == 2
    restore(AgentSession.objects.get(), 5, branch="fork")
    assert SessionItem.objects.get(call_id="y").branch == fork


def test_a_branch_may_be_called_quarantine() -> None:
    open_session([user("a"), output("x"), answer("A")])
    Branch.objects.update(name="quarantine", turn=5)
    report = mend_once()
    assert codes(report) == ["orphan_output", "wrong_branch_turn"]
    (row,) = examine().quarantined
    assert (row.branch, row.position) == ("quarantine", 2)
    SessionItem.objects.update(turn=7)
    assert codes(mend_once()) == ["wrong_turn"]


def test_an_output_that_names_no_call_is_no_orphan() -> None:
    """A hosted search may leave its output alone, and the SDK sends it."""
    found = {"type": "tool_search_output", "execution": "server", "tools": []}
    open_session([user("a"), found, answer("A")])
    assert examine().findings == []
