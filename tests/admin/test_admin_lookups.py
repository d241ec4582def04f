"""What the query strings of the admin's lists tell, and what they don't."""

from __future__ import annotations

import json
from typing import Any, ClassVar
from urllib.parse import urlencode

import pytest
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db.models import F, FilteredRelation, QuerySet
from django.db.models.functions import Lower
from django.http import HttpRequest
from django.test import Client
from django.urls import path, reverse

from agent_sessions.admin import AgentRunAdmin, AgentSessionAdmin
from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_pages import LIST, make, make_run, page, staff

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

RUNS = "admin:agent_sessions_agentrun_changelist"
SECRET = "Zebra"


class Long(admin.SimpleListFilter):
    title = "length"
    parameter_name = "long"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "Long"), ("no", "Short")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        long = {"yes": True, "no": False}.get(self.value() or "")
        return queryset if long is None else queryset.filter(item_count__gte=2 * long)


class Between(admin.FieldListFilter):
    """A filter with parameters that are no columns, as some packages have."""

    title = "between"

    def expected_parameters(self) -> Any:
        return [f"{self.field_path}_from"]

    def has_output(self) -> bool:
        return True

    def choices(self, changelist: Any) -> Any:
        return []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        given: Any = list(self.used_parameters.values())
        for values in given:
            queryset = queryset.filter(item_count__gte=values[-1])
        return queryset


class Early(admin.ListFilter):
    """A filter that says itself what it takes."""

    title = "early"
    used: Any = None

    def __init__(self, request: HttpRequest, params: Any, *args: Any) -> None:
        super().__init__(request, params, *args)
        self.used = params.pop("early_bird", None)

    def expected_parameters(self) -> Any:
        return ["early_bird"]

    def has_output(self) -> bool:
        return True

    def choices(self, changelist: Any) -> Any:
        return []

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.none() if self.used else queryset


class OurSessions(AgentSessionAdmin):
    """A project's own list: more filters and columns, some of them careless."""

    list_filter = (
        "agent_name",
        "user__is_staff",
        "branch__name",
        "runs__status",
        ("updated_at", admin.DateFieldListFilter),
        Long,
        Early,
        ("item_count", Between),
        # What quotes messages is for those who may read them.
        "title",
        "runs__state",
    )
    date_hierarchy = "created_at"
    show_facets = admin.ShowFacets.ALWAYS
    sortable_by = ("item_count", "quoted", "lowered", "named")

    def get_list_display(self, request: HttpRequest) -> tuple[str, ...]:
        return ("session_id", "item_count", "quoted", "lowered", "named")

    def get_queryset(self, request: HttpRequest) -> QuerySet[AgentSession]:
        rows = super().get_queryset(request)
        return rows.annotate(
            said=F("branch__items__text"), doing=FilteredRelation("runs")
        )

    @admin.display(ordering="-title")
    def quoted(self, obj: AgentSession) -> str:
        return f"<{obj.title}>"

    @admin.display(ordering=Lower("title"))
    def lowered(self, obj: AgentSession) -> str:
        return str(obj.title).lower()

    @admin.display(ordering=F("title").desc())
    def named(self, obj: AgentSession) -> str:
        return ""


class OurRuns(AgentRunAdmin):
    list_filter = ("status", "agent_name", "session__backend", "session__title")
    search_fields: ClassVar[Any] = ("=run_id", "session__title", "^state")
    ordering: ClassVar[Any] = ("session__title", "pk")


ours = admin.AdminSite(name="ours")
ours.register(AgentSession, OurSessions)
ours.register(AgentRun, OurRuns)
urlpatterns = [path("admin/", admin.site.urls), path("ours/", ours.urls)]
own_site = pytest.mark.urls("tests.admin.test_admin_lookups")
OURS = "ours:agent_sessions_agentsession_changelist"
OUR_RUNS = "ours:agent_sessions_agentrun_changelist"

