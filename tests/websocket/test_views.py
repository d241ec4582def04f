"""The JSON beside the websocket: own sessions only, by cursor."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.db import connection
from django.test import AsyncClient, Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from hypothesis import given
from hypothesis import strategies as st

from agent_sessions import DjangoSession, get_session
from agent_sessions.backends.leases import DatabaseNow
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.ratelimit import RateLimit
from agent_sessions.runs.setup import create_conversation
from agent_sessions.views import (
    LARGEST,
    SessionAPIView,
    SessionListView,
    SessionMessagesView,
    SessionView,
    read_moment,
    read_number,
    write_moment,
)
from tests.encryption.test_encryption import NEW, OLD
from tests.servers.process import HOST, free_port
from tests.support.chat import make_user, refusal_of
from tests.support.ratelimits import Clocked, early_in_the_minute

pytestmark = pytest.mark.django_db


METHODS = ("get", "post", "put", "patch", "delete", "head", "options", "trace")
PATHS = ("sessions/", "sessions/9f1c/", "sessions/9f1c/messages/")


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    cache.clear()


@pytest.fixture
def user() -> Any:
    return make_user()


@pytest.fixture
def browser(user: Any) -> Client:
    client = Client()
    client.force_login(user)
    return client


def read(response: Any) -> Any:
    assert response["Content-Type"] == "application/json"
    return json.loads(response.content)


def test_a_new_conversation_gets_an_id_that_cannot_be_guessed(
    browser: Client, user: Any
) -> None:
    response = browser.post("/agents/sessions/")
    assert response.status_code == 201
    session_id = read(response)["id"]
    assert len(session_id) == 36
    assert AgentSession.objects.for_user(user).get().session_id == session_id


def test_a_forged_post_makes_nothing(user: Any) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    assert client.post("/agents/sessions/").status_code == 403
    assert not AgentSession.objects.exists()


def test_own_conversations_are_listed_newest_first(browser: Client, user: Any) -> None:
    first, second = create_conversation(user), create_conversation(user)
    create_conversation(make_user())
    DjangoSession(first.session_id, user=user).sync.add_items(
        [{"role": "user", "content": "My title\nand more"}]
    )
    listed = read(browser.get("/agents/sessions/"))
    assert listed["next"] is None
    assert [entry["id"] for entry in listed["sessions"]] == [
        first.session_id,
        second.session_id,
    ]
    entry = listed["sessions"][0]
    assert (entry["title"], entry["state"]) == ("My title", "idle")
    assert entry["updatedAt"].startswith("20")


def test_the_list_goes_on_at_its_cursor(
    browser: Client, user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SessionListView, "page_size", 2)
    wanted = [create_conversation(user).session_id for _ in range(5)][::-1]
    found: list[str] = []
    query: dict[str, str] = {}
    while True:
        page = read(browser.get("/agents/sessions/", query))
        found += [entry["id"] for entry in page["sessions"]]
        if page["next"] is None:
            break
        query = {"after": page["next"]}
    assert found == wanted
    assert browser.get("/agents/sessions/", {"after": "x"}).status_code == 400


@pytest.mark.django_db(transaction=True)
def test_a_long_session_is_deleted_in_steps(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    session = DjangoSession(row.session_id, user=user)
    session.sync.add_items([{"role": "user", "content": "Hi"}] * 1_200)
    AgentRun.objects.bulk_create(
        AgentRun(session=row, run_id=f"run {number}") for number in range(1_200)
    )
    with CaptureQueriesContext(connection) as queries:
        assert browser.delete(f"/agents/sessions/{row.session_id}/").status_code == 204
    for model in (AgentSession, Branch, SessionItem, AgentRun):
        assert not model._base_manager.exists()
    # No statement names more rows than a step has.
    assert max(query["sql"].count(", ") for query in queries) < 600


def test_messages_are_read_page_by_page(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    DjangoSession(row.session_id, user=user).sync.add_items(
        [{"role": "user", "content": f"m{number}"} for number in range(150)]
    )
    url = f"/agents/sessions/{row.session_id}/messages/"
    newest = read(browser.get(url))
    assert [m["content"] for m in newest["messages"][:1]] == ["m50"]
    earlier = read(browser.get(url, {"before": newest["before"]}))
    assert [m["content"] for m in earlier["messages"]] == [f"m{n}" for n in range(50)]
    assert earlier["before"] is None
    assert browser.get(url, {"before": "-1"}).status_code == 400


def run(row: AgentSession, *, seen_at: Any) -> None:
    """Store a run of another host that holds a session, last seen at a time."""
    AgentSession.objects.filter(pk=row.pk).update(
        state="running",
        run_id="r",
        run_owner="elsewhere:1:x",
        run_seen_at=seen_at,
    )


def test_deleting_takes_the_whole_conversation(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    url = f"/agents/sessions/{row.session_id}/"
    run(row, seen_at=DatabaseNow())
    assert browser.delete(url).status_code == 409
    # Its process was killed, and nobody has come back since.
    run(row, seen_at=DatabaseNow() - timedelta(minutes=2))
    assert browser.delete(url).status_code == 204
    assert not AgentSession.objects.exists()
    assert browser.delete(url).status_code == 404


@pytest.mark.parametrize("session_id", ["theirs", "unknown", "x" * 300])
def test_what_is_not_yours_does_not_exist(browser: Client, session_id: str) -> None:
    if session_id == "theirs":
        session_id = create_conversation(make_user()).session_id
    for method, path in (("get", "messages/"), ("delete", "")):
        answer = getattr(browser, method)(f"/agents/sessions/{session_id}/{path}")
        assert (answer.status_code, read(answer)) == (404, refusal_of("not_found"))


def test_nobody_without_a_login_and_nothing_kept_by_caches(browser: Client) -> None:
    assert Client().get("/agents/sessions/").status_code == 401
    assert Client().post("/agents/sessions/").status_code == 401
    response = browser.get("/agents/sessions/")
    assert response["Cache-Control"] == "private, no-store"


# -- nobody is there -------------------------------------------------------------------


def assert_nobody(response: Any, method: str) -> None:
    assert response.status_code == 401
    assert response["Cache-Control"] == "private, no-store"
    assert response["Content-Type"] == "application/json"
    if method != "head":
        assert read(response) == refusal_of("not_logged_in")


@pytest.fixture
def login_required(settings: Any) -> None:
    name = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, name]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("login_required")
@pytest.mark.one_database
def test_a_middleware_that_requires_a_login_leaves_the_answer_to_the_views(
    path: str, method: str
) -> None:
    response = getattr(Client(), method)(f"/agents/{path}")
    assert_nobody(response, method)
    # Everything else is the middleware's.
    assert Client().get("/admin/").status_code == 302


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("login_required")
@pytest.mark.one_database
async def test_under_asgi_the_answers_are_the_same(path: str) -> None:
    for method in METHODS:
        response = await getattr(AsyncClient(), method)(f"/agents/{path}")
        assert_nobody(response, method)
    client = AsyncClient()
    await client.aforce_login(await sync_to_async(make_user)())
    response = await client.get(f"/agents/{path}")
    expected = {PATHS[0]: 200, PATHS[1]: 405, PATHS[2]: 404}
    assert response.status_code == expected[path]


@pytest.mark.usefixtures("login_required")
@pytest.mark.one_database
def test_a_view_with_a_dispatch_of_its_own_answers_too(user: Any) -> None:
    class Own(SessionListView):
        def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            return super().dispatch(request, *args, **kwargs)

    assert getattr(Own.as_view(), "login_required", True) is False


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.one_database
def test_an_inactive_user_is_nobody(
    settings: Any, browser: Client, user: Any, path: str
) -> None:
    settings.AUTHENTICATION_BACKENDS = [
        "django.contrib.auth.backends.AllowAllUsersModelBackend"
    ]
    browser.force_login(user)
    assert browser.get("/agents/sessions/").status_code == 200
    type(user).objects.filter(pk=user.pk).update(is_active=False)
    for method in ("get", "post", "delete"):
        assert_nobody(getattr(browser, method)(f"/agents/{path}"), method)
    assert not AgentSession.objects.exists()


# -- what else is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (PATHS[0], {"GET", "HEAD", "POST"}),
        (PATHS[1], {"DELETE"}),
        (PATHS[2], {"GET", "HEAD"}),
    ],
)
@pytest.mark.one_database
def test_a_method_that_is_not_there_is_refused_as_json(
    browser: Client, path: str, allowed: set[str]
) -> None:
    for method in METHODS:
        if method == "options" or method.upper() in allowed:
            continue
        response = getattr(browser, method)(f"/agents/{path}")
        assert response.status_code == 405
        assert set(response["Allow"].split(", ")) == allowed | {"OPTIONS"}
        assert response["Cache-Control"] == "private, no-store"
        assert response["Content-Type"] == "application/json"
        if method != "head":
            assert read(response) == refusal_of("method_not_allowed")


@pytest.mark.one_database
def test_a_query_string_of_too_many_fields_is_refused_as_json(browser: Client) -> None:
    answer = browser.get("/agents/sessions/?" + "&".join(["a=1"] * 1_001))
    assert (answer.status_code, read(answer)) == (400, refusal_of("bad_request"))
    assert answer["Cache-Control"] == "private, no-store"


def test_no_answer_is_kept_by_caches(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    one = f"/agents/sessions/{row.session_id}/"
    run(row, seen_at=DatabaseNow())
    answers = [
        browser.options("/agents/sessions/"),
        browser.post("/agents/sessions/"),
        browser.get("/agents/sessions/", {"after": "x"}),
        browser.get(f"{one}messages/", {"before": "x"}),
        browser.delete(one),
        browser.get("/agents/sessions/unknown/messages/"),
    ]
    AgentSession.objects.filter(pk=row.pk).update(state="idle", run_id="")
    answers.append(browser.delete(one))
    assert [a.status_code for a in answers] == [200, 201, 400, 400, 409, 404, 204]
    assert {a["Cache-Control"] for a in answers} == {"private, no-store"}


def ask(view: type[SessionAPIView], user: Any, session_id: str, **options: Any) -> Any:
    method = "delete" if view is SessionView else "get"
    request = getattr(RequestFactory(), method)("/")
    request.user = user
    return view.as_view(**options)(request, session_id=session_id)


@pytest.mark.parametrize("view", [SessionMessagesView, SessionView])
@pytest.mark.django_db(transaction=True)
@pytest.mark.one_database
def test_a_store_that_is_down_is_told_as_json(
    settings: Any, user: Any, view: type[SessionAPIView]
) -> None:
    settings.AGENT_SESSIONS = {
        "redis": {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            "OPTIONS": {"url": f"redis://{HOST}:{free_port()}"},
        }
    }
    row = create_conversation(user, backend="redis")
    response = ask(view, user, row.session_id, backend="redis")
    assert response.status_code == 503
    assert response["Cache-Control"] == "private, no-store"
    assert read(response) == refusal_of("unavailable")
    assert AgentSession.objects.filter(pk=row.pk).exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.one_database
def test_messages_behind_an_unknown_key_are_no_empty_list(
    settings: Any, user: Any
) -> None:
    def with_key(key: str) -> None:
        settings.AGENT_SESSIONS = {
            "default": {"BACKEND": "agent_sessions.backends.database.DatabaseBackend"},
            "private": {
                "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
                "OPTIONS": {"backend": "default", "keys": [key]},
            },
        }

    with_key(OLD)
    session = get_session("s", user=user, backend="private")
    session.sync.add_items([{"role": "user", "content": "Hidden"}])
    answer = ask(SessionMessagesView, user, "s", backend="private")
    assert [m["content"] for m in read(answer)["messages"]] == ["Hidden"]
    with_key(NEW)
    answer = ask(SessionMessagesView, user, "s", backend="private")
    assert (answer.status_code, read(answer)) == (503, refusal_of("unreadable"))


# -- bounds ----------------------------------------------------------------------------


def test_a_user_makes_so_many_sessions_a_minute(browser: Client, user: Any) -> None:
    early_in_the_minute(10)
    answers = [browser.post("/agents/sessions/") for _ in range(40)]
    assert [a.status_code for a in answers] == [201] * 20 + [429] * 20
    assert AgentSession.objects.for_user(user).count() == 20
    assert read(answers[-1]) == refusal_of("rate_limited")
    assert answers[-1]["Cache-Control"] == "private, no-store"
    assert 1 <= int(answers[-1]["Retry-After"]) <= 60
    other = Client()
    other.force_login(make_user())
    assert other.post("/agents/sessions/").status_code == 201
    # Reading goes on.
    assert browser.get("/agents/sessions/").status_code == 200


@pytest.mark.one_database
def test_the_rate_may_be_another(user: Any) -> None:
    class Slow(SessionListView):
        def get_rate_limit(self) -> RateLimit:
            return Clocked("slow", 1)

    def post(view: Any) -> int:
        request = RequestFactory().post("/")
        request.user = user
        status: int = view(request).status_code
        return status

    slow = Slow.as_view()
    assert [post(slow), post(slow)] == [201, 429]
    none = SessionListView.as_view(max_sessions_per_minute=0)
    assert post(none) == 429


def scroll_back(browser: Client, url: str) -> Iterator[tuple[int, list[str]]]:
    """Read a conversation from its end: the size and the contents of each answer."""
    query: dict[str, str] = {}
    while True:
        answer = browser.get(url, query)
        page = read(answer)
        yield len(answer.content), [m["content"] for m in page["messages"]]
        if page["before"] is None:
            return
        query = {"before": page["before"]}


def test_one_answer_holds_so_many_bytes(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    # The last one is longer than an answer may be: it comes alone.
    sizes = [30_000] * 90 + [10] * 60 + [2**20]
    DjangoSession(row.session_id, user=user).sync.add_items(
        [
            {"role": "assistant", "type": "message", "content": f"{n}" + "x" * size}
            for n, size in enumerate(sizes)
        ]
    )
    pages = list(scroll_back(browser, f"/agents/sessions/{row.session_id}/messages/"))
    assert len(pages[0][1]) == 1
    assert all(size <= SessionMessagesView.max_bytes for size, _ in pages[1:])
    assert len(pages) < 12
    texts = itertools.chain.from_iterable(texts for _, texts in reversed(pages))
    assert [len(text.lstrip("0123456789")) for text in texts] == sizes


# -- cursors and ids from outside ------------------------------------------------------

NUMBERS = [
    "-1",
    "+1",
    " 1",
    "1_0",
    "1.0",
    "1e3",
    "0x1",
    "²",
    "٣",
    "\x00",
    "1\x00",
    "\u202e1",
    "nan",
    str(LARGEST + 1),
    str(2**64),
    "9" * 5_000,
]
MOMENTS = [
    "x",
    "~",
    "2026-01-01",
    "2026-01-01~1",
    "2026-01-01T00:00:00~1",
    "2026-01-01T00:00:00Z~1",
    "2026-W01-1~1",
    "0001-01-01T00:00:00+23:59~1",
    "9999-12-31T23:59:59-23:59~1",
    "0001-01-01T00:00:00+00:00~1",
    "9999-12-31T23:59:59+00:00~1",
    "2026-01-01T00:00:00+00:00",
    "2026-01-01T00:00:00+00:00~",
    "2026-01-01T00:00:00+05:00~1",
    "2026-01-01T00:00:00+00:00~1~1",
    "2026-13-01T00:00:00+00:00~1",
    "\x00~1",
    *(f"2026-01-01T00:00:00+00:00~{number}" for number in NUMBERS),
]


@pytest.mark.parametrize("before", ["", *NUMBERS])
def test_a_cursor_of_messages_that_is_none_is_refused(
    browser: Client, user: Any, before: str
) -> None:
    row = create_conversation(user)
    url = f"/agents/sessions/{row.session_id}/messages/"
    answer = browser.get(url, {"before": before})
    assert (answer.status_code, read(answer)) == (400, refusal_of("bad_cursor"))


@pytest.mark.parametrize("after", MOMENTS)
def test_a_cursor_of_sessions_that_is_none_is_refused(
    browser: Client, user: Any, after: str
) -> None:
    create_conversation(user)
    answer = browser.get("/agents/sessions/", {"after": after})
    assert (answer.status_code, read(answer)) == (400, refusal_of("bad_cursor"))


def test_cursors_at_the_edges_are_taken(browser: Client, user: Any) -> None:
    row = create_conversation(user)
    DjangoSession(row.session_id, user=user).sync.add_items(
        [{"role": "user", "content": "Hi"}]
    )
    url = f"/agents/sessions/{row.session_id}/messages/"
    for before, count in (("0", 0), ("1", 0), ("2", 1), (str(LARGEST), 1)):
        answer = browser.get(url, {"before": before})
        assert len(read(answer)["messages"]) == count
    for year, count in ((1000, 0), (9998, 1)):
        for pk in (0, LARGEST):
            cursor = write_moment(datetime(year, 1, 1, tzinfo=UTC), pk)
            answer = browser.get("/agents/sessions/", {"after": cursor})
            assert len(read(answer)["sessions"]) == count


@given(st.text() | st.from_regex(r"[0-9]{1,25}", fullmatch=True))
def test_any_text_is_a_number_or_none(text: str) -> None:
    number = read_number(text)
    assert number is None or 0 <= number <= LARGEST
    assert read_moment(text) is None


@given(st.datetimes(datetime(1000, 1, 1), datetime(9998, 12, 31)), st.integers(0))  # noqa: DTZ001 - hypothesis wants naive ones
def test_a_cursor_reads_as_it_was_written(when: datetime, pk: int) -> None:
    when = when.replace(tzinfo=UTC)
    wanted = (when, pk) if pk <= LARGEST else None
    assert read_moment(write_moment(when, pk)) == wanted


def test_without_time_zones_cursors_have_none(settings: Any) -> None:
    settings.USE_TZ = False
    naive = datetime(2026, 1, 1)  # noqa: DTZ001 - as rows are then
    assert read_moment(write_moment(naive, 1)) == (naive, 1)
    assert read_moment("2026-01-01T00:00:00+00:00~1") is None


@pytest.mark.parametrize(
    "session_id",
    [
        "%00",
        "a%00b",
        "x" * 256,
        "x" * 5_000,
        "%e2%80%ae",
        "%ed%a0%80",
        "%ff",
        "%f0%9f%98%80" * 255,
        "a%0ab",
        "%2e%2e",
        "%252F",
        "9" * 5_000,
        "a%2Fb",
    ],
)
def test_any_id_in_an_address_is_answered(browser: Client, session_id: str) -> None:
    for method, path in (("get", "messages/"), ("delete", "")):
        answer = getattr(browser, method)(f"/agents/sessions/{session_id}/{path}")
        assert answer.status_code == 404


@pytest.mark.parametrize("session_id", ["", "\x00", "\ud800", "x" * 256, "a/b"])
def test_any_id_that_a_route_gives_is_answered(user: Any, session_id: str) -> None:
    for view in (SessionMessagesView, SessionView):
        answer = ask(view, user, session_id)
        assert (answer.status_code, read(answer)) == (404, refusal_of("not_found"))
