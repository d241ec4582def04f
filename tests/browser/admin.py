"""A site with the admin as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from playwright.sync_api import BrowserContext, Page

from tests.browser.demo import PROJECT, free_port


class AdminSite:
    """Django's own server, on a new database filled by admin_data."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "output.txt"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "DJANGO_", "AGENT_SESSIONS_"))
        }
        self.environment = kept | {
            "DJANGO_SETTINGS_MODULE": settings,
            "AGENT_SESSIONS_TEST_NAME": str(folder / "db.sqlite3"),
        }
        made = self._run("-m", "tests.browser.admin_data")
        self.pages: dict[str, str] = made["pages"]
        self.cookie: str = made["cookie"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        serve = ("-m", "django", "runserver", "--noreload", f"127.0.0.1:{self.port}")
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *serve],
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
                with urlopen(f"{self.url}/admin/login/", timeout=30):
                    return
            except HTTPError:
                raise
            except (URLError, ConnectionError):
                time.sleep(0.1)

    def end(self) -> None:
        """Stop it."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(timeout=20)

    def open(self, context: BrowserContext, page: str, query: str = "") -> Page:
        """Open a page as the superuser."""
        context.add_cookies(
            [{"name": "sessionid", "value": self.cookie, "url": self.url}]
        )
        tab = context.new_page()
        response = tab.goto(self.url + self.pages[page] + query)
        assert response is not None
        assert response.status == 200
        return tab

    def _run(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=self.environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found