# What one may ask for, with a value that is true of the row and one that is not.
SESSIONS = [
    ("title", f"{SECRET} one", "no"),
    ("title__exact", f"{SECRET} one", "no"),
    ("title__regex", "^Ze", "^Zf"),
    ("title__iregex", "^ze", "^zf"),
    ("title__startswith", "Z", "Y"),
    ("title__gte", "Z", "a"),
    ("title__in", f"{SECRET} one", "no"),
    ("title__isnull", "0", "1"),
    ("title__isempty", "0", "1"),
    ("title__range", "Z,a", "a,b"),
    ("metadata__plan", "gold", "lead"),
    ("metadata__plan__startswith", "g", "l"),
    ("metadata__has_key", "plan", "x"),
    ("metadata__contains", '{"plan": "gold"}', "{}"),
    ("metadata__isnull", "0", "1"),
    ("branches__items__text__contains", SECRET, "no"),
    ("branches__items__data__contains", SECRET, "no"),
    ("branches__items__data__isnull", "0", "1"),
    ("branches__items__size__gt", "1", "999999"),
    ("branches__name", "main", "no"),
    ("branch__items__text__startswith", "Z", "Y"),
    ("branch__name", "main", "no"),
    ("branch__session__title__regex", "^Ze", "^Zf"),
    ("branch__isnull", "0", "1"),
    ("runs__state__contains", "secret", "no"),
    ("runs__usage__seen", "1", "2"),
    ("runs__error_code", "boom", "no"),
    ("runs__session__title__startswith", "Z", "Y"),
    ("runs__isnull", "0", "1"),
    ("user__password__startswith", "pbkdf2", "no"),
    ("user__password__isnull", "0", "1"),
    ("user__email__contains", "@", "#"),
    ("user__username", "alice", "bob"),
    ("user__is_superuser__exact", "0", "1"),
    ("user__groups__name", "a", "b"),
    ("user__agent_sessions__title__startswith", "Z", "Y"),
    ("user_id__password", "a", "b"),
    ("state__regex", "^i", "^x"),
    ("session_id__regex", "^chat", "^no"),
    ("session_id__title", "Z", "Y"),
    ("remote_id__startswith", "conv_", "no"),
    ("run_owner__startswith", "host", "no"),
    ("run_id", "r", "no"),
    ("run_seen_at__isnull", "1", "0"),
    ("remote_deleting", "0", "1"),
    ("removed_at__isnull", "1", "0"),
    ("fence", "0", "1"),
    # They tell nothing new, but no index finds their rows.
    ("item_count", "2", "3"),
    ("item_count__gte", "1", "9"),
    ("agent_name", "", "x"),
    ("created_at__year", "2020", "1"),
    ("created_at__gte", "2020-01-01", "2999-01-01"),
    ("updated_at", "2020-01-01", "2999-01-01"),
    ("updated_at__hour", "1", "2"),
    ("updated_at__lte", "2020-01-01", "2999-01-01"),
    ("updated_at__gte__isnull", "0", "1"),
    ("active_on__month", "1", "2"),
    ("active_on__gte", "2020-01-01", "2999-01-01"),
    ("session_id__contains", "cha", "no"),
    ("session_id__startswith", "cha", "no"),
    ("session_id__gt", "a", "z"),
    ("id__contains", "1", "x"),
    ("id__gt", "0", "9"),
    ("user__gt", "0", "9"),
    ("user__isnull", "0", "1"),
    ("backend__in", "default", "no"),
    ("backend__contains", "def", "no"),
    ("state", "idle", "no"),
    ("state__in", "idle", "no"),
    ("expires_at__isnull", "0", "1"),
]
OF_RUNS = [
    ("session__title__regex", "^Ze", "^Zf"),
    ("session__title__isnull", "0", "1"),
    ("session__metadata__plan", "gold", "lead"),
    ("session__session_id__startswith", "chat", "no"),
    ("session__user__password__startswith", "pbkdf2", "no"),
    ("session__user__username", "alice", "bob"),
    ("session__branches__items__data__contains", SECRET, "no"),
    ("session__id__title", "a", "b"),
    ("session__state", "idle", "running"),
    ("branch__items__text__contains", SECRET, "no"),
    ("branch__name", "main", "no"),
    ("state__contains", "secret", "no"),
    ("state", "secret", "no"),
    ("state__endswith", "secret", "no"),
    ("usage__seen", "1", "2"),
    ("usage__isnull", "0", "1"),
    ("resumed_by__state__contains", "s", "t"),
    ("resumes__state__contains", "s", "t"),
    ("run_id__regex", "^r", "^x"),
    ("status__iregex", "^c", "^x"),
    ("turn_item__isnull", "1", "0"),
    ("error_code", "boom", "no"),
    ("agent_name", "", "x"),
    ("model__startswith", "gpt", "no"),
    ("total_tokens__gte", "0", "9"),
    ("started_at__gte", "2020-01-01", "2999-01-01"),
    ("finished_at__isnull", "0", "1"),
    ("status__in", "completed", "failed"),
    ("status__contains", "comp", "no"),
    ("session__gt", "0", "9"),
    ("run_id__startswith", "run", "no"),
]


@pytest.fixture
def row() -> AgentSession:
    alice = get_user_model().objects.create_user("alice", "a@example.com", "x")
    row = make(
        "chat",
        {"role": "user", "content": f"{SECRET} one"},
        user=alice,
        title=f"{SECRET} one",
        metadata={"plan": "gold"},
        remote_id="conv_1",
        run_owner="host:1",
    )
    make_run(
        row,
        state="secret",
        usage={"seen": 1},
        error_code="boom",
    )
    return row


