"""What the JSON views read doesn't grow with the tables."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from agent_sessions.models import AgentSession
from benchmarks.costs import watched
from tests.settings import DATABASE_KIND
from tests.support.chat import make_user

pytestmark = pytest.mark.django_db


@pytest.mark.skipif(
    DATABASE_KIND == "mariadb", reason="MariaDB sorts all sessions of a user."
)
def test_the_list_reads_a_page_of_many_sessions() -> None:
    user = make_user()
    browser = Client()
    browser.force_login(user)
    now, read_rows = timezone.now(), {}
    for count in (200, 2_000):
        AgentSession.objects.all().delete()
        times = [now - timedelta(days=number) for number in range(count)]
        AgentSession.objects.bulk_create(
            AgentSession(
                session_id=str(number),
                user=user,
                updated_at=when,
                active_on=when.date(),
            )
            for number, when in enumerate(times)
        )
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("ANALYZE agent_sessions_agentsession")
        with watched() as costs:
            page = browser.get("/agents/sessions/").json()
            later = browser.get("/agents/sessions/", {"after": page["next"]}).json()
        found = [entry["id"] for entry in page["sessions"] + later["sessions"]]
        assert found == [str(number) for number in range(100)]
        read_rows[count] = costs.rows
    assert read_rows[2_000] < 1.5 * read_rows[200] + 50, read_rows
