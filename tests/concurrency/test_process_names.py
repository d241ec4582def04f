"""Which process holds a run, and whether it is known to have ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_sessions.backends.leases import _host, is_dead, this_process

LINUX = sys.platform == "linux"
NAME_AND_WAIT = """
from agent_sessions.backends.leases import this_process
print(this_process(), flush=True)
input()
"""

pytestmark = [
    pytest.mark.one_database,
    pytest.mark.skipif(not LINUX, reason="needs /proc"),
]


@contextmanager
def process(*prefix: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run another process; give what it calls itself."""
    running = subprocess.Popen(
        [*prefix, sys.executable, "-c", NAME_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    try:
        yield running.stdout.readline().strip(), running
    finally:
        running.kill()
        running.communicate()


def test_a_process_that_runs_is_not_dead_and_one_that_was_killed_is() -> None:
    with process() as (owner, running):
        assert owner.split(":")[1] == str(running.pid)
        assert not is_dead(owner)
        running.kill()
        running.wait()
        assert is_dead(owner)


def test_a_process_whose_end_nobody_has_asked_for_is_dead() -> None:
    """A container's first process often doesn't wait for its children."""
    with process() as (owner, running):
        running.kill()
        deadline = time.monotonic() + 30
        while not is_dead(owner) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_dead(owner)


def test_a_pid_that_another_process_has_got_is_dead() -> None:
    with process() as (owner, running):
        host, pid, rest = owner.split(":")
        start, _, token = rest.partition("-")
        assert is_dead(f"{host}:{pid}:{int(start) - 1}-{token}")
        # Where no start was written down, the pid alone tells.
        assert not is_dead(f"{host}:{pid}:{token}")
        assert running.poll() is None


def test_a_forked_child_does_not_pass_for_its_parent() -> None:
    parent = this_process()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, this_process().encode())
        os._exit(0)
    os.waitpid(child, 0)
    name = os.read(reading, 200).decode()
    os.close(reading)
    os.close(writing)
    assert name.split(":")[:2] == [parent.split(":")[0], str(child)]
    assert is_dead(name)


def test_an_earlier_process_of_this_pid_is_dead() -> None:
    host, pid, _ = this_process().split(":")
    assert is_dead(f"{host}:{pid}:othertoken")
    assert not is_dead(this_process())


_asked: list[object] = []


@pytest.fixture(scope="module")
def _kills() -> None:
    # Python tells hooks of each os.kill(); they can't be taken away again.
    sys.addaudithook(
        lambda event, args: _asked.append(args) if event == "os.kill" else None
    )


@pytest.mark.usefixtures("_kills")
@pytest.mark.parametrize(
    "pid",
    [
        "0", "-1", "+1", "-0", "00", "007", "", " 1", "1 ", "1.0", "1e3", "0x1", "²",
        "\u0661", "2147483648", "4294967295", "99999999999999999999", "9" * 400, "x",
        "None", f"-{os.getpgrp()}",
    ],
)  # fmt: skip
def test_a_row_that_was_edited_makes_nobody_ask(pid: str) -> None:
    """0 and below are process groups; the others are no pid at all."""
    host = this_process().partition(":")[0]
    is_dead(f"{host}:2147483647:1-abcdefabcdef")
    assert _asked.pop() == (2147483647, 0)
    assert not is_dead(f"{host}:{pid}:1-abcdefabcdef")
    assert not is_dead(f"{host}:{pid}")
    assert not _asked


@pytest.mark.parametrize(
    "owner", ["", ":", "::", "x", "a:b", "elsewhere:1:x", "🦊:1:x"]
)
def test_who_can_not_be_read_is_not_called_dead(owner: str) -> None:
    assert not is_dead(owner)


# -- the host --------------------------------------------------------------------------


def proc(folder: Path, boot: str, namespace: str) -> Path:
    (folder / "sys/kernel/random").mkdir(parents=True)
    (folder / "sys/kernel/random/boot_id").write_text(boot + "\n")
    (folder / "self/ns").mkdir(parents=True)
    (folder / "self/ns" / namespace).touch()
    (folder / "self/ns/pid").symlink_to(namespace)
    return folder


def test_all_processes_of_a_host_call_it_the_same() -> None:
    with process() as (one, _), process() as (two, _):
        assert one.split(":")[0] == two.split(":")[0] == this_process().split(":")[0]


def test_containers_of_one_image_are_hosts_of_their_own(tmp_path: Path) -> None:
    """They share a boot, a hostname perhaps, and a machine id."""
    name = _host.__wrapped__
    one = name(proc(tmp_path / "one", "boot", "a"))
    two = name(proc(tmp_path / "two", "boot", "b"))
    assert one == name(tmp_path / "one")
    assert one != two
    assert name(proc(tmp_path / "new", "again", "a")) != one


def test_where_namespaces_can_not_be_told_apart_nobody_is_looked_up(
    tmp_path: Path,
) -> None:
    name = _host.__wrapped__
    assert name(tmp_path) != name(tmp_path)


def test_a_process_of_another_pid_namespace_is_not_judged() -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    able = subprocess.run([*unshare, "true"], capture_output=True, check=False)
    if able.returncode:
        pytest.skip(f"no right to unshare: {able.stderr.decode().strip()}")
    with process(*unshare) as (owner, _):
        host, pid, _ = owner.split(":")
        # Its first process, which is somebody else's number here.
        assert int(pid) < 100
        assert host != this_process().split(":")[0]
        assert not is_dead(owner)
        # Without a /proc of its own, numbers there are not what it is called.
        assert "-" not in owner
