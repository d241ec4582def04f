"""Every door of docs/doors.md: each is in its tables, and is walked as everybody."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from asgiref.sync import sync_to_async
from channels.auth import AuthMiddlewareStack
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core.cache import cache
from django.core.exceptions import PermissionDenied
from django.test import AsyncClient, Client
from django.urls import include, path, reverse

from agent_sessions import urls
from agent_sessions.agui import parse_frame
from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun, AgentSession
from agent_sessions.views import SessionListView, SessionMessagesView, SessionView
from tests.admin import test_admin_doors
from tests.support.admin_pages import make, staff
from tests.support.chat import Closed, Socket, make_user, refusal_of
from tests.support.gated import gated
from tests.support.waiting import asked, wait
from tests.websocket.test_consumer import speaker
from tests.websocket.test_sockets import Browser

ROOT = Path(__file__).parents[2]
CANARY = "canary"
ID = "9f1c"
pytestmark = [pytest.mark.one_database, pytest.mark.urls("tests.checks.test_doors")]


class Rule:
    """One rule for the consumer and the views, as docs/websocket.md has it."""

    async def authorize(self, user: Any, session_id: str | None) -> bool:
        return not await user.groups.filter(name="banned").aexists()


class Ruled(Rule, AgentConsumer):
    """A consumer that refuses some users."""


def ruled(view: Any) -> Any:
    kind: Any = type(f"Ruled{view.__name__}", (Rule, view), {})
    return kind.as_view()


one = "ruled/sessions/<str:session_id>/"
urlpatterns = [
    path("admin/", admin.site.urls),
    path("agents/", include("agent_sessions.urls")),
    path("ruled/sessions/", ruled(SessionListView)),
    path(one, ruled(SessionView)),
    path(f"{one}messages/", ruled(SessionMessagesView)),
]


# -- the tables ------------------------------------------------------------------------


def tables(heading: str) -> dict[str, list[str]]:
    """Read the rows below a heading: the cells of each by the names in its first."""
    text = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    found: dict[str, list[str]] = {}
    for line in part.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 4, line
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in found, name
                found[name] = cells
    return found


def codes(cell: str) -> set[int]:
    return set(map(int, re.findall(r"\b\d{3,4}\b", cell)))


HOOKS = {
    "queryset": "get_queryset()",
    **{
        name: f"has_{name}_permission()" for name in ("view", "read", "clear", "delete")
    },
}


class TestAdmin:
    """tests/admin/test_admin_doors.py walks these pages and actions; these are its words."""

    @pytest.mark.parametrize(
        ("heading", "doors"),
        [
            ("Admin pages", test_admin_doors.PAGES),
            ("Actions", test_admin_doors.ACTIONS),
        ],
    )
    def test_rows_are_the_doors_that_are_walked(
        self, heading: str, doors: dict[str, test_admin_doors.Door]
    ) -> None:
        rows = tables(heading)
        assert set(rows) - set(DJANGOS_OWN) == set(doors)
        for name, door in doors.items():
            _, who, check, _ = rows[name]
            needs = set(re.findall(r"`(\w+_agent\w+)`", who.partition(";")[0]))
            assert needs == door.needs - {"nobody"}, name
            assert ("nobody" in door.needs) is (who == "nobody"), name
            asks = {hook for hook, call in HOOKS.items() if f"`{call}`" in check}
            assert asks == door.asks, name


def suggestions(person: Client) -> Any:
    query = "app_label=agent_sessions&model_name=agentrun&field_name=session"
    return person.get(f"{reverse('admin:autocomplete')}?{query}")


def index(person: Client) -> Any:
    return person.get(reverse("admin:index"))


def owner_deletion(person: Client) -> Any:
    owner = get_user_model().objects.get(username="owner")
    return person.get(reverse("admin:auth_user_delete", args=(owner.pk,)))


# Django's pages, the rights that they need, and whether being staff is enough.
DJANGOS_OWN = {
    "autocomplete": (suggestions, {"view_agentsession"}),
    "index": (index, set()),
    "auth_user_delete": (owner_deletion, {"delete_user"}),
}


# -- who knocks ------------------------------------------------------------------------

NAMES = [f"{right}_agentsession" for right in ("view", "read", "clear", "delete")]
RIGHTS = [*NAMES, "view_agentrun", "delete_user"]
STRANGERS = [
    "another user",
    *(f"staff, {right}" for right in RIGHTS),
    "staff with all rights",
    "superuser",
]
NOBODY = ["anonymous", "inactive owner"]
PERSONS = ["owner", *STRANGERS, *NOBODY, "banned owner"]


class World:
    """A session with a canary in all that it holds, and a run that waits."""

    def __init__(self) -> None:
        cache.clear()
        self.owner = make_user("owner")
        self.row = make(
            ID,
            {"role": "user", "content": f"{CANARY}-question"},
            {"role": "assistant", "content": f"{CANARY}-answer"},
            user=self.owner,
            title=f"{CANARY}-title",
            metadata={"about": f"{CANARY}-metadata"},
        )
        wait(
            self.row,
            "r-0",
            interrupts=asked("pay", f'"{CANARY}-argument"'),
            usage={f"{CANARY}-usage": 1},
            first_position=1,
            last_position=2,
        )

    def person(self, name: str) -> Any:
        users: Any = get_user_model().objects
        if name == "superuser":
            return users.create_superuser("root")
        if name == "inactive owner":
            users.filter(pk=self.owner.pk).update(is_active=False)
        if name == "banned owner":
            self.owner.groups.create(name="banned")
        if "owner" in name:
            return self.owner
        user = users.create_user("someone", is_staff=name.startswith("staff"))
        rights = RIGHTS if "all" in name else [name.partition(", ")[2]]
        user.user_permissions.set(Permission.objects.filter(codename__in=rights))
        return user

    def come_in(self, name: str) -> Client:
        client = Client()
        if name == "inactive owner":
            client.force_login(self.owner)
            self.person(name)
        elif name != "anonymous":
            client.force_login(self.person(name))
        return client

    def is_untouched(self) -> bool:
        row = AgentSession.objects.filter(pk=self.row.pk).first()
        run = AgentRun.objects.filter(session=self.row).values_list("run_id", "status")
        return (
            row is not None
            and (row.item_count, row.state, row.user_id)
            == (2, "waiting", self.owner.pk)
            and list(run) == [("r-0", "waiting")]
        )


def says(response: Any) -> str:
    text = b"".join(response) if response.streaming else response.content
    return f"{text.decode()} {response.headers}"


# -- Django's pages and query strings --------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("person", PERSONS)
@pytest.mark.parametrize("name", DJANGOS_OWN)
def test_djangos_own_pages_quote_nothing(name: str, person: str) -> None:
    world = World()
    AgentSession.objects.filter(pk=world.row.pk).update(state="idle")
    client = world.come_in(person)
    ask, needs = DJANGOS_OWN[name]
    response = ask(client)
    rights = {person.removeprefix("staff, ")}
    if person in {"superuser", "staff with all rights"}:
        rights = set(RIGHTS)
    if not (person.startswith("staff") or person == "superuser"):
        assert response.status_code == 302
    else:
        assert response.status_code == (200 if needs <= rights else 403)
    assert CANARY not in says(response)
    if name == "auth_user_delete" and person == "staff, delete_user":
        # The right to delete users is none to delete their sessions.
        client.post(response.wsgi_request.path, {"post": "yes"})
        assert AgentSession.objects.filter(pk=world.row.pk).exists()


LIST = "admin:agent_sessions_agentsession_changelist"
RUNS = "admin:agent_sessions_agentrun_changelist"
COLUMNS = ("title", "metadata", "branch__items__data", "runs__state", "runs__usage")
# Of each parameter, queries that could tell a title from another one.
QUERIES: dict[str, list[str]] = {
    "q": ["q={}", "q={}-title"],
    "column__lookup": [
        f"{column}__{lookup}={{}}"
        for column in (*COLUMNS, "session__title")
        for lookup in ("startswith", "regex", "icontains", "gt")
    ],
    "o": [f"o={sign}{n}&x={{}}" for n in range(1, 10) for sign in ("", "-")],
    "p": ["p=1&x={}", "p=99&x={}"],
    "all": ["all=&x={}"],
    "_facets": ["_facets=True&x={}"],
    "_to_field": ["_to_field=title&x={}", "_popup=1&_to_field=metadata&x={}"],
    "_popup": ["_popup=1&x={}"],
    "before": ["before={}"],
    "after": ["after={}"],
    "branch": ["branch={}"],
    "days": ["days={}"],
    "term": ["term={}"],
}


@pytest.mark.django_db
@pytest.mark.parametrize("parameter", QUERIES)
def test_no_query_string_tells_contents(parameter: str) -> None:
    """A right guess and a wrong one look alike, in lists and pages of each kind."""
    world = World()
    later = make("later", user=world.owner, title="mmm")
    viewer = staff("view", runs=True)
    page = reverse("admin:agent_sessions_agentsession_change", args=(world.row.pk,))
    run = AgentRun.objects.get()
    places = [
        reverse(LIST),
        reverse(RUNS),
        reverse("admin:agent_sessions_agentsession_overview"),
        page,
        reverse("admin:agent_sessions_agentrun_change", args=(run.pk,)),
        f"{page}items/1/",
    ]
    ask = "?app_label=agent_sessions&model_name=agentrun&field_name=session&"
    autocomplete = reverse("admin:autocomplete") + ask
    for place in [*(f"{place}?" for place in places), autocomplete]:
        for query in QUERIES[parameter]:
            answers = []
            for title, guess in (("aaa", CANARY), ("zzz", CANARY), ("aaa", "wrong")):
                rows = AgentSession.objects.filter(pk=world.row.pk)
                rows.update(title=f"{CANARY} {title}" if title == "aaa" else title)
                response = viewer.get(place + query.format(guess), follow=True)
                answers.append(
                    (
                        response.status_code,
                        re.findall(r">(9f1c|later)<", says(response)),
                    )
                )
                html = says(response).replace(guess, "")
                assert f"{CANARY}-" not in html
            assert answers[0] == answers[1] == answers[2], query
    assert later.pk


def test_each_query_string_of_the_table_is_walked() -> None:
    assert set(tables("Query strings")) == set(QUERIES)


# -- HTTP ------------------------------------------------------------------------------

OF_ONE = "sessions/<str:session_id>/"
# What answers whom it lets in; whether that is the owner alone.
HTTP: dict[str, tuple[int, bool]] = {
    "GET sessions/": (200, False),
    "POST sessions/": (201, False),
    f"DELETE {OF_ONE}": (204, True),
    f"GET {OF_ONE}messages/": (200, True),
    "HEAD": (200, True),
    "OPTIONS": (200, False),
}
WALKED_AT = {"HEAD": f"{OF_ONE}messages/", "OPTIONS": OF_ONE}


def test_each_request_of_the_code_is_in_the_table_and_is_walked() -> None:
    patterns: list[Any] = urls.urlpatterns
    found = {
        f"{method.upper()} {pattern.pattern}"
        for pattern in patterns
        for method in ("get", "post", "put", "patch", "delete", "trace")
        if hasattr(pattern.callback.view_class, method)
    }
    assert found | {"HEAD", "OPTIONS"} == set(HTTP) == set(tables("HTTP"))


def expected(door: str, person: str) -> int:
    status, is_owners = HTTP[door]
    if person in NOBODY:
        return 401
    if person == "banned owner":
        return 403
    return 404 if is_owners and person in STRANGERS else status


@pytest.mark.parametrize("door", HTTP)
def test_the_table_has_the_codes_that_are_expected(door: str) -> None:
    refused = {expected(door, person) for person in PERSONS}
    assert codes(tables("HTTP")[door][3]) == {code for code in refused if code > 400}


@pytest.mark.django_db
@pytest.mark.parametrize("person", PERSONS)
@pytest.mark.parametrize("door", HTTP)
@pytest.mark.parametrize("prefix", ["agents", "ruled"])
def test_requests(door: str, person: str, prefix: str) -> None:
    if person == "banned owner":
        prefix = "ruled"
    world = World()
    client = world.come_in(person)
    method, _, place = door.partition(" ")
    address = (place or WALKED_AT[door]).replace("<str:session_id>", ID)
    response = getattr(client, method.lower())(f"/{prefix}/{address}")
    assert response.status_code == expected(door, person)
    is_owner = person == "owner"
    assert (CANARY in says(response)) is (is_owner and method == "GET")
    if response.status_code >= 400 and method != "HEAD":
        assert set(response.json()) == {"code", "message"}
    if door == "GET sessions/" and person in STRANGERS:
        assert response.json() == {"sessions": [], "next": None}
    made = AgentSession.objects.exclude(pk=world.row.pk)
    assert made.count() == (method == "POST" and response.status_code == 201)
    assert world.is_untouched() is not (is_owner and method == "DELETE")
    # An id that nobody has gets the same answer.
    if person in STRANGERS and HTTP[door][1]:
        unknown = address.replace(ID, "unknown")
        answer = getattr(client, method.lower())(f"/{prefix}/{unknown}")
        assert answer.content == response.content


@pytest.mark.django_db
@pytest.mark.parametrize("way", ["Plain", "Async", "Raising"])
def test_a_view_asks_its_rule_before_it_looks(rf: Any, way: str) -> None:
    """A coroutine is true, so a rule that is one must be waited for."""
    world = World()
    seen: list[tuple[Any, str | None]] = []

    class Plain(SessionView):
        def authorize(self, user: Any, session_id: str | None) -> bool:
            seen.append((user, session_id))
            return False

    class Async(SessionView):
        async def authorize(self, user: Any, session_id: str | None) -> bool:
            seen.append((user, session_id))
            return False

    class Raising(SessionView):
        def authorize(self, user: Any, session_id: str | None) -> bool:
            seen.append((user, session_id))
            raise PermissionDenied

    request = rf.delete("/")
    request.user = world.owner
    kinds = {kind.__name__: kind for kind in (Plain, Async, Raising)}
    view: Any = kinds[way].as_view()
    for session_id in (ID, "unknown"):
        response = view(request, session_id=session_id)
        answer = json.loads(response.content)
        assert (response.status_code, answer) == (403, refusal_of("forbidden"))
        assert response["Cache-Control"] == "private, no-store"
    assert seen == [(world.owner, ID), (world.owner, "unknown")]
    assert world.is_untouched()


@pytest.mark.django_db
async def test_a_view_asks_its_rule_under_asgi() -> None:
    world = await sync_to_async(World)()
    client = AsyncClient()
    await client.aforce_login(world.owner)
    for path_of, status in (("", 200), (f"{ID}/messages/", 200), ("x/messages/", 404)):
        response = await client.get(f"/ruled/sessions/{path_of}")
        assert response.status_code == status
    await sync_to_async(world.person)("banned owner")
    for path_of in ("", f"{ID}/messages/", "x/messages/"):
        response = await client.get(f"/ruled/sessions/{path_of}")
        assert response.status_code == 403


# -- sockets ---------------------------------------------------------------------------

MESSAGE = {"id": "u-1", "role": "user", "content": "Hi"}
ANSWER = {"interruptId": "c1", "status": "resolved", "payload": {"approved": True}}
FRAMES: dict[str, Any] = {
    "run": {"threadId": ID, "runId": "r-9", "messages": [MESSAGE]},
    "resume": {"threadId": ID, "runId": "r-9", "messages": [], "resume": [ANSWER]},
    "switch": {
        "threadId": ID,
        "runId": "r-9",
        "messages": [],
        "forwardedProps": {"agentSessions": {"branch": "main"}},
    },
    "abort": {"type": "abort", "runId": "r-0"},
    "sync": {"type": "sync"},
    "anything else": {"type": "hello"},
}
CLOSED = {
    **dict.fromkeys(STRANGERS, 4404),
    **dict.fromkeys(NOBODY, 4401),
    "banned owner": 4403,
}


def test_each_frame_of_the_code_is_in_the_table_and_is_walked() -> None:
    rows = tables("Frames from the client")
    kinds = get_type_hints(parse_frame)["return"].__args__
    named = {kind.__name__.removesuffix("Request").lower() for kind in kinds}
    assert named | {"resume", "anything else"} == set(FRAMES)
    assert set(rows) == {"handshake", *FRAMES}
    for name in FRAMES:
        assert codes(rows[name][3]) == set(CLOSED.values())
    assert codes(rows["handshake"][3]) == {403, 4429, *CLOSED.values()}


def tab_of(world: World, person: str, **options: Any) -> Socket:
    """Open a socket as a browser does, with the person's own cookies."""
    options = {"consumer": Ruled, "around": AuthMiddlewareStack, **options}
    if person == "anonymous":
        return Socket(ID, None, speaker("no"), **options)
    browser = Browser(world.owner, ID)
    browser.client = world.come_in(person)
    return browser.tab(speaker("yes"), **options)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("person", CLOSED)
