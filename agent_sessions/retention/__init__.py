"""Find and remove sessions by their row: what the admin and the commands do.

They are trusted: the row says whose session it is, nobody asks who wants it.
"""

from __future__ import annotations

from agent_sessions.retention.removal import Removal as Removal
from agent_sessions.retention.removal import Spared as Spared
from agent_sessions.retention.removal import finish_later as finish_later
from agent_sessions.retention.removal import finish_removals as finish_removals
from agent_sessions.retention.removal import foresee as foresee
from agent_sessions.retention.removal import remove as remove
from agent_sessions.retention.removal import remove_all as remove_all
from agent_sessions.retention.removal import store_of as store_of
from agent_sessions.retention.removal import unfinished_items as unfinished_items
from agent_sessions.retention.selection import Selection as Selection
from agent_sessions.retention.selection import has_retention as has_retention
