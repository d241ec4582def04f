"""``python -m example_project.demo`` as a command: ports, passwords, its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser.demo import PROJECT, Demo


def run(demo: Demo) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "example_project.demo"],
        cwd=PROJECT,
        env=demo.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_port_in_use_is_said_before_anything_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    demo = Demo(folder)
    with socket.socket() as other:
        other.bind(("127.0.0.1", demo.port))
        other.listen()
        done = run(demo)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"Port {demo.port} is in use by another program: "
        "choose another with PORT=8123 make demo.\n"
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("port", ["eighty", "0", "65536", "-1", "80 80"])
def test_a_port_that_is_none_is_said(tmp_path: Path, port: str) -> None:
    done = run(Demo(tmp_path, PORT=port))
    assert done.returncode == 1
    assert done.stderr == f"PORT must be a number from 1 to 65535, not {port!r}.\n"


def test_it_ends_cleanly_and_keeps_its_secrets(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.start()
    secrets = {path: path.read_text() for path in tmp_path.glob("[ps]*")}
    assert {path.name for path in secrets} == {"passwords.json", "secret_key"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    assert (tmp_path / ".gitignore").read_text() == "*\n"
    assert demo.end(signal.SIGINT) == 0
    assert demo.output.read_text().endswith("Stopped.\n")
    assert "Traceback" not in demo.output.read_text()
    demo.start()
    demo.end()
    assert secrets == {path: path.read_text() for path in secrets}
