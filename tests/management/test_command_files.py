"""Files that commands write, where others may have prepared something."""

from __future__ import annotations

import io
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.management.files import open_exclusively, writing
from tests.support.exports import read_export

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]


@pytest.fixture(autouse=True)
def _session() -> None:
    sessions["default"].append(SessionKey("s"), [{"role": "user", "content": "Hello"}])


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of the operator's, which stays as it is."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / "victim"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


def export(path: Any, *args: str) -> str:
    """Export into a path; give the error."""
    try:
        call_command(
            "export_agent_sessions",
            "--output",
            str(path),
            *args,
            stdout=io.StringIO(),
            stderr=io.StringIO(),
        )
    except CommandError as exc:
        return str(exc)
    return ""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"elsewhere"}


@pytest.mark.parametrize("ending", [".part", "~", ".tmp"])
def test_a_prepared_link_is_not_followed(
    tmp_path: Path, victim: Path, ending: str
) -> None:
    (tmp_path / f"all.jsonl{ending}").symlink_to(victim)
    assert export(tmp_path / "all.jsonl") == ""
    assert names(tmp_path) == {"all.jsonl", f"all.jsonl{ending}"}
    assert (tmp_path / f"all.jsonl{ending}").is_symlink()


@pytest.mark.parametrize("args", [(), ("--overwrite",)])
def test_a_link_is_neither_followed_nor_replaced(
    tmp_path: Path, victim: Path, args: tuple[str, ...]
) -> None:
    for name, there in (("link", victim), ("dangling", tmp_path / "elsewhere" / "x")):
        (tmp_path / name).symlink_to(there)
        assert "is a link. Name the file" in export(tmp_path / name, *args)
        assert (tmp_path / name).is_symlink()
    assert names(tmp_path) == {"link", "dangling"}
    assert not (tmp_path / "elsewhere" / "x").exists()


def test_a_folder_s_prepared_links_are_not_followed(
    tmp_path: Path, victim: Path
) -> None:
    folder = tmp_path / "folder"
    assert export(f"{folder}/") == ""
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.unlink()
    file.symlink_to(victim)
    assert "is a link" in export(folder, "--overwrite")


@pytest.mark.parametrize("args", [(), ("--overwrite",)])
def test_what_is_no_file_is_left_alone(tmp_path: Path, args: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/null", "/dev/full"):
        assert "is no regular file" in export(path, *args)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_replaces_a_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text("old")
    path.chmod(0o644)
    other = tmp_path / "hard"
    other.hardlink_to(path)
    assert export(path, "--overwrite") == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_export(path.read_text())[0]["session"]["id"] == "s"
    assert other.read_text() == "old"


@pytest.mark.parametrize("output", ["/proc/x", "/nowhere/x", "a\0b", "x" * 300])
def test_a_place_that_takes_no_file_is_an_error(output: str) -> None:
    assert export(output).startswith("Can't write to ")


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_what_breaks_off_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException], *, overwrite: bool
) -> None:
    path = tmp_path / "all.jsonl"
    if overwrite:
        path.write_text("old")

    def write() -> None:
        with full_disk(), writing(path, overwrite=overwrite) as file:
            file.write(b"x" * 4096 if error is OSError else b"x")
            if error is not OSError:
                raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ({"all.jsonl"} if overwrite else set())
    assert not overwrite or path.read_text() == "old"


def test_it_has_a_name_that_nobody_can_guess_until_it_is_whole(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with writing(tmp_path / "all.jsonl", overwrite=True) as file:
            file.write(b"x")
            (part,) = names(tmp_path) - {"all.jsonl"}
            assert stat.S_IMODE((tmp_path / part).stat().st_mode) == 0o600
            seen.add(part)
    assert len(seen) == 3
    assert names(tmp_path) == {"all.jsonl"}


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    with (
        pytest.raises(CommandError, match="is there already"),
        writing(path, overwrite=False),
    ):
        path.write_text("somebody's")
    assert path.read_text() == "somebody's"
    assert names(tmp_path) == {"all.jsonl"}


class TestReceipt:
    @pytest.fixture(autouse=True)
    def _alice(self) -> None:
        get_user_model()._default_manager.create_user("alice")

    def erase(self, path: Path) -> str:
        out = io.StringIO()
        call_command(
            "erase_agent_user",
            "alice",
            "--noinput",
            "--receipt",
            str(path),
            stdout=out,
            stderr=io.StringIO(),
        )
        return out.getvalue()

    def test_is_a_new_file(self, tmp_path: Path, victim: Path) -> None:
        for name, there in (("a", victim), ("b", tmp_path / "elsewhere" / "x")):
            (tmp_path / name).symlink_to(there)
            with pytest.raises(CommandError, match="is there already") as caught:
                self.erase(tmp_path / name)
            assert caught.value.returncode == 2
        assert self.erase(tmp_path / "c") == ""
        assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600
        assert json.loads((tmp_path / "c").read_text())["complete"]

    def test_goes_to_nobody_who_takes_its_place(
        self, tmp_path: Path, victim: Path
    ) -> None:
        path = tmp_path / "receipt"
        with open_exclusively(path) as file:
            path.unlink()
            path.symlink_to(victim)
            file.write(b"said")

    def test_is_printed_where_the_disk_is_full(self, tmp_path: Path) -> None:
        path = tmp_path / "receipt"
        for number in range(20):
            sessions["default"].append(
                SessionKey(f"{'long' * 20}{number}", get_user_model().objects.get().pk),
                [{"role": "user", "content": "Hello"}],
            )
        with full_disk():
            receipt = json.loads(self.erase(path))
        assert len(receipt["erased"]) == 20
