"""Find, read, clear and delete sessions by their row: what the admin and commands do.

They are trusted: the row says whose session it is, nobody asks who wants it.
"""

from __future__ import annotations

from agent_sessions.retention.removal import (
    Removal,
    Spared,
    count_trimmed,
    finish_removals,
    remove,
    trim,
    unfinished_items,
    why_spared,
)
from agent_sessions.retention.rows import (
    clear,
    delete,
    is_waiting,
    read_page,
    store_of,
)
from agent_sessions.retention.selection import Selection, Totals, has_retention

__all__ = [
    "Removal",
    "Selection",
    "Spared",
    "Totals",
    "clear",
    "count_trimmed",
    "delete",
    "finish_removals",
    "has_retention",
    "is_waiting",
    "read_page",
    "remove",
    "store_of",
    "trim",
    "unfinished_items",
    "why_spared",
]
