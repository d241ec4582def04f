"""The SDK's private hooks for crash-safe compaction.

OpenAIResponsesCompactionSession asks the session that it wraps for them
(agents/memory/openai_responses_compaction_session.py, 0.24). Without them it reads,
clears and adds, and a crash between loses the history. Their names are the SDK's own
business: a test pins them for each release, and where they change the session works on
without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent_sessions.backends.database import compaction
from agent_sessions.items import encode_batch
from agent_sessions.memory.base import BackendSession
from agent_sessions.memory.branches import BranchingSession
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    from agents.items import TResponseInputItem


class CompactableSession(BranchingSession):
    """A session whose tail can be replaced in one transaction."""

    @guarded
    async def _get_compaction_snapshot(
        self,
        limit: int,
        *,
        prune_prefix: Callable[[Any], bool] | None = None,
    ) -> Any:
        """Read the newest `limit` items, and how to replace them.

        Returns None where it can't be done safely.

        What lies before an unreadable row stays where it is, and the row too.
        `prune_prefix` names items that a wrapper has expired and hides anyway: they are
        left where they are.
        """
        try:
            from agents.memory.session import _CompactionSnapshot as Snapshot
        except ImportError:
            return None
        if not self._stores_plain_items():
            return None
        tail = await self._backend.aask(
            self.key, lambda branches: compaction.read_tail(branches, limit)
        )
        if tail is None:
            return None

        async def replace_suffix(start: int, output: list[TResponseInputItem]) -> bool:
            batch = encode_batch(output)
            return await self._backend.achange(
                self.key,
                lambda branches: compaction.swap_tail(branches, tail, start, batch),
            )

        items: list[Any] = list(tail.items)
        return Snapshot(items, tail.complete, replace_suffix)

    @guarded
    async def _atomic_replace_items(self, items: list[TResponseInputItem]) -> bool:
        """Replace the whole history in one transaction."""
        if not self._stores_plain_items():
            return False
        batch = encode_batch(items)
        return await self._backend.achange(
            self.key, lambda branches: compaction.swap_all(branches, batch)
        )

    def _stores_plain_items(self) -> bool:
        """Return whether no subclass changes items on their way in or out."""
        kind = type(self)
        return (
            kind.add_items is BackendSession.add_items
            and kind.get_items is BranchingSession.get_items
        )
