"""Signals that agent_sessions sends, after commit, with ids and counts.

Each has `session_id`, `backend` (the alias) and `user_id`; docs/reference.md has the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from django.db import connections, transaction
from django.dispatch import Signal

session_created = Signal()
items_added = Signal()
session_cleared = Signal()
run_started = Signal()
run_finished = Signal()
approval_requested = Signal()
approval_answered = Signal()


def announce(signal: Signal, sender: type, using: str, **arguments: Any) -> None:
    """Send a signal once what the running thread has written is committed.

    A receiver that raises harms nothing: Django logs it.
    """
    if signal.has_listeners(sender):
        send = partial(signal.send_robust, sender, **arguments)
        if connections[using].in_atomic_block:
            transaction.on_commit(send, using=using)
        else:
            # Django would connect, and fail where the database has just gone away.
            send()
