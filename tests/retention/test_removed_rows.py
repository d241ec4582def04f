"""What a clear has removed is found by no manager, dump or page, deleted or not yet."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.urls import reverse

from agent_sessions import DjangoSession, sessions
from agent_sessions.admin.overview import gather
from agent_sessions.backends.base import SessionKey
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.retention import Removal, finish_removals, remove
from tests.support.admin_pages import page, staff

pytestmark = pytest.mark.django_db

OWNED = (Branch, SessionItem, AgentRun)
RUNS = "admin:agent_sessions_agentrun_changelist"


def message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def make(session_id: str, user: Any, items: int = 6) -> AgentSession:
    key = SessionKey(session_id, user and user.pk)
    sessions["default"].append(
        key, [message(f"{session_id} {n}") for n in range(items)]
    )
    row = AgentSession.objects.get(session_id=session_id)
    AgentRun.objects.create(session=row, branch=row.branch, run_id=f"run {session_id}")
    return row


def take_out(row: AgentSession, *, delete: bool) -> None:
    """Remove more than is deleted at once, and stop before any of it is."""
    assert remove(row, Removal(delete=delete, batch_size=2)) == 6
    assert SessionItem._base_manager.count() > SessionItem.objects.count()


@pytest.fixture
def ann() -> Any:
    return get_user_model().objects.create_user("ann")


@pytest.fixture(params=[False, True], ids=["cleared", "deleted"])
def removed(request: pytest.FixtureRequest, ann: Any) -> bool:
    """Remove one session of a user's and one of nobody's; another stays."""
    make("stays", ann, items=2)
    for row in (make("hers", ann), make("nobody's", None)):
        take_out(row, delete=request.param)
    return bool(request.param)


def texts(rows: Any) -> set[str]:
    return {row.text.split()[0] for row in rows}


def test_no_manager_finds_its_items(removed: bool, ann: Any) -> None:
    assert texts(SessionItem.objects.all()) == {"stays"}
    assert texts(SessionItem.objects.for_user(ann)) == {"stays"}
    assert texts(SessionItem.objects.for_user(None)) == set()
    assert texts(SessionItem.objects.using("default").filter(turn__gt=0)) == {"stays"}
    assert SessionItem._default_manager.count() == 2


def test_no_manager_finds_its_branches_and_runs(removed: bool, ann: Any) -> None:
    live = {"stays"} if removed else {"stays", "hers", "nobody's"}
    for model in (Branch, AgentRun):
        found = model.objects.values_list("session__session_id", flat=True)
        assert set(found) == live
        assert model.objects.for_user(None).count() == (0 if removed else 1)


def test_a_run_that_stays_leads_to_nothing_that_is_removed(removed: bool) -> None:
    for run in AgentRun.objects.exclude(branch=None):
        assert run.branch in Branch.objects.all()
    assert AgentRun.objects.get(run_id="run stays").branch is not None


def test_what_leads_from_one_row_to_others_leads_to_none(removed: bool) -> None:
    for branch in Branch._base_manager.exclude(session__session_id="stays"):
        assert not branch.items.exists()
    for row in AgentSession._base_manager.exclude(session_id="stays"):
        assert not SessionItem.objects.filter(branch__session=row).exists()


def test_a_dump_has_none_of_it_and_can_be_loaded(removed: bool) -> None:
    out = io.StringIO()
    call_command("dumpdata", "agent_sessions", "auth.user", stdout=out)
    dump = json.loads(out.getvalue())
    items = [e for e in dump if e["model"] == "agent_sessions.sessionitem"]
    assert len(items) == 2
    keys = {(e["model"], e["pk"]) for e in dump}
    for entry in dump:
        fields = entry["fields"]
        for name in ("session", "branch", "parent"):
            if (key := fields.get(name)) is not None:
                kind = "agentsession" if name == "session" else "branch"
                assert (f"agent_sessions.{kind}", key) in keys, entry


def test_no_page_shows_it(removed: bool) -> None:
    client = staff("view", "read", runs=True)
    html = page(client, reverse(RUNS))
    assert "run stays" in html
    assert ("run hers" in html) is not removed
    assert gather(7).total.runs == (1 if removed else 3)


def test_it_is_gone_in_the_end_and_ids_can_be_used_again(
    removed: bool, ann: Any
) -> None:
    finish_removals()
    for model in OWNED:
        assert model._base_manager.count() == model.objects.count()
    session: Any = DjangoSession("hers", user=ann).sync
    session.add_items([message("again")])
    assert len(session.get_items()) == 1


def test_a_window_of_items_is_still_read_in_the_order_of_its_index() -> None:
    row = make("s", None)
    rows = SessionItem.objects.filter(branch=row.branch).order_by("-position")[:3]
    assert [item.position for item in rows] == [6, 5, 4]
    assert "JOIN" not in str(rows.query).partition("WHERE")[0]
