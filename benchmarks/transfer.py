"""What an import and a copy cost: seconds, and statements of the database.

`python -m benchmarks.transfer --database postgresql`: half of the items are one long
session's, half lie in short sessions of 50. They are imported from a file, copied to
Redis and to another alias, and each once more, when nothing is new.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.db import connection
from django.test import override_settings

from benchmarks.database import database
from benchmarks.items import history
from tests.servers.redis import redis, url

SHORT = 50
_DATABASE = {"BACKEND": "agent_sessions.backends.database.DatabaseBackend"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.transfer")
    parser.add_argument(
        "--database", choices=("postgresql", "sqlite"), default="postgresql"
    )
    parser.add_argument("--items", type=int, default=20_000)
    return parser.parse_args(argv)


def lines(items: int) -> Iterator[str]:
    """Return the lines of an export."""
    sizes = {"long": items // 2}
    sizes |= {f"short-{number}": SHORT for number in range(items // 2 // SHORT)}
    for session_id, size in sizes.items():
        values: list[dict[str, Any]] = [
            {
                "format": "agent-sessions/1",
                "session": {"id": session_id},
                "branches": [{"name": "main"}],
                "runs": [],
            },
            *(
                {"branch": "main", "position": number, "turn": 1, "item": item}
                for number, item in enumerate(history(size), 1)
            ),
            {"items": size},
        ]
        yield from (f"{json.dumps(value)}\n" for value in values)


def measure(name: str, *args: str) -> None:
    """Call a command twice, and print what it took."""
    for when in ("", "again"):
        statements = 0

        def count(execute: Any, *given: Any) -> Any:
            nonlocal statements
            statements += 1
            return execute(*given)

        began = time.perf_counter()
        with connection.execute_wrapper(count):
            call_command(*args, stdout=io.StringIO(), stderr=io.StringIO())
        took = time.perf_counter() - began
        print(f"{name:8} {when:6} {took:8.2f} s {statements:8,} statements", flush=True)


def main() -> None:
    """Make the data, and measure."""
    options = arguments()
    with ExitStack() as stack:
        enter = stack.enter_context
        folder = Path(enter(tempfile.TemporaryDirectory()))
        server = enter(redis("valkey"))
        enter(database(options.database))
        remote = {
            "BACKEND": "agent_sessions.backends.redis.RedisBackend",
            "OPTIONS": {"url": url(server)},
        }
        aliases = {"default": _DATABASE, "second": _DATABASE, "redis": remote}
        enter(override_settings(AGENT_SESSIONS=aliases))
        path = folder / "export.jsonl"
        with path.open("w") as file:
            file.writelines(lines(options.items))
        measure("import", "import_agent_sessions", "export", "--from", str(path))
        for alias in ("redis", "second"):
            to = ("--all", "--from=default", f"--to={alias}")
            measure(f"{alias}", "copy_agent_sessions", *to)


if __name__ == "__main__":
    main()
