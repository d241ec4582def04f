"""Branches and archived histories on a session's page in Django's admin."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from agent_sessions import DjangoSession, sessions
from agent_sessions.admin.reading import BRANCHES, History
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.rewriting import swap_all
from agent_sessions.items import encode_batch
from agent_sessions.models import AgentSession, Branch
from agent_sessions.retention import Removal, remove
from tests.support.admin_pages import XSS, assert_safe, make, make_run, page, staff, url

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]


@pytest.fixture
def reader() -> Client:
    return staff("view", "read", runs=True)


def say(*texts: str) -> list[Any]:
    return [{"role": "user", "content": text} for text in texts]


def forked() -> AgentSession:
    """Make a session of m1 to m4 whose current branch, alt, shows m1, m2 and a1."""
    row = make("chat", *say("m1.", "m2.", "m3.", "m4."))
    session = DjangoSession("chat").sync
    session.create_branch_from_turn(3, "alt")
    session.add_items(say("a1."))
    row.refresh_from_db()
    return row


def shown(html: str) -> list[str]:
    names = ("m1.", "m2.", "m3.", "m4.", "a1.", "sum.")
    transcript = html.partition("as-transcript")[2]
    return [name for name in names if f">{name}<" in transcript]


class TestBranches:
    def test_the_current_one_is_shown_and_the_others_are_offered(
        self, reader: Client
    ) -> None:
        row = forked()
        html = page(reader, url("change", row))
        assert shown(html) == ["m1.", "m2.", "a1."]
        assert '<a href="?branch=main">main</a>' in html
        assert '<a href="?" aria-current="true">alt</a>' in html

    def test_another_one_by_its_name(self, reader: Client) -> None:
        row = forked()
        html = page(reader, url("change", row) + "?branch=main&before=4")
        assert shown(html) == ["m1.", "m2.", "m3."]
        assert "Branch main" in html
        assert '<a href="?branch=main" aria-current="true">main</a>' in html
        assert f"{url('item', row, 3)}?branch=main" in html
        assert "m3." in page(reader, f"{url('item', row, 3)}?branch=main")
        assert "a1." in page(reader, url("item", row, 3))

    @pytest.mark.parametrize("name", ["gone", "alt", "", XSS])
    def test_no_other_branch_means_the_current_one(
        self, reader: Client, name: str
    ) -> None:
        html = reader.get(url("change", forked()), {"branch": name}).content.decode()
        assert shown(html) == ["m1.", "m2.", "a1."]
        assert_safe(html)

    def test_a_session_with_one_branch_offers_none(self, reader: Client) -> None:
        assert "as-branches" not in page(reader, url("change", make()))

    def test_what_an_undo_took_back_can_be_read(self, reader: Client) -> None:
        row = make("chat", *say("m1.", "m2."))
        session = DjangoSession("chat").sync
        session.undo_turn()
        (name,) = session.list_archived()
        html = page(reader, url("change", row))
        assert shown(html) == ["m1."]
        assert f"?branch={name}" in html
        html = page(reader, url("change", row) + f"?branch={name}")
        assert shown(html) == ["m1.", "m2."]
        assert "archived" in html
        assert "This is an earlier state of the history" in html
        assert "m2." in page(reader, f"{url('item', row, 2)}?branch={name}")

    def test_what_a_compaction_replaced_can_be_read(self, reader: Client) -> None:
        row = make("chat", *say("m1.", "m2."))
        key = SessionKey("chat")
        batch = encode_batch(say("sum."))
        backend: Any = sessions["default"]
        assert backend.change(key, lambda branches: swap_all(branches, batch))
        (name,) = DjangoSession("chat").sync.list_archived()
        assert shown(page(reader, url("change", row))) == ["sum."]
        html = page(reader, url("change", row) + f"?branch={name}")
        assert shown(html) == ["m1.", "m2."]

    def test_what_has_nothing_to_show_is_not_offered(self, reader: Client) -> None:
        row = forked()
        remove(row, Removal())
        row.refresh_from_db()
        assert [branch.name for branch in History(row).branches] == ["main"]
        assert "as-branches" not in page(reader, url("change", row))

    def test_names_are_text(self, reader: Client) -> None:
        row = make("chat", *say("m1.", "m2."))
        Branch.objects.create(session=row, name=XSS)
        html = page(reader, url("change", row))
        assert_safe(html)
        assert "&lt;script&gt;alert(1)" in html

    def test_queries_are_the_same_for_two_branches_and_many(
        self, reader: Client
    ) -> None:
        row = forked()
        reader.get(url("change", row))
        with CaptureQueriesContext(connection) as few:
            reader.get(url("change", row))
        main = Branch.objects.get(name="main")
        Branch.objects.bulk_create(
            Branch(session=row, name=f"b{n}", parent=main, fork_position=1)
            for n in range(BRANCHES + 50)
        )
        with CaptureQueriesContext(connection) as many:
            html = page(reader, url("change", row))
        assert len(few) == len(many)
        assert html.count("?branch=b") == BRANCHES
        html = page(reader, url("change", row) + "?branch=main")
        assert shown(html) == ["m1.", "m2.", "m3.", "m4."]


class TestRuns:
    def test_usage_stands_where_a_run_ends(self, reader: Client) -> None:
        row = make("chat", *say("m1.", "m2.", "m3."))
        make_run(
            row,
            run_id="first-run",
            agent_name="Triage",
            model="gpt-x",
            first_position=1,
            last_position=2,
            input_tokens=1234,
            output_tokens=5,
        )
        make_run(
            row,
            run_id="second-run",
            agent_name="Billing",
            first_position=3,
            last_position=3,
            status="failed",
            error_code="model_error",
        )
        html = page(reader, url("change", row)).partition("as-transcript")[2]
        places = [
            html.index(text)
            for text in (
                "Agent Triage",
                ">m1.<",
                ">m2.<",
                "first-run",
                "1,234 tokens in, 5 out",
                "Agent Billing",
                ">m3.<",
                "second-run",
                "model_error",
            )
        ]
        assert places == sorted(places)

    def test_an_agent_is_named_where_it_changes(self, reader: Client) -> None:
        row = make("chat", *say("m1.", "m2."))
        for n in (1, 2):
            make_run(
                row, run_id=f"r{n}", agent_name="A", first_position=n, last_position=n
            )
        assert page(reader, url("change", row)).count("Agent A") == 1

    def test_runs_of_other_branches_and_sessions_are_left_out(
        self, reader: Client
    ) -> None:
        row = forked()
        main = Branch.objects.get(name="main")
        make_run(row, run_id="shared", branch=main, first_position=1, last_position=2)
        make_run(row, run_id="hidden", branch=main, first_position=3, last_position=4)
        make_run(row, run_id="of-alt", first_position=3, last_position=3)
        make_run(make("other"), run_id="other", first_position=1, last_position=9)
        html = page(reader, url("change", row))
        names = ("shared", "hidden", "of-alt", "other")
        assert [n for n in names if f"Run {n}" in html] == ["shared", "of-alt"]
        html = page(reader, url("change", row) + "?branch=main")
        assert [n for n in names if f"Run {n}" in html] == ["shared", "hidden"]

    def test_a_run_that_goes_on_later_ends_on_the_next_page(
        self, reader: Client
    ) -> None:
        row = make("chat", *say(*(f"n{n}." for n in range(150))))
        make_run(row, run_id="long-run", first_position=1, last_position=120)
        assert "long-run" in page(reader, url("change", row))
        assert "long-run" not in page(reader, url("change", row) + "?after=0")

    def test_an_answered_call_ends_its_run(self, reader: Client) -> None:
        row = make(
            "chat",
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        )
        make_run(row, run_id="call-run", first_position=1, last_position=2)
        assert "call-run" in page(reader, url("change", row))


def test_a_silent_hour_stands_between(reader: Client) -> None:
    from agent_sessions.models import SessionItem

    row = make("chat", *say("m1.", "m2."))
    first = SessionItem.objects.get(position=1)
    first.created_at -= timedelta(hours=1, minutes=1)
    first.save()
    assert "later" in page(reader, url("change", row))
