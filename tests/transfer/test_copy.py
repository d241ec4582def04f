"""manage.py copy_agent_sessions: histories from one backend to another."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from agents import Agent, Runner
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import async_to_sync
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from agent_sessions import DjangoSession, get_session, sessions
from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.remote.base import Stretch
from agent_sessions.exceptions import StoreUnavailable
from agent_sessions.items import Batch, Item, decode
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from agent_sessions.retention import Selection
from agent_sessions.runs.external import SessionHooks
from agent_sessions.transfer.copied_rows import Chosen
from agent_sessions.transfer.copy import Copier, find_sources
from tests.support.chat import make_user
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.django_db(transaction=True)]
one_database = pytest.mark.one_database


class OtherLists(ListBackend):
    """Lists of its own; it fails after so many appends."""

    histories: ClassVar[dict[tuple[Any, str], list[str]]] = {}
    appends_left: ClassVar[int] = 10_000

    async def store_append(self, key: SessionKey, batch: Batch) -> int:
        if not OtherLists.appends_left:
            raise StoreUnavailable("The store is down.")
        OtherLists.appends_left -= 1
        return await super().store_append(key, batch)


class InterruptedLists(OtherLists):
    """Presses Ctrl-C before the second append."""

    appends: ClassVar[int] = 2

    def append(self, key: SessionKey, items: Any) -> None:
        InterruptedLists.appends += 1
        if InterruptedLists.appends == 2:
            signal.raise_signal(signal.SIGINT)
        super().append(key, items)


class RewritingLists(OtherLists):
    """Gives each item an id of its own, as OpenAI does."""

    keeps_exactly = False

    async def store_latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        items = await super().store_latest(key, limit)
        return [{**item, "id": f"msg_{n}"} for n, item in enumerate(items)]

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Any:
        page = await super().store_page(key, wanted)
        for stored in page.items:
            assert stored.item is not None
            stored.item["id"] = f"msg_{stored.position}"
        return page


class WrittenTo(DatabaseBackend):
    """Somebody appends once the history was read for the third time, to compare it."""

    reads: ClassVar[int] = 0

    def page(self, key: SessionKey, **edges: Any) -> Page:
        page = super().page(key, **edges)
        WrittenTo.reads += 1
        if WrittenTo.reads == 3:
            self.append(key, [said(9)])
        return page


DATABASE = "agent_sessions.backends.database.DatabaseBackend"
SETTING = {
    "default": {"BACKEND": DATABASE},
    "second": {"BACKEND": DATABASE},
    "lists": {"BACKEND": ListBackend},
    "others": {"BACKEND": OtherLists},
    "interrupted": {"BACKEND": InterruptedLists},
    "rewriting": {"BACKEND": RewritingLists},
    "written": {"BACKEND": WrittenTo},
}


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    ListBackend.histories.clear()
    OtherLists.histories.clear()
    OtherLists.appends_left = 10_000
    with override_settings(AGENT_SESSIONS=SETTING):
        yield


def copy(*args: str, code: int = 0, **options: Any) -> str:
    """Call the command; give what it says."""
    out, err = io.StringIO(), io.StringIO()
    ended, last = 0, ""
    try:
        call_command("copy_agent_sessions", *args, stdout=out, stderr=err, **options)
    except CommandError as exc:
        ended, last = exc.returncode, str(exc)
    text = out.getvalue() + err.getvalue() + last
    assert ended == code, text
    return text


def told_by(copier: Copier) -> list[str]:
    """Return the list of what a copier tells."""
    told: list[str] = []
    copier.report.tell = told.append
    return told


def choose(session_id: str) -> Any:
    chosen = Selection(session_ids=(session_id,), backends=("default",))
    return find_sources(sessions["default"], chosen)


def said(number: int) -> Any:
    return {"role": "user", "content": f"Text {number} \x00 \ud800 é", "n": 1e22}


def fill(
    session_id: str, count: int, backend: str = "default", user: Any = None
) -> Any:
    session = get_session(session_id, user=user, backend=backend)
    session.sync.add_items([said(number) for number in range(count)])
    return session


def items_of(session_id: str, backend: str, user: Any = None) -> list[Any]:
    items: list[Any] = get_session(
        session_id, user=user, backend=backend
    ).sync.get_items()
    return items


def row_of(session_id: str, backend: str) -> AgentSession:
    return AgentSession.objects.get(session_id=session_id, backend=backend)


async def run_twice(user: Any) -> None:
    session = get_session("s-runs", user=user)
    model = ScriptedModel([[assistant_message("one")], [assistant_message("two")]])
    agent = Agent(name="speaker", model=model)
    for text in ("first", "second"):
        hooks = SessionHooks(session)
        async with hooks:
            await Runner.run(agent, text, session=session, hooks=hooks)


@pytest.mark.parametrize("way", ["lists", "second"])
def test_there_and_back_again_nothing_is_lost(way: str) -> None:
    """Owner, title, metadata, times, usage and runs, by turn as well."""
    alice = make_user()
    async_to_sync(run_twice)(alice)
    row = row_of("s-runs", "default")
    AgentSession.objects.filter(pk=row.pk).update(
        metadata={"topic": "x"},
        expires_at=timezone.now() + timedelta(days=9),
        input_tokens=7,
        created_at=timezone.now() - timedelta(days=3),
    )
    SessionItem.objects.update(created_at=timezone.now() - timedelta(days=2))
    row.refresh_from_db()
    history = items_of("s-runs", "default", alice)
    usage = DjangoSession("s-runs", user=alice).sync.get_turn_usage()
    times = list(
        SessionItem.objects.order_by("pk").values_list("created_at", flat=True)
    )
    runs = runs_of(row)
    assert [run["turn"] for run in runs] == [1, 2]

    text = copy("s-runs", "--from=default", f"--to={way}", "--move", "--noinput")
    assert "Copied 4 items: sessions new 1" in text
    assert "moved 1, refused 0." in text
    assert not AgentSession.objects.filter(backend="default").exists()
    assert items_of("s-runs", way, alice) == history
    assert runs_of(row_of("s-runs", way)) == runs

    copy("s-runs", f"--from={way}", "--to=default")
    back = row_of("s-runs", "default")
    assert items_of("s-runs", "default", alice) == history
    same = ("user_id", "title", "agent_name", "expires_at", "created_at", "item_count")
    for name in (*same, "input_tokens", "requests", "updated_at", "active_on"):
        assert getattr(back, name) == getattr(row, name), name
    assert back.metadata.items() >= row.metadata.items()
    assert runs_of(back) == runs
    assert DjangoSession("s-runs", user=alice).sync.get_turn_usage() == usage
    if way == "second":
        items = SessionItem.objects.filter(branch__session=back).order_by("pk")
        assert list(items.values_list("created_at", flat=True)) == times


def runs_of(row: AgentSession) -> list[dict[str, Any]]:
    columns = (
        "run_id",
        "status",
        "turn",
        "first_position",
        "last_position",
        "requests",
    )
    return list(AgentRun.objects.filter(session=row).order_by("pk").values(*columns))


@one_database
def test_the_second_time_there_is_nothing_to_do() -> None:
    fill("s-1", 3)
    fill("s-2", 2)
    assert "Copied 5 items: sessions new 2" in copy(
        "--from=default", "--to=lists", "--all"
    )
    before = list(AgentSession.objects.order_by("pk").values())
    assert "Copied 0 items: sessions new 0, grown 0, unchanged 2" in copy(
        "--from=default", "--to=lists", "--all"
    )
    assert list(AgentSession.objects.order_by("pk").values()) == before


@one_database
@pytest.mark.parametrize("way", ["lists", "second"])
def test_a_copied_session_takes_few_statements(
    way: str, django_assert_max_num_queries: Any
) -> None:
    for number in range(10):
        fill(f"s-{number}", 5)
    to = ("--all", "--from=default", f"--to={way}")
    with django_assert_max_num_queries(10 * 35):
        copy(*to)
    with django_assert_max_num_queries(10 * 6):
        copy(*to)


@one_database
def test_what_has_grown_is_grown() -> None:
    session = fill("s-1", 3)
    copy("s-1", "--from=default", "--to=lists")
    session.sync.add_items([said(9)])
    AgentSession.objects.filter(backend="default").update(requests=5)
    assert "grown 1" in copy("s-1", "--from=default", "--to=lists")
    assert items_of("s-1", "lists") == session.sync.get_items()
    row = row_of("s-1", "lists")
    assert (row.item_count, row.requests) == (4, 5)


@one_database
def test_an_interrupted_copy_goes_on() -> None:
    fill("s-1", 25)
    OtherLists.appends_left = 2
    text = copy("s-1", "--from=default", "--to=others", "--batch-size=10", code=3)
    assert "s-1: refused: The store is down." in text
    assert len(items_of("s-1", "others")) == 20
    OtherLists.appends_left = 10
    text = copy("s-1", "--from=default", "--to=others", "--batch-size=10")
    assert "Copied 5 items: sessions new 0, grown 1" in text
    assert items_of("s-1", "others") == items_of("s-1", "default")


@one_database
def test_a_store_that_fails_loses_nothing_of_a_move() -> None:
    fill("s-1", 25)
    OtherLists.appends_left = 2
    args = ("s-1", "--from=default", "--to=others", "--move", "--noinput")
    copy(*args, "--batch-size=10", code=3)
    row = row_of("s-1", "default")
    # The lease that kept runs away is given back.
    assert (row.state, row.run_id, row.item_count) == ("idle", "", 25)
    OtherLists.appends_left = 10
    assert "moved 1" in copy(*args)
    assert items_of("s-1", "default") == []
    assert len(items_of("s-1", "others")) == 25


@one_database
@pytest.mark.parametrize(
    "there",
    [[9], [0, 9, 2], [0, 1, 2, 3], [0]],
    ids=["other", "mid", "longer", "start"],
)
def test_another_history_is_never_overwritten(there: list[int]) -> None:
    fill("s-1", 3)
    other = get_session("s-1", backend="lists").sync
    other.add_items([said(number) for number in there])
    before = other.get_items()
    for _ in range(2):
        text = copy(
            "s-1", "--from=default", "--to=lists", "--move", "--noinput", code=3
        )
        assert "Nothing was overwritten" in text
    assert other.get_items() == before
    assert len(items_of("s-1", "default")) == 3


@one_database
def test_the_same_history_of_another_origin_is_left_alone() -> None:
    fill("s-1", 3)
    fill("s-1", 3, "lists")
    AgentSession.objects.filter(backend="lists").update(title="Its own")
    assert "unchanged 1" in copy("s-1", "--from=default", "--to=lists")
    assert row_of("s-1", "lists").title == "Its own"


@one_database
def test_a_session_of_somebody_else_is_left() -> None:
    alice, bob = make_user(), make_user()
    fill("s-1", 3, user=alice)
    fill("s-1", 1, "lists", user=bob)
    text = copy("s-1", "--from=default", "--to=lists", code=3)
    assert "belongs to somebody else" in text
    assert len(items_of("s-1", "lists", bob)) == 1


@one_database
def test_one_users_sessions_are_copied() -> None:
    alice = make_user()
    fill("s-1", 3, user=alice)
    fill("s-2", 3)
    copy("--from=default", "--to=lists", f"--user={alice.get_username()}")
    assert ListBackend.histories.keys() == {(alice.pk, "s-1")}
    assert items_of("s-1", "lists", alice) == items_of("s-1", "default", alice)


@one_database
def test_what_only_the_store_knows_is_copied_too() -> None:
    """A history that the SDK's own session wrote has no row yet."""
    for session_id in ("s-1", "s-2"):
        ListBackend.histories[None, session_id] = ['{"role":"user","content":"Hi"}']
    assert "new 1" in copy("s-1", "--from=lists", "--to=default")
    assert "new 1, grown 0, unchanged 1" in copy(
        "--all", "--from=lists", "--to=default"
    )
    assert [i["content"] for i in items_of("s-2", "default")] == ["Hi"]
    assert "nothing: refused: there is no such session" in copy(
        "nothing", "--from=lists", "--to=default", code=3
    )
    assert "moved 2" in copy(
        "--all", "--from=lists", "--to=default", "--move", "--noinput"
    )
    assert not any(ListBackend.histories.values())