async def test_frames_of_others_are_not_read(person: str) -> None:
    world = await sync_to_async(World)()
    first = await sync_to_async(tab_of)(world, person)
    for name, frame in FRAMES.items():
        headers: Any = first.communicator.scope["headers"]
        options: Any = {"consumer": Ruled, "around": AuthMiddlewareStack}
        async with Socket(ID, None, speaker("no"), headers=headers, **options) as tab:
            await tab.send(frame)
            with pytest.raises(Closed) as closed:
                await tab.frame()
            assert closed.value.code == CLOSED[person], name
            assert await tab.silent(0.02)
        assert await sync_to_async(world.is_untouched)(), name


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", FRAMES)
async def test_frames_of_the_owner_are_read(name: str) -> None:
    world = await sync_to_async(World)()
    async with await sync_to_async(tab_of)(world, "owner") as tab:
        await tab.send(FRAMES[name])
        if name == "abort":
            assert await tab.silent(0.1)
        elif name == "sync":
            assert CANARY in json.dumps(await tab.to_end())
        else:
            assert (await tab.frame())["chunk"]["type"].startswith("RUN_")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", FRAMES)
async def test_frames_after_a_log_out_are_not_read(name: str) -> None:
    world = await sync_to_async(World)()
    browser = await sync_to_async(Browser)(world.owner, ID)
    async with browser.tab(speaker("no")) as tab:
        await tab.sync()
        await tab.to_end()
        await sync_to_async(browser.client.logout)()
        await tab.send(FRAMES[name])
        assert await tab.closed() == 4401
    assert await sync_to_async(world.is_untouched)()


