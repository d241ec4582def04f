"""A process that writes to encrypted sessions while their keys are changed, for tests.

`python -m tests.support.key_writer SETTING` reads AGENT_SESSIONS as JSON and obeys lines of
standard input: `write TEXT`, `awrite TEXT`, `read`, `begin`, `commit`, `busy` and
`rest`. It answers each with a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import django

# Where keys_from_file() reads, and what holds up StalledDatabase while it is there.
KEYS = "AGENT_SESSIONS_TEST_KEYS"
GATE = "AGENT_SESSIONS_TEST_GATE"


def keys_from_file() -> Any:
    """Stand in for a key management service, as a project would write it."""
    return json.loads(Path(os.environ[KEYS]).read_text())


def said(text: str) -> Any:
    return {"role": "user", "content": text}


class Writer:
    """The commands."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._told: dict[str, Any] = {}

    def obey(self, command: str, text: str) -> Any:
        from django.db import transaction

        if command == "write":
            self.session().sync.add_items([said(text)])
        elif command == "awrite":
            asyncio.run(self.session().add_items([said(text)]))
        elif command == "read":
            return [item["content"] for item in self.session().sync.get_items()]
        elif command == "begin":
            self._open.enter_context(transaction.atomic())
        elif command == "commit":
            self._open.close()
        elif command == "busy":
            self._thread = threading.Thread(target=self._write)
            self._thread.start()
        elif command == "rest":
            assert self._thread
            self._stop.set()
            self._thread.join()
            return self._told
        return None

    def session(self) -> Any:
        from agent_sessions import get_session

        return get_session("s", backend="private")

    def _write(self) -> None:
        done: list[str] = []
        error = ""
        while not self._stop.is_set() and not error:
            try:
                self.session().sync.add_items([said(f"busy {len(done)}")])
                done.append(f"busy {len(done)}")
            except Exception as exc:
                error = type(exc).__name__
            time.sleep(0.02)
        self._told = {"written": done, "error": error}


def main() -> None:
    writer = Writer()
    for line in sys.stdin:
        command, _, text = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        try:
            answer["gave"] = writer.obey(command, text)
        except Exception as exc:
            answer = {"error": type(exc).__name__, "words": str(exc)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class Other:
    """Such a process, as a test sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def begin(self, line: str) -> None:
        """Send it a command without waiting for its answer."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for an answer."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the other process ended"
        return json.loads(line)

    def tell(self, line: str) -> Any:
        """Send it a command and return its answer."""
        self.begin(line)
        return self.answer()


@contextmanager
def other_writer(environment: dict[str, str], setting: Any) -> Iterator[Other]:
    """Run such a process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.key_writer", json.dumps(setting)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        yield Other(process)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


if __name__ == "__main__":
    django.setup()
    from django.test import override_settings

    with override_settings(AGENT_SESSIONS=json.loads(sys.argv[1])):
        main()