@one_database
def test_a_store_that_writes_items_anew_is_compared_by_what_they_say() -> None:
    fill("s-1", 3)
    copy("s-1", "--from=default", "--to=rewriting")
    assert "unchanged 1" in copy("s-1", "--from=default", "--to=rewriting")
    OtherLists.histories[None, "s-1"][1] = '{"role":"user","content":"other"}'
    assert "another history" in copy("s-1", "--from=default", "--to=rewriting", code=3)


@one_database
def test_an_item_that_cannot_be_read_is_never_dropped_in_silence() -> None:
    fill("s-1", 3)
    SessionItem.objects.filter(position=2).update(data="{torn")
    text = copy("s-1", "--from=default", "--to=lists", "--move", "--noinput", code=3)
    assert "item 2 can't be read" in text
    assert SessionItem.objects.count() == 3


@one_database
def test_other_branches_are_named_and_never_lost() -> None:
    session = DjangoSession("s-1")
    session.sync.add_items([said(1), {"role": "assistant", "content": "a"}, said(2)])
    session.sync.create_branch_from_turn(2, "other")
    session.sync.add_items([said(3)])
    text = copy("s-1", "--from=default", "--to=lists", "--move", "--noinput", code=3)
    assert "other branches" in text
    assert "only its current branch" in copy("s-1", "--from=default", "--to=lists")
    assert items_of("s-1", "lists") == session.sync.get_items()


