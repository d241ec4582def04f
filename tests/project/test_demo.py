"""`make demo` from a clean clone to a served page, in one command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# pip's downloads are most of it.
PATIENCE = 300


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    path = tmp_path / "clone"
    # Git refuses to clone what another user owns, such as a checkout in a container.
    config = tmp_path / "gitconfig"
    config.write_text("[safe]\n\tdirectory = *\n")
    subprocess.run(
        ["git", "clone", "--quiet", "--no-hardlinks", ROOT, path],
        env=os.environ | {"GIT_CONFIG_GLOBAL": str(config)},
        check=True,
    )
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number: int = sock.getsockname()[1]
    return number


@pytest.fixture
def demo(clone: Path, port: int, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    output = tmp_path / "output"
    env = {key: value for key, value in os.environ.items() if "DJANGO" not in key}
    with output.open("w") as file:
        process = subprocess.Popen(
            ["make", "demo"],
            cwd=clone,
            env=env | {"PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield port, output
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_make_demo_serves_the_page_and_says_how_to_log_in(
    demo: tuple[int, Path],
) -> None:
    port, output = demo
    page = fetch(f"http://127.0.0.1:{port}/", output)
    assert "username" in page
    said = output.read_text()
    assert f"http://127.0.0.1:{port}" in said
    assert "user 'demo', password '" in said
    assert "user 'admin', password '" in said
    assert "Demo model" in said


def fetch(url: str, output: Path) -> str:
    """Fetch a page as soon as it is there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                assert response.status == 200
                text: str = response.read().decode()
                return text
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"nothing is served:\n{output.read_text()}")


@pytest.mark.parametrize("wanted", ["0", "65536", "²", "-1", "x", "9" * 5_000])
def test_a_port_that_is_none_is_named(wanted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "example_project.demo"],
        cwd=ROOT,
        env=os.environ | {"PORT": wanted},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"PORT must be a number from 1 to 65535, not {wanted!r}.\n"
