"""Keep contents and keys out of error reports: Django's, Sentry's, a debugger's.

A report shows the local variables of each frame that an error came through, and the
text of each error in its chain. So an error that leaves one of our doors leaves the
variables behind, and an error of a driver or a store, whose text may quote what it was
given, is replaced by one of ours instead of being chained.
"""

from __future__ import annotations

from agent_sessions.reports.databases import as_storage_error, told
from agent_sessions.reports.guards import (
    clear,
    drop_frame,
    guard_methods,
    guard_public_methods,
    guarded,
    leave,
    place_of,
    unwrapped,
)

__all__ = [
    "as_storage_error",
    "clear",
    "drop_frame",
    "guard_methods",
    "guard_public_methods",
    "guarded",
    "leave",
    "place_of",
    "told",
    "unwrapped",
]
