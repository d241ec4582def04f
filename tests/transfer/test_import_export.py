"""Our own export, agent-sessions/1: written, read back, broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import get_user_model
from django.core.management import CommandError
from django.utils import timezone

from agent_sessions import DjangoSession, sessions
from agent_sessions.doctor import examine
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.transfer.export import FORMAT, export_session
from tests.support.exports import as_export, read_export
from tests.support.import_sources import conversation, imported, refused, run_import

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def fresh_backends() -> None:
    """Forget the lineages: a test that is rolled back leaves its ids to the next."""
    sessions.reset()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.jsonl"


def export(path: Path) -> list[str]:
    """Export every session to a file; give its lines."""
    lines = [
        "".join(export_session(row)) for row in AgentSession.objects.order_by("pk")
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return lines


def make() -> Any:
    """Make a session with all that one can have."""
    user = get_user_model().objects.create_user("alice")
    session = DjangoSession("one", user=user)
    session.sync.add_items(conversation(250))  # type: ignore[arg-type]
    row = AgentSession.objects.get()
    main = Branch.objects.get()
    Branch.objects.create(
        session=row, name="b1", parent=main, fork_position=8, head=8, turn=2
    )
    Branch.objects.create(
        session=row, name="gone", parent=main, fork_position=4, head=4, turn=1,
        archived_at=timezone.now(),
    )  # fmt: skip
    fork = DjangoSession("one", user=user, branch="b1")
    fork.sync.add_items(conversation(2, about="b1"))  # type: ignore[arg-type]
    session.sync.pop_item()
    SessionItem.objects.filter(branch=main, position=3).update(data='{"cut":')
    AgentRun.objects.create(
        session=row, branch=main, run_id="r1", status="failed", input_tokens=7,
        finished_at=timezone.now(), first_position=1, last_position=4, usage={"total_tokens": 7},
    )  # fmt: skip
    AgentSession.objects.update(
        title="A title", metadata={"a": 1}, input_tokens=9, agent_name="helper"
    )
    DjangoSession("nobody's").sync.add_items([{"role": "user", "content": "Hi"}])
    return user


def test_the_format_is_a_line_a_session_and_one_an_item(path: Path) -> None:
    make()
    one, other = export(path)
    assert one.isascii()
    head, item, end = map(json.loads, other.splitlines())
    assert list(head) == ["format", "session", "branches", "runs"]
    assert head["format"] == FORMAT == "agent-sessions/1"
    assert (head["session"]["id"], head["session"]["user"]) == ("nobody's", None)
    assert item["item"] == {"role": "user", "content": "Hi"}
    assert end == {"items": 1}
    assert read_export(one)[0]["items"][2]["raw"] == '{"cut":'


def test_a_round_trip_changes_nothing(path: Path) -> None:
    user = make()
    before = {name: imported("one", user=user, branch=name) for name in ("main", "b1")}
    lines = export(path)
    AgentSession.objects.all().delete()
    out, _ = run_import("export", path)
    assert "sessions new 2," in out
    assert "Unreadable, kept as they are: 1." in out
    for name, items in before.items():
        assert imported("one", user=user, branch=name) == items
    again = export(path)
    assert again == lines
    row = AgentSession.objects.get(session_id="one")
    assert (row.item_count, row.user) == (1_007, user)
    assert "unchanged 2" in run_import("export", path)[0]


def test_what_was_replaced_and_quarantined_comes_along(path: Path) -> None:
    session = DjangoSession("one").sync
    said: Any = [
        {"role": role, "content": f"{role} {turn}"}
        for turn in range(3)
        for role in ("user", "assistant")
    ]
    session.add_items(said)
    session.undo_turn()
    SessionItem.objects.filter(position=2).update(data="[]")
    examine(repair=True)
    shown = session.get_items()
    lines = export(path)
    AgentSession.objects.all().delete()
    run_import("export", path)
    assert "unchanged 1" in run_import("export", path)[0]
    assert session.get_items() == shown
    (archived,) = session.list_archived()
    assert session.restore_branch(archived) == "main_restored"
    assert session.get_items() == said[:1] + said[2:]
    (row,) = examine().quarantined
    assert (row.branch, row.position) == (archived, 2)
    branches = read_export(lines[0])[0]["branches"]
    assert [(b["name"], b.get("quarantine", False)) for b in branches] == [
        ("main~1", False),
        ("main", False),
        ("main~2", True),
    ]


def test_a_fork_where_turns_were_undone_counts_its_turns(path: Path) -> None:
    session = DjangoSession("one").sync
    said: Any = [
        {"role": role, "content": f"{role} {turn}"}
        for turn in range(3)
        for role in ("user", "assistant")
    ]
    session.add_items(said)
    # The branch ends behind its fork now, and has no items of its own.
    session.undo_turn()
    session.fork(2)
    lines = export(path)
    AgentSession.objects.all().delete()
    run_import("export", path)
    assert export(path) == lines
    assert session.undo_turn() == 2
    assert session.get_items() == said[:2]


def test_a_run_that_was_going_on_has_ended_here(path: Path) -> None:
    make()
    AgentRun.objects.update(status="waiting", finished_at=None)
    export(path)
    AgentSession.objects.all().delete()
    run_import("export", path)
    run = AgentRun.objects.get()
    assert (run.status, run.finished_at) == ("interrupted", run.started_at)
    assert AgentSession.objects.get(session_id="one").input_tokens == 9


def test_usage_by_turn_survives_a_round_trip(path: Path) -> None:
    session = DjangoSession("one")
    session.sync.add_items(conversation(3))  # type: ignore[arg-type]
    for turn, opening in enumerate(
        SessionItem.objects.filter(role="user").order_by("position"), 1
    ):
        AgentRun.objects.create(
            session=AgentSession.objects.get(), branch=opening.branch, run_id=f"r{turn}",
            status="completed", finished_at=timezone.now(), turn=turn,
            turn_item=opening.pk, requests=1, input_tokens=turn, total_tokens=turn,
        )  # fmt: skip
    ask = async_to_sync(session.get_turn_usage)
    before: Any = ask()
    assert [turn["total_tokens"] for turn in before] == [1, 2, 3]
    export(path)
    AgentSession.objects.all().delete()
    run_import("export", path)
    assert ask() == before


def test_a_longer_export_adds_what_is_new(path: Path) -> None:
    session = DjangoSession("one")
    session.sync.add_items(conversation(2))  # type: ignore[arg-type]
    short = "".join(export_session(AgentSession.objects.get()))
    session.sync.add_items(conversation(1, about="more"))  # type: ignore[arg-type]
    long = "".join(export_session(AgentSession.objects.get()))
    AgentSession.objects.all().delete()
    path.write_text(short)
    run_import("export", path)
    path.write_text(long)
    assert run_import("export", path)[0].startswith("Imported 4 items")
    assert imported("one") == conversation(2) + conversation(1, about="more")


def test_an_owner_who_is_not_here_is_refused(path: Path) -> None:
    user = make()
    export(path)
    user.delete()
    AgentSession.objects.all().delete()
    with pytest.raises(CommandError, match="1 session was not imported"):
        run_import("export", path)
    assert list(AgentSession.objects.values_list("session_id", flat=True)) == [
        "nobody's"
    ]


def broken(text: str) -> str:
    """Cut a session in the middle of an item."""
    return text[: len(text) // 2] + "\n"


def test_a_cut_session_goes_on_when_it_is_whole(path: Path) -> None:
    for name in ("a", "b"):
        DjangoSession(name).sync.add_items(conversation(300))  # type: ignore[arg-type]
    lines = export(path)
    AgentSession.objects.all().delete()
    path.write_text("not json\n" + broken(lines[0]) + "\n" + lines[1] + "{}\n")
    with pytest.raises(CommandError, match="3 sessions were not imported"):
        run_import("export", path)
    assert imported("b") == conversation(300)
    written = len(imported("a"))
    assert 0 < written < 1_200
    path.write_text("".join(lines))
    assert run_import("export", path)[0].startswith(f"Imported {1_200 - written} items")
    assert imported("a") == conversation(300)


def test_a_missing_last_line_is_told(path: Path) -> None:
    for name in ("a", "b"):
        DjangoSession(name).sync.add_items(conversation(1))  # type: ignore[arg-type]
    first, second = export(path)
    AgentSession.objects.all().delete()
    path.write_text("".join(first.splitlines(keepends=True)[:-1]) + second)
    assert "a: refused: line 5 breaks off" in refused("export", path)
    assert imported("a") == imported("b") == conversation(1)
    path.write_text(first + second)
    assert "grown 0, unchanged 2" in run_import("export", path)[0]


def test_what_fails_at_its_second_reading_is_one_refusal(path: Path) -> None:
    for name in ("a", "b"):
        DjangoSession(name).sync.add_items(conversation(1))  # type: ignore[arg-type]
    first, second = export(path)
    AgentSession.objects.all().delete()
    path.write_text(first)
    run_import("export", path)
    (line,) = read_export(first)
    # It was compared as a whole before this is found.
    line["items"] += [{**line["items"][0], "position": n} for n in (9, 8, 10, 11)]
    path.write_text(as_export(line) + second)
    told = refused("export", path)
    assert "a: refused: its items are not in the order of their positions" in told
    assert told.count("refused") == 1
    assert imported("a") == imported("b") == conversation(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line["branches"].append({"name": "main"}),
        lambda line: line["branches"].insert(0, {"name": "b", "parent": "main"}),
        lambda line: line["branches"][0].update(name="quarantine"),
        lambda line: line["items"].reverse(),
        lambda line: line["items"].append({**line["items"][0], "branch": "none"}),
        lambda line: line["items"].append({}),
        lambda line: line["session"].pop("id"),
        lambda line: line["session"].update(id=""),
        lambda line: line.update(format="agent-sessions/2"),
    ],
    ids=[
        *("branch twice", "parent later", "reserved name", "order", "no such branch"),
        *("empty item", "no id", "empty id", "another format"),
    ],
)
def test_what_is_no_export_is_refused(path: Path, change: Any) -> None:
    for name in ("a", "b"):
        DjangoSession(name).sync.add_items(conversation(1))  # type: ignore[arg-type]
    first, second = export(path)
    AgentSession.objects.all().delete()
    (line,) = read_export(first)
    change(line)
    path.write_text(as_export(line) + second)
    with pytest.raises(CommandError, match="1 session was not imported"):
        run_import("export", path)
    assert imported("b") == conversation(1)
