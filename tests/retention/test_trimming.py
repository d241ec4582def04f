"""clear_agent_sessions --keep-last-turns: older turns go whole, positions stay.

A part of a turn is never removed alone, as the TTL of langchain-mongodb #151 does it.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from django.utils import timezone

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.doctor import examine
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.retention import Removal, Spared
from tests.support.selections import AskedSelection
from tests.support.trimming import count_trimmed, trim

pytestmark = pytest.mark.django_db

KEY = SessionKey("s")
Item = dict[str, Any]
_numbers = count()


def user(text: str) -> Item:
    return {"role": "user", "content": text}


def answer(text: str) -> Item:
    return {"role": "assistant", "content": text}


def call(name: str) -> Item:
    return {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"}


def output(name: str) -> Item:
    return {"type": "function_call_output", "call_id": name, "output": "done"}


def turn(text: str) -> list[Item]:
    """Return a turn of four items with a tool's call in it."""
    name = f"c{next(_numbers)}"
    return [user(text), call(name), output(name), answer(f"to {text}")]


def add(*items: Item, branch: str | None = None) -> None:
    sessions["default"].append(SessionKey("s", branch=branch), list(items))


def make(turns: int) -> AgentSession:
    for number in range(1, turns + 1):
        add(*turn(f"t{number}"))
    return row()


def row() -> AgentSession:
    return AgentSession.objects.get(session_id="s")


def shown(branch: str | None = None) -> list[str]:
    """Return what a branch shows: the texts of its user messages and other types."""
    items = sessions["default"].latest(SessionKey("s", branch=branch), None)
    return [item.get("content") or item["type"] for item in items]


def users(branch: str | None = None) -> list[str]:
    return [text for text in shown(branch) if text[0] in "tx" and text[:2] != "to"]


def positions() -> list[int]:
    page = sessions["default"].page(KEY, limit=1000)
    return [item.position for item in page.items]


def session() -> Any:
    return DjangoSession("s").sync


def assert_healthy() -> None:
    found = examine()
    assert found.findings == []
    assert not found.skipped


def test_older_turns_go_and_the_last_ones_stay_whole() -> None:
    made = make(5)
    assert count_trimmed(made, 2) == 12
    assert trim(made, 2) == 12
    assert shown() == [
        *("t4", "function_call", "function_call_output", "to t4"),
        *("t5", "function_call", "function_call_output", "to t5"),
    ]
    assert row().item_count == SessionItem.objects.count() == 8
    assert positions() == list(range(13, 21))
    assert_healthy()


def test_positions_go_on_and_turns_are_counted_from_1() -> None:
    made = make(5)
    trim(made, 2)
    add(user("t6"))
    assert positions()[-1] == 21
    assert [found["turn"] for found in session().get_conversation_turns()] == [1, 2, 3]
    assert session().undo_turn() == 3
    assert users() == ["t4", "t5"]
    assert_healthy()


def test_a_second_time_there_is_nothing_to_remove() -> None:
    made = make(5)
    trim(made, 2)
    assert trim(made, 2) == 0
    assert count_trimmed(made, 2) == 0
    assert users() == ["t4", "t5"]


@pytest.mark.parametrize("keep", [3, 4])
def test_what_has_no_more_turns_stays_as_it_is(keep: int) -> None:
    add({"role": "system", "content": "before every turn"})
    made = make(3)
    assert trim(made, keep) == 0
    assert len(shown()) == 13


def test_what_stands_before_the_first_turn_goes_with_the_old_ones() -> None:
    add({"role": "system", "content": "before every turn"})
    made = make(3)
    assert trim(made, 1) == 9
    assert users() == ["t3"]
    assert_healthy()


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 100])
def test_each_step_is_of_whole_turns(size: int) -> None:
    made = make(6)
    seen: list[list[str]] = []

    def look() -> bool:
        seen.append(shown())
        return True

    assert trim(made, 2, Removal(batch_size=size, still=AskedSelection(look))) == 16
    for items in seen:
        assert len(items) % 4 == 0
        assert items[0].startswith("t")
    assert len(seen) == {1: 4, 3: 4, 4: 4, 7: 4, 8: 2, 100: 1}[size]
    assert_healthy()


def test_who_is_killed_is_gone_on_with() -> None:
    made = make(6)
    asked = count()

    def kill() -> bool:
        if next(asked) == 2:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        trim(made, 2, Removal(batch_size=1, still=AskedSelection(kill)))
    assert users() == ["t3", "t4", "t5", "t6"]
    assert trim(made, 2, Removal(batch_size=1)) == 8
    assert users() == ["t5", "t6"]
    assert [found["turn"] for found in session().get_conversation_turns()] == [1, 2]
    assert_healthy()


def test_an_output_keeps_the_turn_of_its_call() -> None:
    add(user("t1"), call("late"))
    add(*turn("t2"))
    add(*turn("t3"))
    add(user("t4"), output("late"))
    assert trim(row(), 1) == 8
    assert shown() == ["t1", "function_call", "t4", "function_call_output"]
    assert [found["turn"] for found in session().get_conversation_turns()] == [1, 2]
    assert_healthy()


def test_an_approval_keeps_the_turn_that_asked_and_what_that_needs() -> None:
    add(user("t1"), {"type": "program", "call_id": "p", "code": ""})
    add(user("t2"))
    request = {"type": "mcp_approval_request", "id": "r", "name": "f"}
    add(user("t3"), request | {"caller": {"type": "program", "caller_id": "p"}})
    add(user("t4"))
    response = {"type": "mcp_approval_response", "approval_request_id": "r"}
    add(user("t5"), response | {"approve": True})
    assert trim(row(), 1) == 2
    assert users() == ["t1", "t3", "t5"]
    assert_healthy()


