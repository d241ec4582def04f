"""Find and remove sessions by their row: what the admin and the commands do.

They are trusted: the row says whose session it is, nobody asks who wants it.
"""

from __future__ import annotations

from agent_sessions.retention.removal import (
    Removal,
    Spared,
    finish_later,
    finish_removals,
    foresee,
    remove,
    remove_all,
    store_of,
    unfinished_items,
)
from agent_sessions.retention.selection import (
    Selection,
    Totals,
    databases,
    has_retention,
)

__all__ = [
    "Removal",
    "Selection",
    "Spared",
    "Totals",
    "databases",
    "finish_later",
    "finish_removals",
    "foresee",
    "has_retention",
    "remove",
    "remove_all",
    "store_of",
    "unfinished_items",
]
