"""Rows whose bytes are no text: SQLite alone takes them."""

from __future__ import annotations

import io

import pytest
from django.core.management import call_command
from django.db import connection

from agent_sessions import DjangoSession
from agent_sessions.doctor import examine, restore
from agent_sessions.models import AgentSession, SessionItem
from agent_sessions.retention import store_of
from agent_sessions.transfer.export import FORMS
from tests.doctor.test_doctor import answer, user
from tests.support.exports import read_export

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_database]

SECRET = "SECRET"
BYTES = b"{SECRET \xff}"
FIRST = user("a")
SECOND = answer("b")


def stored() -> list[bytes]:
    """Return the bytes of every row, as they are in the file."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT CAST(data AS BLOB) FROM agent_sessions_sessionitem ORDER BY id"
        )
        return [bytes(row[0]) for row in cursor.fetchall()]


def break_row(data: bytes, *, as_blob: bool = False) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE agent_sessions_sessionitem SET data = "
            "CASE WHEN %s THEN %s ELSE CAST(%s AS TEXT) END WHERE position = 3",
            [as_blob, data, data],
        )


@pytest.fixture
def session() -> DjangoSession:
    """A session whose newest row is broken."""
    session = DjangoSession("s")
    session.sync.add_items([FIRST, SECOND, answer("c")])
    break_row(BYTES)
    return session


def export(form: str) -> str:
    out, err = io.StringIO(), io.StringIO()
    call_command("export_agent_sessions", "s", format=form, stdout=out, stderr=err)
    assert err.getvalue() == "Exported 1 session with 3 items.\n"
    return out.getvalue()


def test_the_doctor_puts_it_away_and_it_comes_back(session: DjangoSession) -> None:
    before = stored()
    report = examine()
    assert [(f.code, f.position) for f in report.findings] == [("unreadable_row", 3)]
    assert SECRET not in repr(report)
    assert examine(repair=True).is_clean
    assert examine().findings == []
    assert [q.position for q in examine().quarantined] == [3]
    assert session.sync.get_items() == [FIRST, SECOND]
    restore(AgentSession.objects.get(), 3)
    assert [f.code for f in examine().findings] == ["unreadable_row"]
    assert stored() == before


def test_reading_and_popping_pass_over_it(session: DjangoSession) -> None:
    assert session.sync.get_items() == [FIRST, SECOND]
    assert session.sync.get_items(1) == [SECOND]
    assert session.sync.pop_item() == SECOND
    assert session.sync.get_items() == [FIRST]
    assert stored()[-1] == BYTES


def test_a_page_shows_it_as_unreadable(session: DjangoSession) -> None:
    backend, key = store_of(AgentSession.objects.get())
    *_, row = backend.page(key, limit=10).items
    assert (row.position, row.item) == (3, None)
    assert row.raw.encode(errors="surrogateescape") == BYTES


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("form", sorted(FORMS))
def test_an_export_has_it(form: str) -> None:
    text = export(form)
    assert SECRET in text
    if form == "json":
        assert read_export(text)[0]["items"][-1]["raw"] == "{SECRET \udcff}"


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        # What the text of bytes alone would pass for.
        (b'{"a":"\xff"}', ["unreadable_row"]),
        (b'"\xff"', ["unreadable_row"]),
        (b'{"a":"\xed\xa0\x80"}', ["unreadable_row"]),
        (b'\xef\xbb\xbf{"a":1}', ["unreadable_row"]),
        (b"{\xff", ["unreadable_row"]),
        (b"[]", ["scalar_row"]),
        (b"{}", ["wrong_columns"]),
    ],
)
@pytest.mark.parametrize("as_blob", [False, True])
def test_blobs_are_judged_as_text_is(
    session: DjangoSession, data: bytes, codes: list[str], as_blob: bool
) -> None:
    break_row(data, as_blob=as_blob)
    shown = len(session.sync.get_items())
    backend, key = store_of(AgentSession.objects.get())
    page = backend.page(key, limit=10).items
    assert shown == sum(row.item is not None for row in page)
    assert [f.code for f in examine().findings] == codes
    for form in FORMS:
        export(form)
    assert examine(repair=True).is_clean
    assert examine().findings == []
    assert stored()[-1] == data
    assert len(session.sync.get_items()) == shown


def test_one_session_that_cannot_be_read_ends_no_other(session: DjangoSession) -> None:
    """Other columns may hold such bytes too; the driver's error quotes them."""
    session.sync.pop_item()
    DjangoSession("t").sync.add_items([user("x"), user("x")])
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE agent_sessions_sessionitem SET text = CAST(%s AS TEXT) "
            "WHERE position = 3",
            [BYTES],
        )
    report = examine(repair=True)
    assert [(s.session_id, s.failed) for s in report.skipped] == [("s", True)]
    assert not report.is_clean
    assert SECRET not in repr(report)
    assert [(f.session_id, f.code) for f in report.findings] == [
        ("t", "duplicate_turn")
    ]
    assert (report.sessions, report.items) == (1, 2)


def test_the_columns_type_needs_no_migration_of_its_own() -> None:
    _, path, _, _ = SessionItem._meta.get_field("data").deconstruct()
    assert path == "django.db.models.TextField"