@pytest.mark.parametrize("rights", [("view",), ("view", "clear", "delete")])
@pytest.mark.parametrize(
    ("name", "lookup", "true", "false"),
    [(LIST, *one) for one in SESSIONS] + [(RUNS, *one) for one in OF_RUNS],
)
class TestRefused:
    def test_whatever_the_value(
        self,
        row: AgentSession,
        rights: tuple[str, ...],
        name: str,
        lookup: str,
        true: str,
        false: str,
    ) -> None:
        client = staff(*rights, runs=True)
        harmless = {"q": "", "o": "1", "_facets": "True", "all": ""}
        for more in ({}, {"id__exact": str(row.pk)}, {"e": "1"}, harmless):
            for value in (true, false, ""):
                query = urlencode({**more, lookup: value})
                response = client.get(f"{reverse(name)}?{query}")
                assert response.status_code == 400, query

    def test_in_actions_too(
        self,
        row: AgentSession,
        rights: tuple[str, ...],
        name: str,
        lookup: str,
        true: str,
        false: str,
    ) -> None:
        data = {
            "action": "clear_history",
            "select_across": "1",
            "_selected_action": str(row.pk),
        }
        for value in (true, false):
            address = f"{reverse(name)}?{urlencode({lookup: value})}"
            assert (
                staff(*rights, runs=True, name=f"staff{value}")
                .post(address, data)
                .status_code
                == 400
            )


@pytest.mark.parametrize("name", [LIST, RUNS])
def test_those_who_read_have_no_more_look_ups(row: AgentSession, name: str) -> None:
    client = staff("view", "read", runs=True)
    for lookup, true, _false in SESSIONS if name == LIST else OF_RUNS:
        response = client.get(f"{reverse(name)}?{urlencode({lookup: true})}")
        assert response.status_code == 400, lookup


@pytest.mark.parametrize(
    ("name", "query"),
    [
        (LIST, "id__exact={row}"),
        (LIST, "pk__in={row},0"),
        (LIST, "backend=default"),
        (LIST, "user={user}"),
        (LIST, "user__exact={user}"),
        (LIST, "user__id__exact={user}"),
        (LIST, "user_id={user}"),
        (LIST, "session_id=chat"),
        (LIST, "updated_at__gte=2020-01-01 00:00:00%2B00:00"),
        (RUNS, "session__id__exact={row}"),
        (RUNS, "session={row}"),
        (RUNS, "status__exact=completed"),
        (RUNS, "status=completed"),
        (RUNS, "run_id=run-1"),
        (RUNS, "days=7"),
    ],
)
def test_what_the_list_shows_can_be_asked_for(
    row: AgentSession, name: str, query: str
) -> None:
    query = query.format(row=row.pk, user=row.user_id)
    html = page(staff("view", runs=True), f"{reverse(name)}?{query}")
    assert ">chat<" in html
    assert "1 agent" in html


@pytest.mark.parametrize("name", [LIST, RUNS])
@pytest.mark.parametrize("to_field", ["title", "metadata", "session", "user", "state"])
def test_no_column_but_the_key_stands_for_a_row(
    row: AgentSession, name: str, to_field: str
) -> None:
    client = staff("view", runs=True)
    for query in (f"_to_field={to_field}", f"_popup=1&_to_field={to_field}"):
        assert client.get(f"{reverse(name)}?{query}").status_code == 400
    change = name.replace("changelist", "change")
    response = client.get(f"{reverse(change, args=(SECRET,))}?_to_field={to_field}")
    assert response.status_code == 400


class TestSearch:
    @pytest.mark.parametrize("term", ["Zebra", "Ze", "one", "refund", "gold", "secret"])
    def test_finds_nothing_that_was_said(self, row: AgentSession, term: str) -> None:
        client = staff("view", runs=True)
        for name in (LIST, RUNS):
            assert "0 agent" in page(client, f"{reverse(name)}?q={term}")

    def test_suggestions_find_no_titles(self, row: AgentSession) -> None:
        client = staff("view", runs=True)
        assert suggested(client, SECRET) == []
        assert suggested(client, "cha") == ["chat"]
        assert suggested(client, "\x00cha") == ["chat"]
        reader = staff("view", "read", name="reader")
        assert suggested(reader, SECRET) == ["chat"]
        assert suggested(staff("read", name="other"), SECRET) is None


