"""A database's server is killed in mid-write, and comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.servers.lasting import ROOT, mortal_database
from tests.servers.mortal import Mortal
from tests.settings import DATABASE_KIND

# The server's death follows this many acknowledged batches.
BEFORE = 60

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(DATABASE_KIND == "sqlite", reason="SQLite has no server"),
]


def test_a_server_is_killed_in_mid_write() -> None:
    """What was acknowledged is there, the rest was an error, and work goes on.

    The same session object, in the same process and loop, writes again as soon as the
    server is back.
    """
    with mortal_database(DATABASE_KIND) as (server, environment):
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.support.restarted_writer"],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            told = watch(writer, server)
        finally:
            writer.kill()
            writer.communicate()
    acknowledged, failed = told["acknowledged"], told["failed"]
    items = told["items"]
    stored = [item["batch"] for item in items[::4]]
    assert items == [{"batch": name, "n": n} for name in stored for n in range(4)]
    assert len(set(stored)) == len(stored)
    # A commit's answer may be what was lost: then the batch is there as a whole.
    assert set(acknowledged) <= set(stored) <= {*acknowledged, *failed}
    assert len(acknowledged) > BEFORE


def watch(writer: subprocess.Popen[str], server: Mortal) -> dict[str, list[Any]]:
    """Kill the server among the writes, bring it back at the first error."""
    stored = 0
    is_down = False
    assert writer.stdout is not None
    for line in writer.stdout:
        if line == "stored\n":
            stored += 1
            if stored == BEFORE:
                server.kill()
                is_down = True
        elif line == "failed\n":
            if is_down:
                server.start()
                is_down = False
        else:
            found: dict[str, list[Any]] = json.loads(line)
            return found
    raise AssertionError("the writer ended before its report")
