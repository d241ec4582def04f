"""Keys that are taken out of use: nobody writes with them, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.test import override_settings

from agent_sessions import sessions
from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.encrypted.rotation import Retirement
from agent_sessions.exceptions import (
    EncryptionError,
    RetiredEncryptionKey,
    StorageError,
    UnknownEncryptionKey,
)
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    Branch,
    KeyUse,
    SessionItem,
    SessionSecret,
)
from tests.backends.encrypted.test_encrypted import key_id, private
from tests.backends.encrypted.test_encrypted_contract import DATABASE, encrypted
from tests.backends.encrypted.test_encrypted_rotation import (
    fill,
    key_ids,
    rotate,
    under,
)
from tests.encryption.test_encryption import NEW, OLD, said
from tests.support.key_writer import GATE, KEYS, Other, other_writer
from tests.support.list_backend import ListBackend

pytestmark = [pytest.mark.django_db(transaction=True)]
one_database = pytest.mark.one_database

STALLED = "tests.support.stalled_database.StalledDatabase"
FROM_FILE = "tests.support.key_writer.keys_from_file"


class Service:
    """Where the processes of a test get their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def give(self, *keys: str) -> None:
        # In one step: another process may be reading.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(keys))
        new.rename(self.path)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setenv(KEYS, str(tmp_path / "keys.json"))
    monkeypatch.setenv(GATE, str(tmp_path / "gate"))
    found = Service(tmp_path / "keys.json")
    found.give(OLD)
    return found


@pytest.fixture
def environment(service: Service, database_environment: dict[str, str]) -> Any:
    return database_environment


def setting(keys: Any, inner: Any = DATABASE, **options: Any) -> Any:
    return encrypted({"BACKEND": inner}, **{"keys": keys, "key_refresh": 1, **options})


def texts(*keys: str, **options: Any) -> list[str]:
    """Read the session in this process, with these keys alone."""
    with under(*keys, **options):
        return [item["content"] for item in private().sync.get_items()]


def refused(*arguments: str) -> str:
    """Call the command, which must end with 3; give what it says."""
    out = StringIO()
    with pytest.raises(CommandError, match="Keep the older keys") as caught:
        call_command("rotate_agent_session_keys", *arguments, stdout=out, stderr=out)
    assert caught.value.returncode == 3
    return out.getvalue()


