"""Long histories are removed at once for readers, and deleted in small steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.doctor import examine
from agent_sessions.exceptions import BranchDoesNotExist, InvalidBranch, LeaseLost
from agent_sessions.managers import removed
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
)
from agent_sessions.retention import (
    Removal,
    Spared,
    finish_removals,
    remove,
    unfinished_items,
)
from agent_sessions.signals import session_cleared
from tests.support.selections import AskedSelection

pytestmark = pytest.mark.django_db

KEY = SessionKey("s")
# Less than make() writes, so that nothing is removed at once.
FEW = 4


def message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def make(session_id: str = "s", items: int = 11, user: Any = None) -> AgentSession:
    key = SessionKey(session_id, user and user.pk)
    sessions["default"].append(key, [message(f"{n}") for n in range(items)])
    return row_of(session_id)


def row_of(session_id: str = "s") -> AgentSession:
    return AgentSession.objects.get(backend="default", session_id=session_id)


def take_out(row: AgentSession, **how: Any) -> int | None:
    return remove(row, Removal(batch_size=FEW, **how))


def texts(session_id: str = "s") -> list[str]:
    found = sessions["default"].latest(SessionKey(session_id), None)
    return [item["content"] for item in found]


def graves() -> Any:
    return AgentSession._base_manager.filter(removed())


def nothing_is_left() -> bool:
    return not (
        graves().exists()
        or Branch._base_manager.exclude(session__backend="default").exists()
        or unfinished_items()
    )


def test_a_short_history_is_deleted_at_once() -> None:
    row = make(items=FEW)
    assert take_out(row) == FEW
    assert not SessionItem._base_manager.exists()
    assert nothing_is_left()


def test_a_long_one_is_gone_for_readers_before_its_rows_are() -> None:
    row = make()
    make("other", items=3)
    assert take_out(row) == 11
    assert texts() == []
    assert sessions["default"].page(KEY, limit=100).items == []
    fresh = row_of()
    assert (fresh.item_count, fresh.title) == (0, "")
    assert SessionItem._base_manager.count() == 14
    assert unfinished_items() == 11
    steps: list[int] = []
    assert finish_removals(batch_size=FEW, progress=steps.append) == 11
    assert [count for count in steps if count] == [4, 4, 3]
    assert SessionItem._base_manager.count() == 3
    assert nothing_is_left()
    assert texts("other") == ["0", "1", "2"]


def test_what_is_written_meanwhile_stays() -> None:
    take_out(make())
    sessions["default"].append(KEY, [message("new")])
    finish_removals(batch_size=FEW)
    assert texts() == ["new"]
    assert row_of().item_count == 1
    # Positions are never given twice.
    assert SessionItem._base_manager.get().position == 12


def test_who_is_killed_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    take_out(make())

    def killed(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish_removals(batch_size=FEW, progress=killed)
    assert SessionItem._base_manager.count() == 7
    assert unfinished_items() == 7
    assert finish_removals(batch_size=FEW) == 7
    assert nothing_is_left()
    assert finish_removals() == 0


def test_each_step_is_a_transaction_of_its_own() -> None:
    take_out(make(items=40))
    with CaptureQueriesContext(connection) as queries:
        finish_removals(batch_size=10)
    table = SessionItem._meta.db_table
    said = [query["sql"] for query in queries.captured_queries]
    begun = [n for n, sql in enumerate(said) if "SAVEPOINT" in sql.split()[0]]
    deleted = [n for n, sql in enumerate(said) if "DELETE" in sql and table in sql]
    assert len(deleted) >= 4
    for one, other in pairwise(deleted[:4]):
        assert any(one < n < other for n in begun)


class TestDelete:
    def test_a_long_session_is_gone_at_once_and_its_id_free(self) -> None:
        alice = get_user_model()._default_manager.create_user("alice")
        row = make(user=alice)
        assert take_out(row, delete=True) == 11
        assert not AgentSession.objects.exists()
        # Nothing of whose it was is left either.
        grave = graves().get()
        assert (grave.user, grave.title, grave.metadata) == (None, "", {})
        sessions["default"].append(KEY, [message("someone else's")])
        finish_removals(batch_size=FEW)
        assert texts() == ["someone else's"]
        assert nothing_is_left()

    def test_a_session_with_many_runs_goes_in_steps_too(self) -> None:
        row = make(items=1)
        AgentRun._base_manager.bulk_create(
            AgentRun(session=row, branch=row.branch, run_id=f"r{n}") for n in range(9)
        )
        take_out(row, delete=True)
        assert AgentRun._base_manager.count() == 9
        finish_removals(batch_size=FEW)
        assert not AgentRun._base_manager.exists()
        assert nothing_is_left()

    def test_a_short_session_is_deleted_at_once(self) -> None:
        assert take_out(make(items=1), delete=True) == 1
        assert not AgentSession.objects.exists()


class TestBranches:
    def test_clearing_goes_on_with_main_and_keeps_names_taken(self) -> None:
        backend: Any = sessions["default"]
        row = make()
        backend.change(KEY, lambda branches: branches.fork_before_turn(5, "side"))
        backend.append(KEY, [message("on the side")])
        take_out(row)
        fresh = row_of()
        assert fresh.branch is not None
        assert (fresh.branch.name, fresh.branch.turn) == ("main", 0)
        with pytest.raises(BranchDoesNotExist):
            backend.append(SessionKey("s", branch="side"), [message("stale")])
        backend.append(KEY, [message("x")])
        with pytest.raises(InvalidBranch, match="already been used"):
            backend.change(KEY, lambda branches: branches.fork_before_turn(1, "side"))
        assert backend.ask(KEY, lambda branches: branches.archived_names()) == []
        finish_removals(batch_size=FEW)
        assert texts() == ["x"]
        assert nothing_is_left()

    def test_archived_generations_and_quarantine_go_too(self) -> None:
        backend: Any = sessions["default"]
        row = make()
        for _ in range(3):
            DjangoSession("s").sync.undo_turn()
        take_out(row)
        names = Branch._base_manager.filter(session=row).values_list("name", flat=True)
        assert list(names) == ["main"]
        finish_removals(batch_size=FEW)
        assert not SessionItem._base_manager.exists()
        assert nothing_is_left()
        assert backend.ask(KEY, lambda branches: branches.archived_names()) == []

    def test_runs_stay_with_a_session_that_is_only_cleared(self) -> None:
        row = make()
        AgentRun._base_manager.bulk_create(
            AgentRun(session=row, branch=row.branch, run_id=f"r{n}", input_tokens=n)
            for n in range(9)
        )
        take_out(row)
        finish_removals(batch_size=FEW)
        assert AgentRun._base_manager.filter(session=row, branch=None).count() == 9
        assert nothing_is_left()


class TestGuards:
    def test_a_run_that_lost_the_session_writes_nothing(self) -> None:
        row = make()
        AgentSession.objects.update(fence=3)
        take_out(row)
        with pytest.raises(LeaseLost):
            sessions["default"].append(KEY.fenced(3), [message("late")])

    def test_what_is_no_longer_meant_stays(self) -> None:
        row = make()
        assert take_out(row, still=AskedSelection(lambda: False)) is None
        assert len(texts()) == 11

    def test_a_run_that_began_meanwhile_is_seen(self) -> None:
        row = make()
        AgentSession.objects.update(run_id="r", run_seen_at=row.updated_at)
        with pytest.raises(Spared, match="run r is active"):
            take_out(row)
        assert len(texts()) == 11

    def test_a_session_that_is_gone_is_none(self) -> None:
        row = make()
        AgentSession.objects.all().delete()
        assert take_out(row) is None

    @pytest.mark.django_db(transaction=True)
    def test_the_signal_is_sent(self) -> None:
        told: list[tuple[Any, ...]] = []

        def hear(sender: Any, **kwargs: Any) -> None:
            told.append((kwargs["session_id"], kwargs["backend"], kwargs["count"]))

        session_cleared.connect(hear)
        try:
            take_out(make())
            take_out(make("short", items=1))
        finally:
            session_cleared.disconnect(hear)
        assert told == [("s", "default", 11), ("short", "default", 1)]


def test_unfinished_removals_are_no_sessions() -> None:
    take_out(make(), delete=True)
    assert graves().exists()
    assert not AgentSession.objects.exists()
    report = examine()
    assert (report.sessions, report.is_clean) == (0, True)
