"""What an import refuses: by name, as it is, and while the rest goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents.extensions.memory import AdvancedSQLiteSession
from django.contrib.auth import get_user_model
from django.core.management import CommandError
from django.test import override_settings

from agent_sessions import DjangoSession, sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.doctor import examine
from agent_sessions.handler import DATABASE_BACKEND, open_session
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.transfer.export import export_session
from tests.support.exports import as_export, read_export
from tests.support.import_sources import (
    Item,
    conversation,
    imported,
    refused,
    run_import,
    said,
)

pytestmark = pytest.mark.django_db

ALIASES = ("default", "two", "into")


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    """Forget the lineages: a test that is rolled back leaves its ids to the next."""
    with override_settings(
        AGENT_SESSIONS={name: {"BACKEND": DATABASE_BACKEND} for name in ALIASES}
    ):
        sessions.reset()
        yield
    sessions.reset()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source"


def everything(backend: str = "default") -> list[Any]:
    """Return every row of a backend, to see that nothing has changed."""
    return [
        list(rows.order_by("pk").values())
        for rows in (
            AgentSession.objects.filter(backend=backend),
            Branch.objects.filter(session__backend=backend),
            SessionItem.objects.filter(branch__session__backend=backend),
        )
    ]


def export(path: Path, *rows: AgentSession) -> None:
    lines = ["".join(export_session(row)) for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def line(session_id: Any, **changes: Any) -> Any:
    """Return a line of an export with one question, and what is changed in it."""
    item: Item = {"role": "user", "content": "q"}
    session = {"id": session_id, **changes.pop("session", {})}
    return {
        "format": "agent-sessions/1",
        "session": session,
        "branches": [{"name": "main"}],
        "runs": [],
        "items": [{"branch": "main", "position": 1, "turn": 1, "item": item}],
        **changes,
    }


def write_lines(path: Path, *lines: Any) -> None:
    path.write_text(as_export(*lines))


class TestBackends:
    def test_sessions_of_two_backends_are_never_mixed(self, path: Path) -> None:
        key = SessionKey("one", None)
        sessions["default"].append(key, said("a"))
        sessions["two"].append(key, said("x", "y"))
        export(path, *AgentSession.objects.order_by("pk"))
        alias = read_export(path.read_text())[1]["session"]["backend"]
        assert alias == "two"
        reason = refused("export", path, "--backend", "into")
        assert "line 4: refused: the session 'one' of the backend 'two'" in reason
        assert sessions["into"].latest(key, None) == said("a")

    def test_another_backend_s_later_export_is_refused(self, path: Path) -> None:
        key = SessionKey("one", None)
        sessions["default"].append(key, said("a"))
        export(path, AgentSession.objects.get())
        run_import("export", path, "--backend", "into")
        sessions["two"].append(key, said("x", "y"))
        export(path, AgentSession.objects.get(backend="two"))
        before = everything("into")
        reason = refused("export", path, "--backend", "into")
        assert "of the backend 'default'" in reason
        assert everything("into") == before

    def test_lines_without_a_backend_are_read_but_once(self, path: Path) -> None:
        write_lines(path, line("one"), line("one"), line("two"))
        assert "has the id of line 1" in refused("export", path)
        assert imported("one") == imported("two") == said("q")


class TestLeftAsItIs:
    def test_an_undone_turn_in_the_source(self, path: Path) -> None:
        session = DjangoSession("one")
        session.sync.add_items(said("a", "b"))
        row = AgentSession.objects.get()
        export(path, row)
        run_import("export", path, "--backend", "into")
        session.sync.undo_turn()
        session.sync.add_items(said("c", "d"))
        row.refresh_from_db()
        export(path, row)
        before = everything("into")
        reason = refused("export", path, "--backend", "into")
        assert "Delete the imported session and import again" in reason
        assert everything("into") == before

    def branched(self) -> Any:
        main = {"name": "main"}
        fork = {"name": "b", "parent": "main", "fork_position": 1}
        items = [
            {"branch": name, "position": position, "turn": turn, "item": item}
            for name, position, turn, item in (
                ("main", 1, 1, said("q")[0]),
                ("b", 2, 2, said("fork")[0]),
            )
        ]
        return line("one", branches=[main, fork], items=items)

    def grow(self, export: Any, branch: str) -> None:
        item = {"branch": branch, "position": 3, "turn": 3, "item": said("new")[0]}
        index = [each["branch"] for each in export["items"]].index(branch)
        export["items"].insert(index + 1, item)

    def test_a_later_branch_that_goes_on_in_both_places(self, path: Path) -> None:
        exported = self.branched()
        write_lines(path, exported)
        run_import("export", path)
        DjangoSession("one", branch="b").sync.add_items(said("here"))
        self.grow(exported, "main")
        self.grow(exported, "b")
        write_lines(path, exported)
        before = everything()
        assert "branch 'b' has gone on here" in refused("export", path)
        assert everything() == before

    def test_a_later_branch_that_has_lost_items(self, path: Path) -> None:
        exported = self.branched()
        write_lines(path, exported)
        run_import("export", path)
        exported["items"].pop()
        self.grow(exported, "main")
        write_lines(path, exported)
        before = everything()
        assert "no longer has all items of branch 'b'" in refused("export", path)
        assert everything() == before

    def test_a_branch_of_the_same_name_made_here(self, path: Path) -> None:
        exported = self.branched()
        fork = exported["branches"].pop()
        added = exported["items"].pop()
        write_lines(path, exported)
        run_import("export", path)
        DjangoSession("one").sync.create_branch_from_turn(1, "b")
        exported["branches"].append(fork)
        exported["items"].append(added)
        write_lines(path, exported)
        before = everything()
        assert "another of this name was made here" in refused("export", path)
        assert everything() == before

    def test_a_deleted_fork_in_the_source(self, path: Path) -> None:
        write_advanced(path, fork_with_items)
        run_import("advanced-sqlite", path)

        async def delete(session: Any) -> None:
            await session.add_items(conversation(1))
            await session.delete_branch("fork", force=True)

        write_advanced(path, delete)
        before = everything()
        told = refused("advanced-sqlite", path)
        assert "no longer has all items of branch 'fork'" in told
        assert everything() == before


def write_advanced(path: Path, script: Any) -> None:
    session = AdvancedSQLiteSession(session_id="one", db_path=path, create_tables=True)
    asyncio.run(script(session))
    session.close()


async def fork_with_items(session: Any) -> None:
    await session.add_items(conversation(2))
    await session.create_branch_from_turn(2, "fork")
    await session.add_items(conversation(1, about="fork"))
    await session.switch_to_branch("main")


class TestBranchNames:
    def test_a_tilde_becomes_a_hyphen(self, path: Path) -> None:
        async def fork(session: Any) -> None:
            await session.add_items(conversation(2))
            await session.create_branch_from_turn(2, "other~x")
            await session.add_items(conversation(1, about="fork"))
            await session.create_branch_from_turn(1, "gone~1")
            await session.switch_to_branch("main")

        write_advanced(path, fork)
        run_import("advanced-sqlite", path)
        names = set(Branch.objects.values_list("name", flat=True))
        assert names == {"main", "other-x"}
        assert "unchanged 1" in run_import("advanced-sqlite", path)[0]
        forked = conversation(1) + conversation(1, about="fork")
        assert imported("one", branch="other-x") == forked
        report = examine()
        assert not report.findings
        assert not report.quarantined

    def test_two_names_that_would_be_one_are_refused(self, path: Path) -> None:
        async def fork(session: Any) -> None:
            await session.add_items(conversation(2))
            for name in ("a~b", "a-b"):
                await session.create_branch_from_turn(2, name)
                await session.add_items(conversation(1))
                await session.switch_to_branch("main")

        write_advanced(path, fork)
        assert "differ only in ~ and -" in refused("advanced-sqlite", path)
        assert not AgentSession.objects.exists()

    def test_an_export_s_own_names_are_kept_where_they_are_archived(
        self, path: Path
    ) -> None:
        branch = {"name": "main~7", "parent": "main", "fork_position": 1}
        main = {"name": "main"}
        kept = line("kept", branches=[main, {**branch, "archived": True}])
        shown = line("shown", branches=[main, branch])
        write_lines(path, kept, shown)
        assert "shown: refused: its branch 'main~7'" in refused("export", path)
        (undone,) = Branch.objects.filter(version__gt=0)
        assert (undone.name, undone.version) == ("main", 7)


@pytest.mark.parametrize("change", ["append", "pop"])
def test_an_export_beside_a_change_keeps_the_turns(path: Path, change: str) -> None:
    session = DjangoSession("one")
    session.sync.add_items(said("a", "b", "c"))
    pieces = export_session(AgentSession.objects.get())
    # Up to the branches.
    written = [next(pieces)]
    if change == "append":
        session.sync.add_items(said("d"))
    else:
        session.sync.pop_item()
    path.write_text("".join([*written, *pieces]))
    run_import("export", path, "--backend", "into")
    assert not examine(AgentSession.objects.filter(backend="into")).findings
    copy: Any = open_session(sessions["into"], SessionKey("one", None))
    left = copy.sync.get_items()[:-1]
    copy.sync.undo_turn()
    assert copy.sync.get_items() == left


def run_of(**columns: Any) -> Any:
    return {"id": "r", "status": "completed", **columns}


def only_other(**current: Any) -> Any:
    return line("a", session=current, branches=[{"name": "other"}], items=[])


class TestWrongExports:
    @pytest.mark.parametrize(
        "wrong",
        [
            line([1]),
            line({"a": 1}),
            line(5),
            line(None),
            line("a", session={"user": [5]}),
            line("a", session={"user": {}}),
            line("a", session={"branch": []}),
            line("a", session={"requests": 10**30}),
            line("a", session={"metadata": {"a": "\x00"}}),
            line("a", session={"metadata": {"a": [float("inf")]}}),
            line("a", branches=[{"name": "main", "parent": [], "fork_position": 1}]),
            line("a", branches=[{"name": "main", "fork_position": -1}]),
            line("a", branches=[{"name": "main", "head": 10**30}]),
            line("a", branches=[{"name": "\ud800"}]),
            line("a", runs=[run_of(model=None)]),
            line("a", runs=[run_of(model="x" * 256)]),
            line("a", runs=[run_of(requests=-4)]),
            line("a", runs=[run_of(requests="many")]),
            line("a", runs=[run_of(input_tokens=10**30)]),
            line("a", runs=[run_of(), run_of()]),
            line("a", runs=[run_of(usage={"a": "\ud800"})]),
            only_other(),
            only_other(branch="none"),
        ],
    )
    def test_a_wrong_session_is_refused_and_the_rest_goes_on(
        self, path: Path, wrong: Any
    ) -> None:
        write_lines(path, wrong, line("b"))
        assert ": refused: " in refused("export", path)
        assert imported("b") == said("q")
        assert AgentSession.objects.count() == 1
        assert not AgentRun.objects.exists()

    @pytest.mark.parametrize(
        "place", [{"position": 10**30}, {"turn": 2**40}, {"turn": -1}]
    )
    def test_places_that_can_t_be_kept(self, path: Path, place: Any) -> None:
        wrong = line("a")
        wrong["items"][0].update(place)
        write_lines(path, wrong, line("b"))
        assert "a: refused: line 2 breaks off" in refused("export", path)
        assert imported("b") == said("q")

    def test_bytes_that_are_no_utf_8_break_their_line(self, path: Path) -> None:
        good = [as_export(line(name)).encode() for name in ("a", "b")]
        bad = as_export(line("x")).encode().replace(b'"x"', b'"\xff"')
        path.write_bytes(good[0] + bad + good[1])
        assert "line 4: refused: line 4 is no session" in refused("export", path)
        assert imported("a") == imported("b") == said("q")
        path.write_bytes(b"\xff\xfe" * 99)
        assert "line 1 is no session" in refused("export", path)

    @pytest.mark.parametrize("kind", ["export", "sqlite"])
    def test_a_place_with_a_nul(self, path: Path, kind: str) -> None:
        with pytest.raises(CommandError, match=r"x00"):
            run_import(kind, f"{path}\x00")

    def test_ids_that_tell_no_owner(self, path: Path) -> None:
        get_user_model().objects.create_user("alice")
        write_lines(path, line(6), line(None), line("user:alice"))
        refused("export", path, "--user-from", "user:")
        assert AgentSession.objects.get().session_id == "user:alice"

    @pytest.mark.parametrize("head", [None, 1])
    def test_a_fork_behind_its_parents_end(self, path: Path, head: int | None) -> None:
        """What the parent gets later would be shown on the branch too."""
        main = {"name": "main", **({"head": head} if head else {})}
        fork = {"name": "b", "parent": "main"}
        last = line("a")["items"][-1]["position"]
        for position in (last + 1, last):
            branches = [main, fork | {"fork_position": position}]
            write_lines(path, line("a", branches=branches))
            if position > last:
                told = refused("export", path)
                assert "its branch 'b' begins behind the end of 'main'" in told
                assert "begins behind" in refused("export", path, "--dry-run")
        run_import("export", path)
        session = DjangoSession("a")
        session.sync.add_items([{"role": "user", "content": "later"}])
        assert imported("a")[-1] == {"role": "user", "content": "later"}
        assert session.sync.get_items(branch_id="b") == said("q")

    @pytest.mark.parametrize("current", ["undone", "none"])
    def test_a_current_branch_that_isn_t_shown(self, path: Path, current: str) -> None:
        undone = {"name": "undone", "parent": "main", "fork_position": 1}
        branches = [{"name": "main"}, undone | {"archived": True}]
        write_lines(path, line("a", branches=branches, session={"branch": current}))
        run_import("export", path)
        row = AgentSession.objects.select_related("branch").get()
        assert row.branch is not None
        assert (row.branch.name, row.title) == ("main", "q")
        assert imported("a") == said("q")

    def test_a_session_of_which_nothing_is_shown(self, path: Path) -> None:
        write_lines(path, line("a", branches=[{"name": "main", "archived": True}]))
        assert "names no current branch that is shown" in refused("export", path)