def test_a_title_that_quotes_what_goes_quotes_what_stays() -> None:
    made = make(4)
    assert made.title == "t1"
    trim(made, 2)
    assert row().title == "t3"


def test_a_title_of_the_first_message_with_words_quotes_what_stays() -> None:
    add(user("\u200b"), answer("?"))
    made = make(3)
    assert made.title == "t1"
    trim(made, 2)
    assert row().title == "t2"


def test_a_title_of_a_message_that_was_edited_quotes_what_stays() -> None:
    make(4)
    session().create_branch_from_turn(1)
    add(user("t1, better"))
    assert row().title == "t1"
    trim(row(), 2)
    assert users("main") == ["t3", "t4"]
    assert row().title == "t1, better"


def test_a_title_that_was_given_stays() -> None:
    made = make(4)
    AgentSession.objects.update(title="Holidays")
    trim(made, 2)
    assert row().title == "Holidays"


def test_runs_name_the_turns_that_are_left() -> None:
    made = make(4)
    openers = SessionItem.objects.filter(role="user").order_by("position")
    for number, opener in enumerate(openers, 1):
        AgentRun.objects.create(
            session=made,
            branch=made.branch,
            run_id=f"r{number}",
            turn=number,
            turn_item=opener.pk,
            input_tokens=number,
        )
    trim(made, 2)
    used = session().get_turn_usage()
    assert [(each["user_turn_number"], each["input_tokens"]) for each in used] == [
        (1, 3),
        (2, 4),
    ]


class TestBranches:
    def test_a_branch_keeps_its_own_last_turns(self) -> None:
        made = make(6)
        session().create_branch_from_turn(4, "side")
        add(*turn("x4"), *turn("x5"))
        # Three that both show, and main's fourth.
        assert trim(made, 2) == 4 * 4
        assert users("side") == ["x4", "x5"]
        assert users("main") == ["t5", "t6"]
        assert_healthy()

    def test_a_young_branch_keeps_what_it_needs_of_the_old_turns(self) -> None:
        made = make(6)
        session().create_branch_from_turn(3, "side")
        add(*turn("x3"))
        trim(made, 2)
        assert users("side") == ["t2", "x3"]
        # What it needs, the branch that it grew from shows too.
        assert users("main") == ["t2", "t5", "t6"]
        assert_healthy()

    def test_a_short_branch_keeps_everything(self) -> None:
        made = make(6)
        session().create_branch_from_turn(2, "side")
        assert trim(made, 2) == 3 * 4
        assert users("side") == ["t1"]
        assert users("main") == ["t1", "t5", "t6"]
        assert_healthy()

    def test_what_was_undone_goes_once_it_is_older(self) -> None:
        made = make(3)
        session().undo_turn()
        for number in range(4, 8):
            add(*turn(f"t{number}"))
        trim(made, 2)
        assert users() == ["t6", "t7"]
        assert SessionItem.objects.count() == row().item_count == 8
        assert_healthy()

    def test_what_was_undone_lately_can_be_brought_back(self) -> None:
        made = make(5)
        session().undo_turn()
        trim(made, 2)
        assert users() == ["t3", "t4"]
        (archived,) = session().list_archived()
        session().restore_branch(archived)
        assert users() == ["t3", "t4", "t5"]
        assert_healthy()

    def test_a_turn_that_a_fork_cuts_stays_whole(self) -> None:
        made = make(4)
        add(*turn("t5"))
        backend: Any = sessions["default"]
        # After the call, before its output.
        backend.change(
            KEY,
            lambda branches: branches.fork(branches.current(), 14, 4, "middle"),
        )
        add(
            output(sessions["default"].latest(KEY, 1)[0]["call_id"]),
            answer("to t4, again"),
        )
        trim(made, 1)
        assert shown("middle") == [
            *("t4", "function_call", "function_call_output", "to t4, again")
        ]
        assert users("main") == ["t4", "t5"]
        assert len(shown("main")) == 8
        assert_healthy()

    def test_a_branch_that_is_made_meanwhile_keeps_what_it_needs(self) -> None:
        made = make(6)
        asked = count()

        def fork() -> bool:
            if next(asked) == 1:
                session().create_branch_from_turn(6, "late")
                session().switch_to_branch("main")
            return True

        trim(made, 2, Removal(batch_size=4, still=AskedSelection(fork)))
        assert users("late") == ["t4", "t5"]
        assert users("main") == ["t4", "t5", "t6"]
        assert_healthy()


@pytest.mark.one_database
class TestSpared:
    def test_turns_that_are_numbered_wrongly(self) -> None:
        made = make(4)
        SessionItem.objects.filter(position=7).update(turn=1)
        with pytest.raises(Spared, match="Mend it with check_agent_sessions --repair"):
            trim(made, 2)
        with pytest.raises(Spared, match="numbered wrongly"):
            count_trimmed(made, 2)
        assert len(shown()) == 16
        examine(repair=True)
        assert trim(made, 2) == 8

    def test_a_session_with_an_active_run(self) -> None:
        made = make(4)
        AgentSession.objects.update(run_id="r", run_seen_at=timezone.now())
        with pytest.raises(Spared, match="run r is active"):
            trim(made, 2)
        assert len(shown()) == 16

    def test_a_session_that_is_gone_is_none(self) -> None:
        made = make(2)
        AgentSession.objects.all().delete()
        assert trim(made, 1) is None

    def test_the_quarantine_goes_with_the_old_turns(self) -> None:
        add(user("t1"), output("orphan"))
        examine(repair=True)
        for number in range(2, 5):
            add(*turn(f"t{number}"))
        assert Branch.objects.filter(is_quarantine=True).exists()
        assert trim(row(), 2) == 6
        assert row().item_count == SessionItem.objects.count() == 8
        assert_healthy()