def eventually(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


# -- processes that stay up ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"session_keys": True}], ids=["ring", "own"])
def test_a_process_that_stays_up_writes_with_the_new_key_before_the_old_one_goes(
    service: Service, environment: Any, options: Any
) -> None:
    configured = setting(FROM_FILE, **options)
    with other_writer(environment, configured) as other:
        assert other.tell("write first") == {"gave": None}
        other.tell("busy")
        # Step 1: all can read it, after they have asked.
        service.give(OLD, NEW)
        time.sleep(2)
        service.give(NEW, OLD)
        with override_settings(AGENT_SESSIONS=configured):
            assert f"nothing is under {key_id(OLD)}" in rotate()
        # Destroyed, as step 4 of the docs allows.
        service.give(NEW)
        time.sleep(0.3)
        told = other.tell("rest")["gave"]
        assert told["error"] == ""
        assert other.tell("write last") == {"gave": None}
        assert other.tell("awrite async") == {"gave": None}
    expected = ["first", *told["written"], "last", "async"]
    assert texts(NEW, **options) == expected
    assert KeyUse.objects.get(key_id=key_id(OLD)).retired_at is not None


def test_a_process_with_old_settings_is_named_and_nothing_is_retired(
    environment: Any,
) -> None:
    with other_writer(environment, setting([OLD])) as other:
        other.tell("write first")
        other.tell("busy")
        with under(NEW, OLD):
            told = refused("--wait", "3")
        assert f"key {key_id(OLD)} was written with meanwhile" in told
        assert f":{other.process.pid} (host:process)" in told
        assert "can be removed" not in told
        rest = other.tell("rest")["gave"]
        assert rest["error"] == ""
    with under(NEW, OLD):
        assert "it can be removed" in rotate()
    assert texts(NEW) == ["first", *rest["written"]]


def test_a_process_that_comes_with_a_retired_key_reads_and_is_refused_to_write(
    environment: Any,
) -> None:
    with under(OLD):
        fill(1)
    with under(NEW, OLD):
        rotate()
    with other_writer(environment, setting([OLD, NEW])) as other:
        assert len(other.tell("read")["gave"]) == 1
        for command in ("write", "awrite"):
            answer = other.tell(f"{command} lost")
            assert answer["error"] == "RetiredEncryptionKey"
            assert key_id(OLD) in answer["words"]
            assert "restart" in answer["words"]
            assert OLD not in answer["words"]
    assert key_ids() == {key_id(NEW)}
    with under(OLD, NEW):
        with pytest.raises(CommandError, match="retired") as caught:
            call_command("rotate_agent_session_keys")
        assert caught.value.returncode == 1
    assert key_ids() == {key_id(NEW)}


def test_a_retired_key_writes_again_where_that_is_wanted() -> None:
    with under(OLD):
        fill(1)
    with under(NEW, OLD):
        rotate()
    with under(OLD, NEW):
        with pytest.raises(RetiredEncryptionKey, match=key_id(OLD)):
            private().sync.add_items([said("more")])
        assert "writes again" in rotate("--reinstate", key_id(OLD))
        assert "was not retired" in rotate("--reinstate", key_id(OLD))
        private().sync.add_items([said("more")])
        assert "it can be removed" in rotate()
    assert key_ids() == {key_id(OLD)}


def test_without_waiting_it_says_for_how_long_a_key_may_be_written_with() -> None:
    with under(OLD):
        fill(1)
    with under(NEW, OLD):
        with pytest.raises(CommandError, match="wait"):
            rotate("--wait=nan")
        told = refused("--wait=0")
        assert f"key {key_id(OLD)} may be written with for another 2 seconds" in told
        # The items themselves are done.
        assert key_ids() == {key_id(NEW)}
        assert "it can be removed" in rotate()


@one_database
def test_a_last_look_retires_nothing() -> None:
    """What was written until then is looked through only after a retirement."""
    with under(OLD):
        fill(1)
    with under(NEW, OLD):
        backend: Any = sessions["private"]
        retirement = Retirement(backend)
        eventually(lambda: not retirement.writers[key_id(OLD)].left)
        assert not retirement.look(retire=False)
        assert retirement.retired() == []
        assert retirement.look()
        assert retirement.retired() == [key_id(OLD)]


@one_database
def test_a_key_that_was_never_written_with_is_not_retired() -> None:
    """Step 1 of a rotation: the new key stands behind the old one."""
    with under(OLD, NEW):
        fill(1)
        told = rotate()
        assert "can be removed" not in told
        assert f"{key_id(NEW)}, with which no process has written" in told
    assert not KeyUse.objects.filter(key_id=key_id(NEW)).exists()
    with under(NEW, OLD):
        private().sync.add_items([said("more")])


def test_items_from_before_the_rows_retire_their_key_too() -> None:
    with under(OLD):
        fill(2)
    KeyUse.objects.all().delete()
    with under(NEW, OLD):
        assert f"nothing is under {key_id(OLD)}" in rotate()
    with under(OLD, NEW), pytest.raises(RetiredEncryptionKey):
        private().sync.add_items([said("lost")])


# -- who is held up between encrypting and storing -----------------------------------------


@pytest.mark.parametrize("command", ["write", "awrite"])
def test_the_next_rotation_finds_what_was_stored_after_its_key_was_retired(
    environment: Any, service: Service, tmp_path: Path, command: str
) -> None:
    with other_writer(environment, setting([OLD], STALLED)) as other:
        other.tell("write first")
        stall(other, f"{command} late", tmp_path)
        with under(NEW, OLD):
            rotate()
        (tmp_path / "gate").unlink()
        assert other.answer() == {"gave": None}
        assert other.tell("write more")["error"] == "RetiredEncryptionKey"
    assert texts(NEW, OLD)[-1] == "late"
    with under(NEW, OLD):
        assert "1 item of 1 session put under" in rotate()
    assert texts(NEW) == ["first", "late"]


def stall(other: Other, line: str, path: Path) -> None:
    """Start a write that stops before it is stored."""
    (path / "gate").touch()
    other.begin(line)
    eventually((path / "gate.reached").exists)


def test_a_permit_of_a_transaction_that_was_rolled_back_is_not_kept() -> None:
    with under(OLD):
        with transaction.atomic():
            fill(1)
            transaction.set_rollback(True)
        if connection.vendor == "sqlite":
            assert not KeyUse.objects.exists()
        fill(1)
        assert KeyUse.objects.get().key_id == key_id(OLD)
        with transaction.atomic():
            fill(2)
        fill(1)
    assert len(texts(OLD)) == 4


# -- the provider of keys -----------------------------------------------------------------


def file_setting(**options: Any) -> Any:
    return override_settings(AGENT_SESSIONS=setting(FROM_FILE, **options))


@one_database
def test_who_only_reads_learns_of_other_keys_too(service: Service) -> None:
    with under(NEW):
        fill(1)
    service.give(OLD, NEW)
    with file_setting():
        assert len(private().sync.get_items()) == 1
        service.give(OLD)
        with pytest.raises(UnknownEncryptionKey):
            again_and_again(private().sync.get_items)


@one_database
def test_a_provider_that_fails_is_bridged_for_a_while(service: Service) -> None:
    with file_setting():
        fill(1)
        service.path.unlink()
        fill(1)
        with pytest.raises(EncryptionError, match="provider of keys failed"):
            again_and_again(lambda: fill(1))
        written = SessionItem.objects.count()
        assert len(private().sync.get_items()) == written
        service.give(NEW, OLD)
        eventually(lambda: succeeds(lambda: fill(1)))
        assert json.loads(SessionItem.objects.latest("pk").data)["kid"] == key_id(NEW)


@one_database
def test_a_database_that_fails_is_bridged_for_a_while() -> None:
    ListBackend.histories.clear()
    with under(NEW, inner={"BACKEND": ListBackend}):
        fill(1)
        with connection.schema_editor() as editor:
            editor.delete_model(KeyUse)
        try:
            fill(1)
            with pytest.raises(StorageError, match="which encryption keys are in use"):
                again_and_again(lambda: fill(1))
            written = len(private().sync.get_items())
        finally:
            with connection.schema_editor() as editor:
                editor.create_model(KeyUse)
        fill(1)
        assert len(private().sync.get_items()) == written + 1 > 2


def again_and_again(call: Callable[[], Any]) -> None:
    """Call something until it fails, or for far too long."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        call()
        time.sleep(0.05)


def succeeds(call: Callable[[], Any]) -> bool:
    try:
        call()
    except EncryptionError:
        return False
    return True


asked: list[str] = []
given: list[str] = []


def slow_keys() -> list[str]:
    """Take a while, and say who asked."""
    asked.append(threading.current_thread().name)
    time.sleep(0.2)
    return given


@pytest.fixture
def slow() -> Iterator[None]:
    asked.clear()
    given[:] = [NEW]
    setting = encrypted(
        {"BACKEND": DATABASE}, keys=f"{__name__}.slow_keys", key_refresh=30
    )
    with override_settings(AGENT_SESSIONS=setting):
        yield


@one_database
async def test_many_tasks_ask_once_and_the_loop_goes_on(slow: None) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    writes = [private(f"s{n}").add_items([said("hi")]) for n in range(50)]
    await asyncio.gather(*writes)
    ticking.cancel()
    assert len(asked) == 1
    assert threading.main_thread().name not in asked or ticks > 5
    assert (await KeyUse.objects.aget()).takings == 1


@one_database
def test_many_threads_ask_once(slow: None) -> None:
    backend: Any = sessions["private"]
    threads = [threading.Thread(target=backend.source.get) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_a_process_counts_its_key_up_once_for_many_writes() -> None:
    with under(NEW, key_refresh=600):
        for _ in range(5):
            fill(1)
        sessions["private"].sealer.seal(SessionKey("s"), "text")
    row = KeyUse.objects.get()
    assert (row.backend, row.key_id, row.takings) == ("private", key_id(NEW), 1)
    assert row.seconds == 600


# -- backups -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["retired", "older", "gone"])
def test_a_backup_under_a_retired_key_is_read_and_rotated(rows: str) -> None:
    with under(OLD):
        fill(2)
    backup = list(SessionItem.objects.values_list("pk", "data", "size"))
    with under(NEW, OLD):
        rotate()
        for pk, data, size in backup:
            SessionItem.objects.filter(pk=pk).update(data=data, size=size)
        if rows == "older":
            KeyUse.objects.update(retired_at=None, takings=1)
        elif rows == "gone":
            KeyUse.objects.all().delete()
        assert len(private().sync.get_items()) == 2
        private().sync.add_items([said("more")])
        assert "2 items of 1 session put under" in rotate()
    assert len(texts(NEW)) == 3
    with under(OLD, NEW), pytest.raises(RetiredEncryptionKey):
        private().sync.add_items([said("lost")])


# -- rotations that are killed -------------------------------------------------------------


@one_database
def test_a_rotation_that_is_killed_at_any_statement_is_given_again(
    environment: Any,
) -> None:
    with under(OLD):
        fill(3)
        sealed = sessions["private"].sealer.seal(SessionKey("s"), "paused")
        row = AgentSession.objects.get()
        AgentRun.objects.create(session=row, run_id="r", state=sealed)
    # Long ago, so that a rotation retires the key after its first sweep.
    KeyUse.objects.update(seconds=0)
    killed = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.killed_rotation",
            json.dumps(setting([NEW, OLD])),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    points = [json.loads(line) for line in killed.stdout.splitlines()]
    assert [point["killed"] for point in points] == [*[True] * (len(points) - 1), False]
    assert len(points) > 8
    # After each kill both keys together read all, and the old one was not let go.
    assert all(point["items"] == 3 for point in points)
    assert not any(point["told"] for point in points[:-1])
    assert f"nothing is under {key_id(OLD)}" in points[-1]["told"]
    assert len(texts(NEW)) == 3
    run = AgentRun.objects.get()
    with under(NEW):
        assert sessions["private"].sealer.open(SessionKey("s"), run.state) == "paused"


# -- what belongs to no session's row -----------------------------------------------------


def lose_rows() -> None:
    """Remove sessions' rows as no code of ours does; histories lie in another store."""
    AgentSession.objects.update(branch=None)
    Branch.objects.all().delete()
    rows: Any = AgentSession.objects.all()
    rows._raw_delete(rows.db)


@one_database
def test_keys_of_sessions_without_a_row_are_rotated() -> None:
    ListBackend.histories.clear()
    inner = {"BACKEND": ListBackend}
    with under(OLD, inner=inner, session_keys=True):
        items = fill(2)
        lose_rows()
    with under(NEW, OLD, inner=inner, session_keys=True):
        assert "and 1 session key of 1 session put under" in rotate()
    assert SessionSecret.objects.get().key_id == key_id(NEW)
    with under(NEW, inner=inner, session_keys=True):
        assert private().sync.get_items() == items


@one_database
def test_histories_without_a_row_count_as_under_the_old_key() -> None:
    ListBackend.histories.clear()
    inner = {"BACKEND": ListBackend}
    with under(OLD, inner=inner):
        fill(2)
        lose_rows()
    with under(NEW, OLD, inner=inner):
        assert "private: 2 items under other keys" in refused()


@one_database
def test_session_keys_that_are_not_used_any_more_are_rotated() -> None:
    with under(OLD, session_keys=True):
        fill(1)
    with under(NEW, OLD):
        # Its items need the session's own key, which nobody looks up now.
        refused()
    assert SessionSecret.objects.get().key_id == key_id(NEW)
