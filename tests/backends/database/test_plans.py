"""Which indexes serve the tables, as the database itself plans it."""

from __future__ import annotations

from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth import get_user_model
from django.db import connection, transaction
from django.db.models import ForeignKey, QuerySet

from agent_sessions.managers import removed
from agent_sessions.models import AgentSession

pytestmark = pytest.mark.django_db

FOREIGN_KEYS = [
    field
    for model in apps.get_app_config("agent_sessions").get_models()
    for field in model._meta.local_fields
    if isinstance(field, ForeignKey)
]


def plan(rows: QuerySet[Any]) -> str:
    """Return the plan of a query, as if its tables were long."""
    if connection.vendor == "mysql":
        pytest.skip("InnoDB indexes every foreign key by itself.")
    with transaction.atomic():
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL enable_seqscan = off")
        return rows.explain()


@pytest.mark.parametrize("field", FOREIGN_KEYS, ids=str)
def test_a_deleted_row_finds_what_refers_to_it_by_an_index(field: Any) -> None:
    assert len(FOREIGN_KEYS) == 9
    rows = field.model._base_manager.filter(**{f"{field.name}__in": [1, 2]})
    found = plan(rows.order_by().values("pk"))
    scanned = "SCAN" if connection.vendor == "sqlite" else "Seq Scan"
    assert scanned not in found
    assert field.column in found


def test_removed_histories_are_found_by_their_index() -> None:
    found = plan(AgentSession._base_manager.filter(removed()).values("pk"))
    assert "removed_at" in found
    assert "SCAN" not in found
    assert "Seq Scan" not in found


@pytest.mark.parametrize("owned", [True, False], ids=["owner", "all"])
def test_sessions_are_listed_in_the_order_of_an_index(owned: bool) -> None:
    user = get_user_model().objects.create_user("alice")
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"s{number}", user=user if number % 2 else None)
        for number in range(2_000)
    )
    if connection.vendor == "postgresql":
        # It goes by what it knows of a table, which may be from before these rows.
        with connection.cursor() as cursor:
            cursor.execute(f"ANALYZE {AgentSession._meta.db_table}")
    rows = AgentSession.objects.all()
    if owned:
        rows = rows.for_user(user)
    found = plan(rows.order_by("-active_on", "-pk").values("pk")[:10])
    assert ("by_owner" if owned else "by_day") in found
    assert "TEMP B-TREE" not in found
    assert "Sort" not in found
