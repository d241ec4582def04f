"""manage.py erase_agent_user: everything of a person, with a receipt.

What agenticos #1421, LibreChat #6733, vercel/eve #2261 and genassist PR #728 ask for: one
command across all backends.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth import get_user_model
from django.contrib.contenttypes.models import ContentType
from django.core.management import CommandError, call_command
from django.db import transaction
from django.db.models import CharField, Q, TextField
from django.test import override_settings
from django.utils import timezone

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    Branch,
    KeyUse,
    PendingClear,
    RunEvents,
    SessionItem,
    SessionSecret,
)
from agent_sessions.retention import unfinished_items
from agent_sessions.retention.erasure import owner_filter
from agent_sessions.signals import session_cleared
from tests.backends.remote.test_pending import FailingBackend
from tests.encryption.test_encryption import NEW

pytestmark = pytest.mark.django_db(transaction=True)


class OddBackend(FailingBackend):
    """A store of somebody else's, with errors of its own."""

    async def store_clear(self, key: SessionKey) -> int:
        raise LookupError("Nobody may read this: secret")


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    FailingBackend.down = False
    FailingBackend.histories.clear()
    setting: dict[str, Any] = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "lists": {"BACKEND": FailingBackend},
        "odd": {"BACKEND": OddBackend},
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield
    FailingBackend.histories.clear()


@pytest.fixture
def alice() -> Any:
    return get_user_model()._default_manager.create_user("alice")


def make(session_id: str, user: Any, backend: str = "default", items: int = 2) -> Any:
    key = SessionKey(session_id, user.pk)
    batch = [{"role": "user", "content": f"message {n}"} for n in range(items)]
    sessions[backend].append(key, batch)
    return AgentSession.objects.get(backend=backend, session_id=session_id)


def run(*args: str, code: int = 0, **options: Any) -> tuple[Any, str]:
    """Run the command; give the receipt and what it said."""
    out, err = io.StringIO(), io.StringIO()
    given = {"stdout": out, "stderr": err, **options}
    if not code:
        call_command("erase_agent_user", *args, **given)
    else:
        with pytest.raises(CommandError) as caught:
            call_command("erase_agent_user", *args, **given)
        assert caught.value.returncode == code
        err.write(str(caught.value))
    return json.loads(out.getvalue() or "null"), err.getvalue()


