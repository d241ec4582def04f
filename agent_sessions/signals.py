"""Signals that agent_sessions sends, after commit, with ids and counts.

Each is a record of the logger `agent_sessions.signals` too, at level INFO. Each has `session_id`, `backend` (the alias) and `user_id`; docs/reference.md has the rest.
"""

from __future__ import annotations

import logging
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


_NAMES = {
    signal: name for name, signal in globals().items() if isinstance(signal, Signal)
}
logger = logging.getLogger("agent_sessions.signals")


def is_heard(signal: Signal, sender: type) -> bool:
    """Return whether a signal has receivers, or is logged."""
    return signal.has_listeners(sender) or logger.isEnabledFor(logging.INFO)


def announce(signal: Signal, sender: type, using: str, **arguments: Any) -> None:
    """Send a signal once what the running thread has written is committed.

    A receiver that raises harms nothing: Django logs it.
    """
    if is_heard(signal, sender):
        send = partial(_send, signal, sender, arguments)
        if connections[using].in_atomic_block:
            transaction.on_commit(send, using=using)
        else:
            # Django would connect, and fail where the database has just gone away.
            send()


def _send(signal: Signal, sender: type, arguments: dict[str, Any]) -> None:
    logger.info(_NAMES[signal], extra=arguments)
    signal.send_robust(sender, **arguments)
