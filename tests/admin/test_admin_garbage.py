"""Absurd query strings, addresses and forms: refused, never an error of the server."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from django.test import Client
from django.urls import reverse

from agent_sessions.models import AgentRun, AgentSession, Branch
from tests.support.admin_pages import LIST, RIGHTS, make, make_run, staff, url

pytestmark = pytest.mark.django_db

RUNS = "admin:agent_sessions_agentrun_changelist"
OVERVIEW = "admin:agent_sessions_agentsession_overview"
VALUES = {
    "digits": "9" * 5_000,
    "over 64 bits": str(2**63),
    "19 digits": "9" * 19,
    "the largest": str(2**63 - 1),
    "below 64 bits": str(-(2**63) - 1),
    "negative": "-1",
    "a fraction": "1.5",
    "an exponent": "1e400",
    "no number": "NaN",
    "full width": "\uff11\uff12",
    "superscript": "\u00b2",
    "nothing": "",
    "a blank": " ",
    "NUL": "a\x00b",
    "only NUL": "\x00",
    "markup": "\"'><script>",
    "a date before all": "0001-01-01 00:00:00+14:00",
    "a date after all": "9999-12-31 23:59:59-12:00",
    "no date": "2026-99-99",
    "a surrogate": "\ud800",
    "beyond the plane": "\U0010ffff",
    "long": "x" * 5_000,
    "a path": "../../1",
    "SQL": "1' OR '1'='1",
    "percent": "%",
    "list": "[1,2",
}
# Nothing reads these as a number or date; once in an address is enough.
TEXTS = {"a path", "SQL", "percent", "list", "markup", "a blank", "only NUL", "long"}
# What the pages read from their query strings.
QUERIES = {
    LIST: (
        *("p", "o", "q", "all", "e", "_facets", "_popup", "_to_field", "backend"),
        *("state__exact", "user__isempty", "active_on__gte", "active_on__lt"),
        *("id__exact", "id__in", "pk", "user", "user__isnull", "user_id__in"),
        *("item_count__gte", "input_tokens__in", "created_at__gte", "created_at__year"),
        *(
            "created_at__date",
            "created_at__year__gte",
            "expires_at__lt",
            "state__range",
        ),
        *("session_id__startswith", "session_id__in", "nothing", "title", ""),
        *("active_on__isnull", "created_at__range", "item_count__range"),
        *("_changelist_filters", "_source_model", "created_at__week_day"),
    ),
    RUNS: (
        *("p", "o", "q", "e", "days", "status__exact", "session__id__exact"),
        *("session", "id__in", "started_at__gte", "started_at__year", "requests__gte"),
        *("first_position__lte", "total_tokens__in", "run_id", "nothing"),
    ),
    OVERVIEW: ("days",),
    "change": ("before", "after", "branch", "_to_field"),
    "item": ("branch",),
    "history": ("p", "all"),
    "delete": ("_to_field", "_popup", "_changelist_filters"),
    "clear": ("_changelist_filters",),
    "export": ("branch",),
}
PARAMETERS = [(page, name) for page, names in QUERIES.items() for name in names]


@pytest.fixture
def row() -> AgentSession:
    row = make()
    make_run(row, first_position=1, last_position=2)
    return row


@pytest.fixture
def client() -> Client:
    return staff(*RIGHTS, runs=True)


def address(page: str, row: AgentSession) -> str:
    if page.startswith("admin:"):
        return reverse(page)
    more = {"item": (1,), "export": ("json",)}.get(page, ())
    return url(page, row, *more)


def is_answer(response: Any) -> bool:
    """Return whether a response is one; read to its end: errors may come late."""
    if response.streaming:
        b"".join(response.streaming_content)
    return response.status_code in {200, 302, 400, 403, 404}


def encoded(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(("page", "parameter"), PARAMETERS)
@pytest.mark.filterwarnings("ignore:DateTimeField .* received a naive datetime")
def test_query_strings(
    client: Client, row: AgentSession, page: str, parameter: str
) -> None:
    start = address(page, row)
    for name in VALUES.keys() - TEXTS:
        value = VALUES[name]
        query = f"{parameter}={encoded(value)}"
        response = client.get(f"{start}?{query}")
        assert is_answer(response), name
        if response.status_code == 302 and "e=1" in response.headers["Location"]:
            assert is_answer(client.get(f"{start}?{query}&e=1")), name


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_addresses(client: Client, row: AgentSession, value: str) -> None:
    base, runs = reverse(LIST), reverse(RUNS)
    key = encoded(value)
    for place in (
        *(f"{base}{key}/{page}/" for page in ("change", "clear", "delete", "history")),
        *(f"{runs}{key}/{page}/" for page in ("change", "delete", "history")),
        f"{base}{key}/items/1/",
        f"{base}{key}/export/json/",
        f"{base}{row.pk}/items/{key}/",
        f"{base}{row.pk}/export/{key}/",
        f"{base}{row.pk}/{key}/",
        f"{base}{key}/",
        f"{base}overview/{key}/",
        f"{reverse('admin:app_list', args=('agent_sessions',))}{key}/",
        f"/admin/r/{key}/{key}/",
    ):
        assert is_answer(client.get(place)), place


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.filterwarnings("ignore:DateTimeField .* received a naive datetime")
def test_forms(client: Client, row: AgentSession, value: str) -> None:
    value = value.replace("\ud800", "\ufffd")
    for data in (
        {"action": value},
        {"action": "clear_history", "_selected_action": value},
        {"action": "clear_history", "_selected_action": [row.pk, value]},
        {"action": "delete_selected", "_selected_action": value, "post": "yes"},
        {"action": "export_json", "_selected_action": value},
        {"action": "clear_history", "_selected_action": row.pk, "index": value},
        {"action": "export_json", "_selected_action": row.pk, "select_across": value},
        {
            "action": "clear_history",
            "_selected_action": row.pk,
            "post": "yes",
            "count": value,
        },
    ):
        assert is_answer(client.post(reverse(LIST), data)), data
    assert is_answer(client.post(url("clear", row), {"post": value, "count": value}))
    assert AgentSession.objects.get().item_count == 2
    assert is_answer(client.post(reverse(RUNS), {"action": value}))


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_suggestions(client: Client, row: AgentSession, value: str) -> None:
    given = {
        "term": "",
        "app_label": "agent_sessions",
        "model_name": "agentrun",
        "field_name": "session",
        "page": "1",
    }
    for name in given:
        query = "&".join(
            f"{key}={encoded(value) if key == name else one}"
            for key, one in given.items()
        )
        assert is_answer(client.get(f"{reverse('admin:autocomplete')}?{query}")), name


def test_branches_of_a_hundred_are_looked_up_by_sane_names(client: Client) -> None:
    row = make()
    Branch.objects.bulk_create(Branch(session=row, name=f"b{n}") for n in range(120))
    for value in VALUES.values():
        assert is_answer(client.get(f"{url('change', row)}?branch={encoded(value)}"))
        place = f"{url('item', row, 1)}?branch={encoded(value)}"
        assert is_answer(client.get(place))


def test_absurd_places_show_the_newest_page(client: Client, row: AgentSession) -> None:
    for value in ("9" * 5_000, str(2**63), "-1", "\uff11", "x"):
        for name in ("before", "after"):
            response = client.get(f"{url('change', row)}?{name}={encoded(value)}")
            assert "First line of chat" in response.content.decode()
    # The largest that can be stored is a place like any other.
    response = client.get(f"{url('change', row)}?before={2**63 - 1}")
    assert "First line of chat" in response.content.decode()


def test_runs_of_absurd_positions_are_shown(client: Client, row: AgentSession) -> None:
    run = make_run(row, run_id="odd", first_position=-(2**63), last_position=2**63 - 1)
    other = make_run(row, run_id="back", first_position=2**63 - 1, last_position=1)
    for one in (run, other):
        place = reverse("admin:agent_sessions_agentrun_change", args=(one.pk,))
        assert client.get(place).status_code == 200
    assert client.get(url("change", row)).status_code == 200
    assert AgentRun.objects.count() == 3


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("offset", ["+23:59", "-23:59"])
def test_offsets_that_a_database_refuses(offset: str) -> None:
    make()
    client = staff(*RIGHTS, runs=True)
    for day in ("0001-01-01", "9999-12-31"):
        value = encoded(f"{day} 00:00:00{offset}")
        for lookup in ("created_at__gte", "expires_at__lt"):
            response = client.get(f"{reverse(LIST)}?{lookup}={value}")
            assert is_answer(response)
