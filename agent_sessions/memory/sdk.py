"""What is private in the SDK, and used: all of it, and only here.

A test pins each name. OpenAIResponsesCompactionSession has no other way to compact
items that somebody else reads and writes; without it nothing is compacted, and the
history stays whole.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("agent_sessions.sessions")


async def begin_conversation(session: Any) -> str:
    """Return the id of a session's remote conversation, which is made if need be."""
    return await session._get_session_id()  # type: ignore[no-any-return]


async def run_compaction(session: Any, args: Any, **options: Any) -> None:
    """Compact what a compacting session holds, as the SDK does after a response.

    Options are `read_items`, `prepare_items` and `read_snapshot`, functions that stand
    for the session's own, and `wrapper`, the context of the run.
    """
    if _has(session, "_run_compaction"):
        await session._run_compaction(args, **options)


async def defer_compaction(
    session: Any, response_id: str, store: bool | None, *, read_items: Any
) -> None:
    """Note that a compaction is due after a turn, as the SDK does."""
    if _has(session, "_defer_compaction"):
        await session._defer_compaction(response_id, store, read_items=read_items)


def handoff_target(handoff: Any) -> Any:
    """Return the agent that a handoff leads to; None where that can't be told."""
    reference = getattr(handoff, "_agent_ref", None)
    return None if reference is None else reference()


def _has(session: Any, name: str) -> bool:
    found = hasattr(session, name)
    if not found:
        logger.warning(
            "Encrypted items are not compacted: %s has no %s() in this release of "
            "openai-agents.",
            type(session).__name__,
            name,
        )
    return found
