"""manage.py export_agent_sessions."""

from __future__ import annotations

import io
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.test import override_settings

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.remote.base import Stretch
from agent_sessions.exceptions import StorageError
from agent_sessions.handler import DATABASE_BACKEND
from agent_sessions.models import AgentSession, Branch, SessionItem
from agent_sessions.transfer.export import FORMS
from tests.support.exports import as_export, read_export
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]


class BrokenBackend(ListBackend):
    """A store that breaks off in the middle of a history."""

    async def store_page(self, key: SessionKey, wanted: Stretch) -> Any:
        if (wanted.after or 0) > 100:
            raise StorageError("The store is down.")
        return await super().store_page(key, wanted)


@pytest.fixture(autouse=True)
def _stores() -> Iterator[None]:
    ListBackend.histories.clear()
    setting: dict[str, Any] = {
        "default": {"BACKEND": DATABASE_BACKEND},
        "lists": {"BACKEND": ListBackend},
        "broken": {"BACKEND": BrokenBackend},
    }
    with override_settings(AGENT_SESSIONS=setting):
        yield
    ListBackend.histories.clear()


def make(
    session_id: str, items: int = 2, user: Any = None, backend: str = "default"
) -> AgentSession:
    batch: list[Any] = []
    for number in range(items):
        role = "assistant" if number % 2 else "user"
        batch.append({"role": role, "content": f"message {number} é"})
    sessions[backend].append(SessionKey(session_id, user and user.pk), batch)
    return AgentSession.objects.get(backend=backend, session_id=session_id)


def run(*args: str, code: int = 0, **options: Any) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    given = {"stdout": out, "stderr": err, **options}
    if not code:
        call_command("export_agent_sessions", *args, **given)
    else:
        with pytest.raises(CommandError) as caught:
            call_command("export_agent_sessions", *args, **given)
        assert caught.value.returncode == code
        err.write(str(caught.value))
    return out.getvalue(), err.getvalue()


def contents(session: dict[str, Any]) -> list[str]:
    return [each["item"]["content"] for each in session["items"]]


def test_all_sessions_of_all_stores_one_after_the_other() -> None:
    make("one", 3)
    make("two", 2, backend="lists")
    out, err = run()
    one, two = read_export(out)
    assert contents(one) == ["message 0 é", "message 1 é", "message 2 é"]
    assert contents(two) == ["message 0 é", "message 1 é"]
    (branch,) = two["branches"]
    assert branch | {"created_at": ""} == {"name": "main", "created_at": ""}
    assert err == "Exported 2 sessions with 5 items.\n"
    assert run(verbosity=0)[1] == ""


def test_the_options_choose_as_everywhere() -> None:
    alice = get_user_model()._default_manager.create_user("alice")
    make("hers", user=alice)
    make("nobodys")
    make("listed", backend="lists")
    for args, names in (
        (("--user", "alice"), ["hers"]),
        (("--backend", "lists"), ["listed"]),
        (("nobodys", "hers"), ["nobodys", "hers"]),
        (("--older-than", "1d"), []),
    ):
        found = read_export(run(*args)[0])
        assert [each["session"]["id"] for each in found] == names
    assert "no such session: 'x'. Nothing was exported." in run("x", code=1)[1]


