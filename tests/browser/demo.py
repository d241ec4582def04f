"""The demo as a process of its own, to start, kill and start again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

PROJECT = Path(__file__).resolve().parents[2]
PASSWORD = "correct horse"
MAKE_USERS = """
import json, sys, django
django.setup()
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.hashers import make_password
from django.test import Client
User, hashed, cookies = get_user_model(), make_password(sys.argv[1]), {}
for name in sys.argv[2:]:
    client = Client()
    client.force_login(User.objects.create(username=name, password=hashed))
    cookies[name] = client.cookies[settings.SESSION_COOKIE_NAME].value
print(json.dumps(cookies))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Demo:
    """``python -m example_project.demo`` with a folder and a port of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.output = folder / "output.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.cookies: dict[str, str] = {}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "DJANGO_", "DEMO_", "AGENT_SESSIONS_"))
        }
        self.environment = kept | {
            "DEMO_FOLDER": str(folder),
            "DJANGO_SETTINGS_MODULE": "example_project.settings",
            "PORT": str(self.port),
            **environment,
        }

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "example_project.demo"],
                cwd=PROJECT,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 60
        while True:
            code = self.process.poll()
            assert code is None, f"exit {code}: {self.output.read_text()}"
            assert time.monotonic() < deadline, self.output.read_text()
            try:
                with urlopen(f"{self.url}/login/", timeout=30) as response:
                    assert response.status == 200
                    return
            except (URLError, ConnectionError):
                time.sleep(0.1)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal and return the exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(timeout=20)

    def make_users(self, *names: str) -> None:
        """Make users with a password, and log each one in."""
        self.cookies.update(json.loads(self.run("-c", MAKE_USERS, PASSWORD, *names)))

    def run(self, *arguments: str) -> str:
        """Run Python on the same folder and return what it printed."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    @property
    def passwords(self) -> dict[str, str]:
        kept: dict[str, str] = json.loads((self.folder / "passwords.json").read_text())
        return kept