@one_database
def test_a_session_with_a_run_is_left() -> None:
    fill("s-1", 3)
    AgentSession.objects.update(
        run_id="r-1", run_seen_at=timezone.now(), state="running"
    )
    assert "run r-1 is active" in copy("s-1", "--from=default", "--to=lists", code=3)


@one_database
def test_what_is_written_while_it_moves_is_not_lost() -> None:
    session = fill("s-1", 3)
    more = [said(7), said(8)]

    def write_more(count: int) -> None:
        if more:
            session.sync.add_items([more.pop()])

    copier = Copier(sessions["default"], sessions["lists"], move=True)
    copier.progress = write_more
    report = copier.run(choose("s-1"))
    assert (report.moved, report.refused) == (1, 0)
    assert len(items_of("s-1", "lists")) == 5
    assert items_of("s-1", "default") == []


def test_what_is_appended_after_the_last_look_is_not_lost() -> None:
    fill("s-1", 3, "written")
    WrittenTo.reads = 0
    args = ("s-1", "--from=written", "--to=lists", "--move", "--noinput")
    assert "it was written to while it was copied; it stays here." in copy(
        *args, code=3
    )
    assert items_of("s-1", "written") == [said(n) for n in (0, 1, 2, 9)]
    row = row_of("s-1", "written")
    assert (row.state, row.run_id) == ("idle", "")
    assert "moved 1" in copy(*args)
    assert items_of("s-1", "lists") == [said(n) for n in (0, 1, 2, 9)]