def test_what_another_store_has_can_be_imported(tmp_path: Path) -> None:
    row = make("one", 450, backend="lists")
    path = tmp_path / "all.jsonl"
    run("--output", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    row.delete()
    with io.StringIO() as out:
        call_command("import_agent_sessions", "export", "--from", str(path), stdout=out)
    assert AgentSession.objects.get().backend == "default"
    found = sessions["default"].latest(SessionKey("one"), None)
    assert [item["content"] for item in found] == [
        f"message {number} é" for number in range(450)
    ]
    branch = Branch.objects.get(session__backend="default")
    assert (branch.head, branch.turn) == (450, 225)
    assert SessionItem.objects.order_by("-position")[0].turn == 225


def test_markdown_for_people() -> None:
    make("one")
    make("two", backend="lists")
    out, _ = run("--format", "markdown")
    assert out.count("# `one`") == out.count("# `two`") == 1
    assert out.count("message 1 é") == 2


@pytest.mark.parametrize(("form", "ending"), [("json", "jsonl"), ("markdown", "md")])
def test_a_folder_gets_a_file_of_each(tmp_path: Path, form: str, ending: str) -> None:
    one, two = make("../../etc/one"), make("..", backend="lists")
    run("--format", form, "--output", f"{tmp_path}/new/")
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == [
        f"default-..-..-etc-one-{one.pk}.{ending}",
        f"lists-{two.pk}.{ending}",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    again = ("--format", form, "--output", str(tmp_path / "new"))
    assert "--overwrite" in run(*again, code=1)[1]
    run(*again, "--overwrite")


def test_a_file_that_is_there_is_replaced_only_if_that_is_wanted(
    tmp_path: Path,
) -> None:
    make("one")
    path = tmp_path / "all.jsonl"
    path.write_text("mine")
    assert "is there already" in run("--output", str(path), code=1)[1]
    assert path.read_text() == "mine"
    run("--output", str(path), "--overwrite")
    assert contents(*read_export(path.read_text()))


def test_a_path_that_can_t_be_written_is_an_error(tmp_path: Path) -> None:
    make("one")
    _, err = run("--output", str(tmp_path / "no" / "folder.jsonl"), code=1)
    assert err.startswith("Can't write to ")
    assert "No such file" in err


def test_a_session_that_breaks_off_is_left_out_whole(tmp_path: Path) -> None:
    make("one")
    make("half", 1_050, backend="broken")
    make("two", backend="lists")
    out, err = run(code=3)
    ids = [each["session"]["id"] for each in read_export(out)]
    assert ids == ["one", "two"]
    assert "half: The store is down.\n" in err
    assert err.endswith("1 session could not be exported.")
    run("--output", f"{tmp_path}/", code=3)
    assert len(list(tmp_path.iterdir())) == 2


# -- what is told ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "markdown"])
@pytest.mark.parametrize("backend", ["default", "lists"])
def test_what_was_written_is_counted_not_what_rows_say(form: str, backend: str) -> None:
    row = make("one", 3, backend=backend)
    make("two", 2, backend=backend)
    AgentSession.objects.filter(pk=row.pk).update(item_count=70)
    err = run("--format", form)[1]
    assert err == "Exported 2 sessions with 5 items.\n"


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_store_that_is_down_fails_before_the_first_piece(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = make("one", backend="broken")

    async def fail(self: Any, key: SessionKey, wanted: Stretch) -> Any:
        raise StorageError("The store is down.")

    monkeypatch.setattr(BrokenBackend, "store_page", fail)
    with pytest.raises(StorageError, match="The store is down"):
        next(FORMS[form].make(row, None))


def test_what_was_left_out_is_not_counted() -> None:
    make("long", 700, backend="broken")
    make("one", 3)
    err = run(code=3)[1]
    assert "Exported 1 session with 3 items." in err


def test_items_of_every_branch_are_counted() -> None:
    row = make("one", 3)
    fork = Branch.objects.create(
        session=row, name="other", parent=row.branch, fork_position=1, head=1
    )
    SessionItem.objects.create(branch=fork, position=2, data="no JSON")
    out, err = run()
    assert len(read_export(out)[0]["items"]) == 4
    assert err == "Exported 1 session with 4 items.\n"


PRIVATE: dict[str, Any] = {
    "default": {"BACKEND": DATABASE_BACKEND},
    "other": {"BACKEND": DATABASE_BACKEND},
    "private": {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "other", "keys": ["k" * 32]},
    },
}


def imported(path: Path, *args: str) -> str:
    err = io.StringIO()
    try:
        call_command(
            "import_agent_sessions", "export", "--from", str(path), *args, stderr=err
        )
    except CommandError as exc:
        err.write(str(exc))
    return err.getvalue()


def test_what_was_encrypted_is_imported_in_clear_only_on_request(
    tmp_path: Path,
) -> None:
    path = tmp_path / "all.jsonl"
    with override_settings(AGENT_SESSIONS=PRIVATE):
        make("secret", backend="private")
        make("open", backend="other")
        err = run("--output", str(path))[1]
        assert "1 session of these: encrypted in the store, and in clear in" in err
        lines = read_export(path.read_text())
        facts = {line["session"]["id"]: line["session"] for line in lines}
        assert facts["secret"]["encrypted"] is True
        assert "encrypted" not in facts["open"]
        said = imported(path)
        assert "secret: refused: its items are encrypted where they are from" in said
        assert "--in-clear" in said
        assert "1 session was not imported." in said
        rows = AgentSession.objects.filter(backend="default")
        assert [row.session_id for row in rows] == ["open"]
        assert imported(path, "--dry-run").count("refused") == 1
        assert imported(path, "--in-clear") == ""
        assert rows.get(session_id="secret").item_count == 2


def test_a_line_that_names_no_alias_is_read(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    make("one", backend="lists")
    (line,) = read_export(run()[0])
    del line["session"]["backend"]
    path.write_text(as_export(line))
    assert imported(path) == ""
    assert AgentSession.objects.get(backend="default").item_count == 2


def test_the_mark_holds_where_the_alias_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    with override_settings(AGENT_SESSIONS=PRIVATE):
        make("secret", backend="private")
        run("--output", str(path))
    assert "secret: refused" in imported(path)
    assert not AgentSession.objects.filter(backend="default").exists()


@pytest.mark.parametrize("output", ["-", "all.jsonl", "folder/"])
def test_ctrl_c_says_in_one_line_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    make("one", 1)
    make("two", 1)
    export = FORMS["json"].make

    def press(row: AgentSession, report: Any) -> Any:
        if report.made:
            signal.raise_signal(signal.SIGINT)
        return export(row, report)

    monkeypatch.setitem(FORMS, "json", FORMS["json"]._replace(make=press))
    place = output if output == "-" else f"{tmp_path}/{output}"
    with pytest.raises(CommandError) as caught:
        run(output=place)
    assert caught.value.returncode == 130
    told = "Stopped after 1 session."
    if output == "all.jsonl":
        told += f" Nothing was written to {place}."
    assert str(caught.value) == told
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert len(files) == (output == "folder/")