def suggested(client: Client, term: str, site: str = "admin") -> Any:
    query = urlencode(
        {
            "term": term,
            "app_label": "agent_sessions",
            "model_name": "agentrun",
            "field_name": "session",
        }
    )
    response = client.get(f"{reverse(f'{site}:autocomplete')}?{query}")
    if response.status_code == 403:
        return None
    return [one["text"] for one in json.loads(response.content)["results"]]


@own_site
class TestSubclass:
    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ("agent_name=Billing", {"other"}),
            ("user__is_staff__exact=0", {"chat"}),
            ("branch__name=main", {"chat", "other"}),
            ("runs__status__exact=completed", {"chat"}),
            ("updated_at__gte=2020-01-01 00:00:00%2B00:00", {"chat", "other"}),
            ("long=yes", {"other"}),
            ("item_count_from=2", {"other"}),
            ("early_bird=1", set()),
            ("created_at__year=2001", set()),
            ("agent_name=Billing&long=yes", {"other"}),
        ],
    )
    def test_its_filters_work(
        self, row: AgentSession, query: str, found: set[str]
    ) -> None:
        make("other", agent_name="Billing")
        html = page(staff("view"), f"{reverse(OURS)}?{query}")
        assert {name for name in ("chat", "other") if f">{name}</a>" in html} == found

    @pytest.mark.parametrize(
        "query",
        [
            "title=Zebra one",
            "title__startswith=Z",
            "runs__state__contains=secret",
            "user__password__startswith=p",
            "user__isnull__title=1",
            "user__is_staff__password=1",
            "branch__name__items=1",
            "agent_name__contains=Bill",
            "branch__items__text__contains=Z",
            "said__contains=Zebra",
            "said=Zebra one",
            "said__isnull=0",
            "doing__state__contains=secret",
            "doing=1",
            "nothing=1",
        ],
    )
    def test_its_filters_open_nothing_else(self, row: AgentSession, query: str) -> None:
        response = staff("view").get(f"{reverse(OURS)}?{query}")
        assert response.status_code == 400

    def test_what_quotes_messages_is_for_those_who_read(
        self, row: AgentSession
    ) -> None:
        html = page(staff("view", runs=True), reverse(OURS))
        assert SECRET not in html
        assert SECRET.lower() not in html
        assert "refund" not in html
        html = page(staff("view", "read", name="reader"), reverse(OURS))
        assert f"&lt;{SECRET} one&gt;" in html
        assert "?title=Zebra+one" in html
        html = page(
            staff("view", "read", name="again"), f"{reverse(OURS)}?title=Zebra+one"
        )
        assert ">chat</a>" in html

    def test_so_it_is_for_runs(self, row: AgentSession) -> None:
        client = staff("view", runs=True)
        assert SECRET not in page(client, reverse(OUR_RUNS))
        address = f"{reverse(OUR_RUNS)}?session__backend=default"
        assert "run-1" in page(client, address)
        assert "0 agent runs" in page(client, f"{reverse(OUR_RUNS)}?q=Zebra")
        assert "0 agent runs" in page(client, f"{reverse(OUR_RUNS)}?q=[{{")
        make_run(make("first", title="A"), run_id="second")
        html = page(client, reverse(OUR_RUNS))
        assert html.index(">run-1</a>") < html.index(">second</a>")
        for query in ("session__title=Zebra one", "session__title__startswith=Z"):
            assert client.get(f"{reverse(OUR_RUNS)}?{query}").status_code == 400
        reader = staff("view", "read", name="reader", runs=True)
        assert "run-1" in page(reader, f"{reverse(OUR_RUNS)}?session__title=Zebra+one")
        assert ">run-1</a>" in page(reader, f"{reverse(OUR_RUNS)}?q=Zebra")
        html = page(reader, reverse(OUR_RUNS))
        assert html.index(">run-1</a>") > html.index(">second</a>")

    @pytest.mark.parametrize("order", ["2", "-2", "3", "-3", "4", "-4", "2.-1", "0"])
    def test_the_order_tells_no_title(self, order: str) -> None:
        titles = ["b", "c", "a"]
        for number, title in enumerate(titles):
            make(f"s{number}", title=title)
        plain = in_order(page(staff("view"), reverse(OURS)))
        client = staff("view", name="other")
        # No actions, so the columns are counted from 0.
        assert in_order(page(client, f"{reverse(OURS)}?o={order}")) == plain
        reader = staff("view", "read", name="reader")
        found = in_order(page(reader, f"{reverse(OURS)}?o=4"))
        assert sorted(found) == sorted(plain)
        assert found != plain


def in_order(html: str) -> list[str]:
    return sorted(("s0", "s1", "s2"), key=lambda name: html.index(f">{name}</a>"))