@one_database
def test_a_move_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fill("s-1", 3)
    args = ("s-1", "--from=default", "--to=lists", "--move", "--noinput")
    # Nothing is released by a process that is killed, and it doesn't live any more.
    with monkeypatch.context() as killed:
        killed.setattr(Copier, "_remove", lambda *args: 1 / 0)
        killed.setattr(Copier, "_release", lambda *args: None)
        with pytest.raises(ZeroDivisionError):
            copy(*args)
    assert "is active" in copy(*args, code=3)
    row = AgentSession.objects.filter(backend="default")
    row.update(run_owner=f"{row.get().run_owner}-another")
    assert "moved 1" in copy(*args)
    assert items_of("s-1", "lists") == [said(n) for n in range(3)]


@one_database
def test_what_never_stops_growing_stays() -> None:
    session = fill("s-1", 3)
    copier = Copier(sessions["default"], sessions["lists"], move=True)
    copier.progress = lambda count: session.sync.add_items([said(7)])
    told = told_by(copier)
    report = copier.run(choose("s-1"))
    assert report.moved == 0
    assert "s-1: refused: it grows while it is copied" in told[0]
    assert len(items_of("s-1", "default")) == 8


@one_database
def test_a_move_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fill("s-1", 1)
    monkeypatch.setattr("builtins.input", lambda text: "no")
    assert "nothing was written" in copy(
        "s-1", "--from=default", "--to=lists", "--move", code=1
    )
    assert not ListBackend.histories
    monkeypatch.setattr("builtins.input", lambda text: "yes")
    assert "moved 1" in copy("s-1", "--from=default", "--to=lists", "--move")


@one_database
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--from=default", "--to=lists"), "Name sessions"),
        (("--all", "--from=default", "--to=default"), "the same backend"),
        (("--all", "--from=default", "--to=list"), "Did you mean 'lists'"),
        (("--from=default", "--to=lists", "--user=nobody"), "no user 'nobody'"),
    ],
)
def test_wrong_options_are_refused(args: tuple[str, ...], words: str) -> None:
    assert words in copy(*args, code=1)


@one_database
def test_progress_is_shown() -> None:
    fill("s-1", 30)
    text = copy("s-1", "--from=default", "--to=lists", progress=True)
    assert "100% 30/30 items" in text


