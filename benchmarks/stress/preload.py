"""What multiprocessing's fork server imports once, so that children start at once."""

from __future__ import annotations

import os

import django

# The SDK reads it when it is imported.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

if "AGENT_SESSIONS_TEST_NAME" in os.environ:
    django.setup()
    import agent_sessions.memory  # noqa: F401
else:
    # Which database it will be, each child is told.
    import agents.memory  # noqa: F401
