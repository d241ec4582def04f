"""The doctor on sessions that runs hold, held, wait in or write to."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from agents import Runner
from asgiref.sync import sync_to_async
from django.db import connection
from django.utils import timezone

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.leases import RUN_SILENCE, this_process
from agent_sessions.doctor import Report, examine
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from agent_sessions.testing.base import outline, say, scripted
from tests.support.waiting import wait

pytestmark = pytest.mark.django_db(transaction=True)

NOW = timedelta(0)


def make(name: str = "s") -> AgentSession:
    DjangoSession(name).sync.add_items([{"role": "user", "content": "a"}])
    return AgentSession.objects.get(session_id=name)


def start(row: AgentSession, *, ago: timedelta, owner: str = "") -> AgentRun:
    seen = timezone.now() - ago
    AgentSession.objects.filter(pk=row.pk).update(
        run_id="r", run_owner=owner, run_seen_at=seen, state="running", fence=4
    )
    return AgentRun.objects.create(
        session=row, run_id="r", branch=row.branch, started_at=seen
    )


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def mend_once() -> list[str]:
    dry = examine()
    assert examine(repair=True).is_clean
    assert examine().findings == []
    return codes(dry)


def test_a_session_with_an_active_run_is_skipped() -> None:
    row = make()
    AgentSession.objects.update(item_count=7)
    run = start(row, ago=NOW, owner=this_process())
    report = examine(repair=True)
    assert report.findings == []
    assert report.is_clean
    assert [(skip.session_id, skip.reason) for skip in report.skipped] == [
        ("s", "Run r is active.")
    ]
    run.refresh_from_db()
    row.refresh_from_db()
    assert (run.status, row.run_id, row.item_count) == ("running", "r", 7)


@pytest.mark.parametrize("how", ["silent", "dead"])
def test_a_lease_is_taken_from_a_dead_run(how: str) -> None:
    row = make()
    host = this_process().partition(":")[0]
    # Above every kernel's largest pid.
    gone = f"{host}:999999999:x"
    run = (
        start(row, ago=timedelta(hours=1))
        if how == "silent"
        else start(row, ago=NOW, owner=gone)
    )
    assert mend_once() == ["stale_lease"]
    row.refresh_from_db()
    run.refresh_from_db()
    assert (row.run_id, row.state, row.fence) == ("", "idle", 5)
    assert (run.status, run.error_code) == ("interrupted", "interrupted")
    assert run.finished_at is not None


def test_a_lease_from_a_clock_that_was_wrong_is_taken() -> None:
    row = make()
    start(row, ago=-timedelta(days=30))
    assert mend_once() == ["stale_lease"]
    AgentSession.objects.update(
        run_id="r2", run_seen_at=timezone.now() + RUN_SILENCE / 2
    )
    assert [skip.failed for skip in examine().skipped] == [False]


def test_what_a_run_without_its_lease_writes_is_refused_after_a_repair() -> None:
    row = make()
    start(row, ago=timedelta(hours=1))

    assert mend_once() == ["stale_lease"]
    with pytest.raises(LeaseLost):
        sessions["default"].append(
            SessionKey("s", fence=4), [{"role": "user", "content": "late"}]
        )


def test_a_run_that_never_ended_is_interrupted_after_a_day() -> None:
    row = make()
    hours = (1, 25)
    for number in hours:
        AgentRun.objects.create(
            session=row,
            run_id=f"r{number}",
            started_at=timezone.now() - timedelta(hours=number),
        )
    assert mend_once() == ["unfinished_run"]
    found = AgentRun.objects.order_by("pk").values_list("status", flat=True)
    assert list(found) == ["running", "interrupted"]


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"state": ""}, "lost_state"),
        ({"state": "{}"}, "lost_state"),
        ({"run_id": "other"}, "lost_state"),
        ({"expires_at": "past"}, "expired_approval"),
    ],
)
def test_an_approval_that_nobody_can_give_is_withdrawn(
    columns: dict[str, Any], code: str
) -> None:
    row = make()
    if "expires_at" in columns:
        columns = {"expires_at": timezone.now() - timedelta(minutes=1)}
    run = wait(row)
    AgentRun.objects.update(**columns)
    sealed = run.state
    assert mend_once() == [code]
    run.refresh_from_db()
    row.refresh_from_db()
    assert (run.status, run.state) == ("cancelled", "")
    assert row.state == "idle"
    # Put back, it doesn't open any more.
    AgentRun.objects.update(
        status="waiting", state=sealed, run_id="run-1", expires_at=None
    )
    AgentSession.objects.update(state="waiting")
    assert mend_once() == ["lost_state"]


def test_an_approval_whose_time_is_over_is_withdrawn_whatever_its_column_says() -> None:
    wait(make(), expires_in=-timedelta(minutes=1), expires_at=None)
    assert mend_once() == ["expired_approval"]


def test_an_approval_that_asks_nothing_is_withdrawn() -> None:
    wait(make(), interrupts=[])
    assert mend_once() == ["lost_state"]


def test_an_approval_that_can_be_given_stays() -> None:
    row = make()
    AgentRun.objects.create(session=row, run_id="old", status="waiting")
    wait(row, "w")
    assert mend_once() == ["lost_state"]
    row.refresh_from_db()
    assert row.state == "waiting"
    assert AgentRun.objects.get(run_id="w").status == "waiting"


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_a_state_that_nothing_explains_is_corrected(state: str) -> None:
    """Neither a message nor an answer could ever be sent to such a session."""
    row = make()
    AgentSession.objects.update(state=state)
    assert mend_once() == ["wrong_state"]
    row.refresh_from_db()
    assert row.state == "idle"


def test_writers_lose_nothing_and_are_not_taken_for_damage() -> None:
    """Batches are written while the doctor looks and mends, again and again."""
    row = make()
    session = DjangoSession("s")
    session.sync.add_items(
        [{"type": "function_call_output", "call_id": "x", "output": "o"}]
    )
    writers, batches = 3, 25
    errors: list[BaseException] = []

    def write(number: int) -> None:
        own = DjangoSession("s")
        try:
            for batch in range(batches):
                call_id = f"{number}-{batch}"
                own.sync.add_items(
                    [
                        {"role": "user", "content": call_id},
                        {
                            "type": "function_call",
                            "name": "f",
                            "call_id": call_id,
                            "arguments": "{}",
                        },
                        {
                            "type": "function_call_output",
                            "call_id": call_id,
                            "output": "o",
                        },
                    ]
                )
        except BaseException as exc:
            errors.append(exc)
        finally:
            connection.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    found = []
    while any(thread.is_alive() for thread in threads):
        found += codes(examine(repair=True, batch_size=7))
        AgentSession.objects.filter(pk=row.pk, title="a").update(title="")
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(found) <= {"orphan_output", "missing_title"}
    assert found.count("orphan_output") == 1
    examine(repair=True)
    assert examine().findings == []
    row.refresh_from_db()
    expected = 2 + writers * batches * 3
    assert row.item_count == SessionItem.objects.count() == expected
    texts = list(
        SessionItem.objects.filter(role="user")
        .order_by("position")
        .values_list("text", flat=True)
    )
    for number in range(writers):
        own = [text for text in texts if text.startswith(f"{number}-")]
        assert own == [f"{number}-{batch}" for batch in range(batches)]


async def test_a_mended_session_goes_on_with_a_run() -> None:
    """What two broken runs left, mended at once, is what the next run sends."""
    row = await sync_to_async(make)()
    await sync_to_async(start)(row, ago=timedelta(hours=1))
    session = DjangoSession("s")
    await session.add_items(
        [
            {"type": "function_call_output", "call_id": "x", "output": "o"},
            {"role": "user", "content": "a"},
        ]
    )
    found = await sync_to_async(mend_once)()
    assert found == ["stale_lease", "orphan_output", "duplicate_turn"]
    agent, model = scripted([say("ok")])
    await Runner.run(agent, "go on", session=session)
    assert outline(model.calls[0].input) == ["user a", "user go on"]
