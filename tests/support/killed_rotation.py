"""Rotations that are killed before each of their statements in turn, for tests.

`python -m tests.support.killed_rotation SETTING` reads AGENT_SESSIONS as JSON and lets a child
rotate until it ends by itself. It prints a line of JSON for each: whether it was killed,
what it said of keys, and how many items can be read then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from io import StringIO

import django

from tests.support.killed_writer import dies_before


def main() -> None:
    from django.core.management import call_command
    from django.db import connections

    from agent_sessions import get_session

    point, killed = 0, True
    while killed:
        connections.close_all()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            out = StringIO()
            dies_before(point)
            call_command("rotate_agent_session_keys", "--batch-size=2", stdout=out)
            os.write(writing, out.getvalue().encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status:
            sys.exit(f"a child failed with status {status}")
        items = get_session("s", backend="private").sync.get_items()
        line = {"killed": killed, "told": told, "items": len(items)}
        sys.stdout.write(json.dumps(line) + "\n")
        point += 1


if __name__ == "__main__":
    django.setup()
    from django.test import override_settings

    with override_settings(AGENT_SESSIONS=json.loads(sys.argv[1])):
        main()