@one_database
def test_ctrl_c_says_in_one_line_how_to_go_on() -> None:
    fill("s-1", 3)
    fill("s-2", 3)
    InterruptedLists.appends = 0
    text = copy("--all", "--from=default", "--to=interrupted", code=130)
    assert text == (
        "Stopped. Copied so far: 1 session. Run the same command again to go on."
    )
    copy("--all", "--from=default", "--to=interrupted")
    assert items_of("s-2", "interrupted") == items_of("s-2", "default")


@one_database
def test_an_empty_session_is_copied_with_what_its_row_says() -> None:
    alice = make_user()
    AgentSession.objects.create(session_id="s-1", user=alice, metadata={"a": 1})
    assert "sessions new 1" in copy("s-1", "--from=default", "--to=lists")
    row = row_of("s-1", "lists")
    assert (row.user_id, row.metadata["a"]) == (alice.pk, 1)


@one_database
def test_long_items_are_copied_in_small_batches() -> None:
    session = get_session("s-long")
    long: Any = [{"role": "user", "content": "x" * 1_500_000}] * 5
    session.sync.add_items(long)
    copy("s-long", "--from=default", "--to=others")
    assert OtherLists.appends_left == 10_000 - 3
    assert decode(OtherLists.histories[None, "s-long"][4]) == long[4]


@one_database
def test_an_encrypted_history_is_copied_and_says_the_same() -> None:
    private = {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "others", "keys": ["k" * 32]},
    }
    alice = make_user()
    with override_settings(AGENT_SESSIONS={**SETTING, "private": private}):
        session = fill("s-1", 5, user=alice)
        copy("s-1", "--from=default", "--to=private")
        assert items_of("s-1", "private", alice) == session.sync.get_items()
        assert row_of("s-1", "private").title == ""
        assert not [t for t in OtherLists.histories[alice.pk, "s-1"] if "Text" in t]
        # What would be in clear from then on has to be asked for.
        said = copy("s-1", "--from=private", "--to=lists", code=1)
        assert "would be stored in clear. Add --in-clear" in said
        assert (alice.pk, "s-1") not in ListBackend.histories
        copy("s-1", "--from=private", "--to=lists", "--in-clear")
        assert items_of("s-1", "lists", alice) == session.sync.get_items()
        assert "unchanged 1" in copy("s-1", "--from=default", "--to=private")


def take_over(session_id: str, **columns: Any) -> Any:
    """Make a progress function that changes the source's row in the middle."""

    def change(count: int) -> None:
        AgentSession.objects.filter(backend="default", session_id=session_id).update(
            **columns
        )

    return change


@one_database
def test_a_run_that_takes_the_session_over_keeps_it() -> None:
    fill("s-1", 3)
    copier = Copier(sessions["default"], sessions["lists"], move=True)
    copier.progress = take_over("s-1", run_id="r-1")
    told = told_by(copier)
    copier.run(choose("s-1"))
    assert "somebody else took it" in told[0]
    assert len(items_of("s-1", "default")) == 3
    # Its lease is not ours to give back.
    assert row_of("s-1", "default").run_id == "r-1"


@one_database
def test_a_run_that_never_ended_holds_the_session() -> None:
    fill("s-1", 3)
    AgentSession.objects.update(run_id="r-1", state="running")
    text = copy("s-1", "--from=default", "--to=lists", "--move", "--noinput", code=3)
    assert "a run holds it" in text
    assert not ListBackend.histories


@one_database
def test_a_session_deleted_meanwhile_is_reported() -> None:
    fill("s-1", 3)
    (chosen,) = choose("s-1")
    AgentSession.objects.all().delete()
    copier = Copier(sessions["default"], sessions["lists"])
    told = told_by(copier)
    copier.run([chosen])
    assert "deleted meanwhile" in told[0]


@one_database
def test_a_session_deleted_while_others_are_copied_leaves_nothing() -> None:
    """What its row says was read together with theirs."""
    for session_id in ("s-1", "s-2"):
        fill(session_id, 3)
    mine = AgentSession.objects.filter(backend="default", session_id="s-2")
    copier = Copier(sessions["default"], sessions["lists"])

    def delete(count: int) -> None:
        mine.delete()

    copier.progress = delete
    told = told_by(copier)
    rows = AgentSession.objects.filter(backend="default").order_by("session_id")
    keyed = [Chosen(SessionKey(row.session_id), row) for row in rows]
    assert copier.run(keyed).made == 1
    assert "s-2: refused: it has been deleted meanwhile" in told[0]
    assert not AgentSession.objects.filter(session_id="s-2").exists()