@pytest.mark.django_db(transaction=True)
async def test_handshakes_that_are_too_many_or_from_elsewhere() -> None:
    world = await sync_to_async(World)()
    origin = [(b"origin", b"https://elsewhere.example")]
    tab = Socket(ID, world.owner, speaker("no"), headers=origin)
    connected, _ = await tab.communicator.connect()
    assert not connected
    async with Socket(ID, world.owner, speaker("no"), max_sockets=1) as tab:
        await tab.sync()
        await tab.to_end()
        async with Socket(ID, world.owner, speaker("no"), max_sockets=1) as second:
            assert await tab.closed() == 4429
            await second.sync()
            await second.to_end()


# -- what goes out ---------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
async def test_frames_from_the_server_reach_the_session_alone() -> None:
    rows = tables("Frames from the server")
    assert set(rows) == {"event", "snapshot", "refused", "ping", "close"}
    world = await sync_to_async(World)()
    await AgentRun.objects.all().adelete()
    await AgentSession.objects.aupdate(state="idle")
    await sync_to_async(make)("mine", user=world.owner)
    agent, model = gated("one two three four")
    model.gate.set()
    async with (
        Socket(ID, world.owner, agent) as asking,
        Socket(ID, world.owner, agent) as mute,
        Socket("mine", world.owner, agent) as elsewhere,
    ):
        # A snapshot and a refusal are for those who asked.
        await asking.sync()
        await elsewhere.sync()
        await elsewhere.to_end()
        assert CANARY in json.dumps(await asking.to_end())
        await asking.send({"type": f"{CANARY}-hello"})
        refused = await asking.frame()
        assert refused["id"].startswith("refused:")
        assert CANARY not in json.dumps(refused)
        # Events are for the sockets of the session that listen.
        await asking.say("r-1", "Hi")
        await asking.to_end()
        assert await mute.silent(0.1)
        assert await elsewhere.silent(0.1)
    async with Socket(ID, world.owner, agent, ping_interval=0.02) as tab:
        output = await tab.communicator.receive_output(20)
        assert json.loads(output["text"]) == {"type": "ping"}
    async with Socket(ID, None, agent) as tab:
        output = await tab.communicator.receive_output(20)
        assert output["type"] == "websocket.close"
        assert not output.get("reason")