def test_an_answer_that_is_no_text_is_no_consent(
    alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("one", alice)
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    receipt, err = run("alice", code=2)
    assert receipt is None
    assert "nothing was erased" in err
    assert AgentSession.objects.exists()


def test_everything_of_the_person_goes_and_the_receipt_says_so(alice: Any) -> None:
    bob = get_user_model()._default_manager.create_user("bob")
    make("one", alice, items=3)
    make("two", alice, backend="lists")
    row = make("waits", alice)
    AgentSession.objects.filter(pk=row.pk).update(state="waiting")
    AgentRun.objects.create(session=row, run_id="r", status="waiting", state="{}")
    make("his", bob)
    receipt, err = run("alice", "--noinput")
    assert err == "Erased 3 sessions with 7 items.\n"
    assert receipt.pop("started_at") <= receipt.pop("finished_at")
    assert receipt == {
        "format": "agent-sessions/erasure-1",
        "user": "alice",
        "user_pk": str(alice.pk),
        "log_entries": 0,
        "keys": 0,
        "complete": True,
        "sessions": 3,
        "items": 7,
        "erased": [
            {"backend": "default", "session_id": "one", "items": 3},
            {"backend": "lists", "session_id": "two", "items": 2},
            {"backend": "default", "session_id": "waits", "items": 2},
        ],
        "left": [],
    }
    assert AgentSession.objects.get().session_id == "his"
    assert not FailingBackend.histories
    assert not AgentRun.objects.exists()
    # The person may go on; only what was said is erased.
    assert get_user_model()._default_manager.filter(pk=alice.pk).exists()


@pytest.mark.one_database
def test_a_second_time_nothing_is_left_to_do(alice: Any) -> None:
    make("one", alice)
    run("alice", "--noinput")
    receipt, err = run("alice", "--noinput")
    assert (receipt["erased"], receipt["left"], receipt["complete"]) == ([], [], True)
    assert err == "Erased 0 sessions with 0 items.\n"


@pytest.mark.one_database
def test_long_histories_go_whole(alice: Any) -> None:
    make("long", alice, items=30)
    run("alice", "--noinput", "--batch-size", "7")
    assert not SessionItem.objects.exists()
    assert unfinished_items() == 0


def test_what_can_t_be_erased_is_told_and_gone_on_with(alice: Any) -> None:
    make("one", alice)
    make("strange", alice, backend="odd")
    busy = make("busy", alice)
    AgentSession.objects.filter(pk=busy.pk).update(
        run_id="r", run_seen_at=timezone.now()
    )
    AgentSession.objects.create(backend="gone", session_id="lost", user=alice)
    receipt, err = run("alice", "--noinput", code=1)
    assert err.endswith(
        "3 sessions are left; the receipt says why. Run the command again to go on."
    )
    assert not receipt["complete"]
    left = {each["session_id"]: each for each in receipt["left"]}
    assert left["busy"]["code"] == "run_active"
    assert left["busy"]["reason"] == "Left, because run r is active."
    assert left["strange"]["code"] == "store_failed"
    assert left["strange"]["reason"] == "The store raised LookupError."
    assert "no alias 'gone'" in left["lost"]["reason"]
    AgentSession.objects.filter(pk=busy.pk).update(run_id="")
    receipt, _ = run("alice", "--noinput", code=1)
    assert {each["session_id"] for each in receipt["left"]} == {"strange", "lost"}
    assert "busy" in {each["session_id"] for each in receipt["erased"]}


@pytest.mark.one_database
def test_what_a_deleted_session_left_is_the_persons_too(alice: Any) -> None:
    make("away", alice, backend="lists")
    FailingBackend.down = True
    with transaction.atomic():
        AgentSession.objects.get().delete()
    assert PendingClear.objects.exists()
    receipt, _ = run("alice", "--noinput", code=1)
    (left,) = receipt["left"]
    assert (left["session_id"], left["code"]) == ("away", "pending")
    assert left["reason"].endswith("couldn't be reached (StoreUnavailable).")
    FailingBackend.down = False
    receipt, _ = run("alice", "--noinput")
    assert [each["session_id"] for each in receipt["erased"]] == ["away"]
    assert not PendingClear.objects.exists()


@pytest.mark.one_database
class TestAsking:
    def test_it_asks_and_keeps_the_receipt_apart(
        self, alice: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("one", alice)
        monkeypatch.setattr("builtins.input", lambda: "yes")
        receipt, err = run("alice")
        assert receipt["complete"]
        assert err.startswith(
            "Erase 1 session of alice with 2 items? This can't be undone. [y/N] "
        )

    def test_anything_else_stops(
        self, alice: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("one", alice)
        monkeypatch.setattr("builtins.input", lambda: "n")
        receipt, err = run("alice", code=2)
        assert receipt is None
        assert err.endswith("Cancelled; nothing was erased.")
        assert AgentSession.objects.exists()

    def test_nobody_there_stops(
        self, alice: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def nobody() -> str:
            raise EOFError

        make("one", alice)
        monkeypatch.setattr("builtins.input", nobody)
        assert "Use --noinput" in run("alice", code=2)[1]
        assert AgentSession.objects.exists()

    def test_nobody_of_that_name(self) -> None:
        _, err = run("nobody", "--noinput", code=2)
        assert err == "There is no user 'nobody'."


@pytest.mark.one_database
class TestReceipt:
    def test_it_goes_into_a_new_file_that_nobody_else_reads(
        self, alice: Any, tmp_path: Path
    ) -> None:
        make("one", alice)
        path = tmp_path / "receipt.json"
        none, err = run("alice", "--noinput", "--receipt", str(path), verbosity=0)
        assert (none, err) == (None, "")
        assert json.loads(path.read_text())["sessions"] == 1
        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("name", ["there.json", "no/such/folder.json"])
    def test_nothing_is_erased_where_it_can_t_be_written(
        self, alice: Any, tmp_path: Path, name: str
    ) -> None:
        make("one", alice)
        (tmp_path / "there.json").touch()
        run("alice", "--noinput", "--receipt", str(tmp_path / name), code=2)
        assert AgentSession.objects.exists()

    def test_of_what_broke_off_there_is_one_too(
        self, alice: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make("one", alice)
        make("two", alice, backend="odd")

        def interrupt(self: Any, key: Any) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(OddBackend, "clear", interrupt)
        out = io.StringIO()
        with pytest.raises(CommandError, match="Erased 1 session with 2") as caught:
            call_command("erase_agent_user", "alice", "--noinput", stdout=out)
        assert caught.value.returncode == 130
        receipt = json.loads(out.getvalue())
        assert [each["session_id"] for each in receipt["erased"]] == ["one"]
        assert (receipt["complete"], receipt["finished_at"]) == (False, "")


# -- whatever names the person ---------------------------------------------------------


@pytest.fixture
def private(_stores: None) -> Iterator[None]:
    configured: Any = settings
    setting = {
        **configured.AGENT_SESSIONS,
        "private": {
            "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
            "OPTIONS": {"backend": "default", "keys": [NEW], "session_keys": True},
        },
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield


def log(row: Any, by: Any, text: str = "") -> LogEntry:
    kind = ContentType.objects.get_for_model(row, for_concrete_model=False)
    return LogEntry.objects.create(
        user=by,
        content_type=kind,
        object_id=str(row.pk),
        object_repr=str(row),
        action_flag=CHANGE,
        change_message=text or f"Read {row}.",
    )


def seed(user: Any, name: str) -> list[Any]:
    """Make a row of every model that says something about a person's session."""
    remote = make(f"{name}-remote", user, "lists")
    FailingBackend.down = True
    remote.delete()
    FailingBackend.down = False
    row = make(f"{name}-private", user, "private")
    branch = Branch.objects.get(session=row)
    old = Branch.objects.create(
        session=row, name=f"{name}-1", parent=branch, archived_at=timezone.now()
    )
    SessionItem.objects.create(branch=old, position=1, data="{}", text=name)
    run = AgentRun.objects.create(session=row, branch=old, run_id=f"{name}-run")
    told = RunEvents.objects.create(run=run, first=1, last=1, body=name)
    lone = SessionSecret.objects.create(
        backend="gone", session_id=f"{name}-lone", owner=str(user.pk), wrapped="x"
    )
    items = SessionItem.objects.filter(branch__session=row)
    pending = PendingClear.objects.get(session_id=f"{name}-remote")
    return [row, branch, old, run, told, lone, pending, *items]


def named(model: Any, user: Any, name: str) -> Any:
    """Return the rows of a model that are a person's, or name a session of theirs."""
    wanted = Q(**(owner_filter(model, user.pk) or {"pk__in": ()}))
    for field in model._meta.fields:
        if isinstance(field, CharField | TextField):
            wanted |= Q(**{f"{field.name}__contains": name})
    return model._base_manager.filter(wanted)


@pytest.mark.usefixtures("private")
def test_no_row_of_any_model_names_the_person_s_sessions(alice: Any) -> None:
    bob = get_user_model()._default_manager.create_user("bob")
    entries = [log(row, bob) for row in seed(alice, "alices-own")]
    others = [log(row, bob) for row in seed(bob, "bobs-own")]
    # Which keys a backend's processes write with is nobody's.
    models = [
        model
        for model in apps.get_app_config("agent_sessions").get_models()
        if model is not KeyUse
    ]
    for model in models:
        # A model that is new has an owner, and a row in seed().
        assert owner_filter(model, alice.pk) is not None, model
        assert named(model, alice, "alices-own").exists(), model
    before = {model: set(named(model, bob, "bobs-own")) for model in models}
    receipt, _ = run("alice", "--noinput")
    assert receipt["complete"]
    assert receipt["keys"] == 1
    assert receipt["log_entries"] == len(entries)
    for model in models:
        assert not named(model, alice, "alices-own").exists(), model
        # The other person's pending history was removed, as it was due.
        if model is not PendingClear:
            assert set(named(model, bob, "bobs-own")) == before[model]
    assert not named(LogEntry, alice, "alices-own").exists()
    for entry in entries:
        entry.refresh_from_db()
        assert (entry.object_id, entry.object_repr, entry.change_message) == (
            None,
            "erased",
            "",
        )
        assert entry.user == bob
        assert entry.action_flag == CHANGE
    for entry in others:
        assert LogEntry.objects.filter(
            pk=entry.pk, object_repr=entry.object_repr, object_id=entry.object_id
        ).exists()


@pytest.mark.usefixtures("private")
class TestTraces:
    def test_what_is_logged_meanwhile_is_blanked_too(self, alice: Any) -> None:
        row = make("one", alice)

        def read(**kwargs: Any) -> None:
            log(row, alice)

        session_cleared.connect(read)
        try:
            run("alice", "--noinput")
        finally:
            session_cleared.disconnect(read)
        entry = LogEntry.objects.get()
        assert (entry.object_repr, entry.object_id) == ("erased", None)

    def test_what_the_person_did_themselves_stays(self, alice: Any) -> None:
        bob = get_user_model()._default_manager.create_user("bob")
        entry = log(make("his", bob), alice, "Read his.")
        own = log(alice, alice, "Changed their name.")
        run("alice", "--noinput")
        for each in (entry, own):
            assert LogEntry.objects.filter(
                pk=each.pk, object_repr=each.object_repr, change_message__gt=""
            ).exists()

    def test_odd_keys_in_the_log_are_passed_over(self, alice: Any) -> None:
        entry = log(make("one", alice), alice)
        for key in ("x", "-1", "9" * 5_000, "9" * 30, "\u0661", ""):
            LogEntry.objects.create(
                user=alice,
                content_type=entry.content_type,
                object_id=key,
                object_repr=key[:10],
                action_flag=CHANGE,
            )
        assert run("alice", "--noinput")[0]["log_entries"] == 1

    def test_the_key_of_a_session_that_is_left_stays(self, alice: Any) -> None:
        row = make("busy", alice, "private")
        AgentSession.objects.update(run_id="r", run_seen_at=timezone.now())
        receipt, _ = run("alice", "--noinput", code=1)
        assert (receipt["complete"], receipt["keys"]) == (False, 0)
        assert SessionSecret.objects.get().session_id == row.session_id
        AgentSession.objects.update(run_id="")
        assert run("alice", "--noinput")[0]["complete"]
        assert not SessionSecret.objects.exists()

    def test_the_key_of_a_session_that_is_being_made_stays(self, alice: Any) -> None:
        later = timezone.now() + timedelta(minutes=1)
        SessionSecret.objects.create(
            backend="private", session_id="new", owner=str(alice.pk), created_at=later
        )
        assert run("alice", "--noinput")[0]["keys"] == 0
        assert SessionSecret.objects.exists()
