"""Whose lease is alive: one clock, the database's, for hosts that don't agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO
from typing import Any
from unittest import mock

import pytest
from django.core.management import call_command
from django.db import connections
from django.utils import timezone

from agent_sessions import get_session, sessions
from agent_sessions.backends.leases import (
    RUN_SILENCE,
    DatabaseNow,
    holds_a_run,
    is_over,
    judged,
)
from agent_sessions.backends.remote.erasure import CLAIM, add_pending, erase_pending
from agent_sessions.exceptions import SessionBusy
from agent_sessions.models import AgentRun, AgentSession, PendingClear
from agent_sessions.retention import Removal
from agent_sessions.runs import (
    Conversation,
    RunLimits,
    heartbeat,
    records,
    recovery,
)
from agent_sessions.transfer.copy import Copier

pytestmark = [pytest.mark.django_db(transaction=True)]

HELLO: Any = {"role": "user", "content": "Hello"}
ELSEWHERE = "0123456789abcdef:1:x"
SILENCE = RUN_SILENCE.total_seconds()


@contextmanager
def clock_off_by(seconds: float) -> Iterator[None]:
    """Act as a host whose clock is wrong by so much."""
    shifted = timezone.now

    def now() -> Any:
        return shifted() + timedelta(seconds=seconds)

    with mock.patch.object(timezone, "now", now):
        yield


def conversation() -> Conversation:
    get_session("room").sync.add_items([HELLO])
    row = AgentSession.objects.get()
    backend = sessions["default"]
    return Conversation(row.pk, backend, get_session("room").key)


def begin(where: Conversation, run_id: str = "r-1") -> records.Lease:
    lease = records.begin(
        where, run_id, model="", limits=RunLimits(stale_after=SILENCE)
    )
    assert lease is not None
    # As if another host had begun it, whose processes can't be looked up here.
    where.rows().update(run_owner=ELSEWHERE)
    return lease


def doctor() -> str:
    out = StringIO()
    call_command("check_agent_sessions", stdout=out, stderr=out)
    return out.getvalue()


@pytest.mark.parametrize("wrong", [-90_000, -61, 61, 90_000])
class TestWrongClocks:
    def test_a_live_run_is_neither_stolen_nor_cleared_nor_mended(
        self, wrong: float
    ) -> None:
        where = conversation()
        lease = begin(where)
        with clock_off_by(wrong):
            row = recovery.free(where, SILENCE)
            assert row is not None
            assert row.run_id == "r-1"
            with pytest.raises(SessionBusy):
                begin(where, "r-2")
            assert holds_a_run(row)
            assert Removal().why_spared(row) == "run r-1 is active"
            assert "r-1 is active" in doctor()
        assert all(heartbeat.beat(where.using, [(where, lease)]))

    def test_a_run_that_began_or_beat_there_is_alive_here(self, wrong: float) -> None:
        where = conversation()
        with clock_off_by(wrong):
            lease = begin(where)
        assert holds_a_run(where.rows().get())
        with clock_off_by(wrong):
            assert all(heartbeat.beat(where.using, [(where, lease)]))
        with pytest.raises(SessionBusy):
            begin(where, "r-2")

    def test_a_silent_run_is_replaced_there_too(self, wrong: float) -> None:
        where = conversation()
        begin(where)
        where.rows().update(run_seen_at=DatabaseNow() - RUN_SILENCE * 1.1)
        with clock_off_by(wrong):
            assert begin(where, "r-2").run.run_id == "r-2"
        lost = AgentRun.objects.get(run_id="r-1")
        assert lost.status == "interrupted"

    def test_a_claim_on_a_leftover_holds(self, wrong: float) -> None:
        left = add_pending(
            "default", AgentSession(backend="default", session_id="gone")
        )
        key = get_session("gone").key
        PendingClear.objects.update(attempts=1, tried_at=DatabaseNow())
        left.refresh_from_db()
        with clock_off_by(wrong):
            assert erase_pending(sessions["default"], key, left) is None
        PendingClear.objects.update(tried_at=DatabaseNow() - CLAIM * 1.1)
        with clock_off_by(wrong):
            assert erase_pending(sessions["default"], key, left) == 0

    def test_a_history_that_is_moved_is_held(self, wrong: float) -> None:
        where = conversation()
        copier = Copier(sessions["default"], sessions["default"])
        with clock_off_by(wrong):
            held = copier._hold(where.key, where.rows().get())
        assert holds_a_run(where.rows().get())
        copier._release(where.key, held)


@pytest.mark.parametrize("ahead", [RUN_SILENCE * 1.1, timedelta(days=400)])
def test_a_heartbeat_far_in_the_future_is_as_old_as_it_is_far(
    ahead: timedelta,
) -> None:
    where = conversation()
    begin(where)
    where.rows().update(run_seen_at=DatabaseNow() + ahead)
    assert not holds_a_run(where.rows().get())
    assert begin(where, "r-2").run.run_id == "r-2"


def test_a_claim_far_in_the_future_is_free() -> None:
    left = add_pending("default", AgentSession(backend="default", session_id="gone"))
    PendingClear.objects.update(attempts=1, tried_at=DatabaseNow() + CLAIM * 1.1)
    left.refresh_from_db()
    key = get_session("gone").key
    assert erase_pending(sessions["default"], key, left) == 0


def test_a_run_that_beats_after_it_was_judged_keeps_its_lease() -> None:
    where = conversation()
    lease = begin(where)
    where.rows().update(run_seen_at=DatabaseNow() - RUN_SILENCE * 2)
    seen = judged(where.rows()).get()
    assert is_over(seen)
    assert all(heartbeat.beat(where.using, [(where, lease)]))
    recovery.abandon(where, seen)
    assert all(heartbeat.beat(where.using, [(where, lease)]))


def test_a_lost_lease_and_the_next_of_its_session_beat_together() -> None:
    where = conversation()
    lost = begin(where)
    where.rows().update(run_id="", run_owner="", state="idle")
    following = begin(where, "r-2")
    beating = [(where, lost), (where, following)]
    assert heartbeat.beat(where.using, beating) == [False, True]


def test_a_short_silence_is_judged_to_the_second() -> None:
    where = conversation()
    begin(where)
    where.rows().update(run_seen_at=DatabaseNow() - timedelta(seconds=2))
    assert is_over(judged(where.rows(), timedelta(seconds=1.5)).get())
    assert not is_over(judged(where.rows(), timedelta(seconds=600)).get())


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "Pacific/Honolulu"])
def test_the_time_zone_of_a_connection_does_not_matter(zone: str) -> None:
    where = conversation()
    connection = connections["default"]
    asking = {
        "postgresql": f"SET TIME ZONE '{zone}'",
        "mysql": "SET time_zone = '+09:00'",
    }.get(connection.vendor)
    with connection.cursor() as cursor:
        if asking:
            cursor.execute(asking)
    begin(where)
    connection.close()
    with timezone.override(zone):
        assert holds_a_run(where.rows().get())
    moment = where.rows().get().run_seen_at
    assert moment is not None
    assert abs(timezone.now() - moment) < timedelta(minutes=5)
