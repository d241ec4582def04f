"""Take frames to the sockets of other processes, over the channel layer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import deque
from typing import Any

from agent_sessions.backends.processes import this_process
from agent_sessions.runs.conversation import Conversation
from agent_sessions.runs.log import Frame

logger = logging.getLogger("agent_sessions.runs")

FRAME = "agent_sessions.frame"
ABORT = "agent_sessions.abort"


def group_of(conversation: Conversation) -> str:
    """Name the group of a conversation and its owner.

    The owner is in it: a session id that is deleted may be taken by somebody else while
    sockets of the first owner are open. Group names allow few characters and under 100
    of them; session ids more of both.
    """
    key = conversation.key
    owner = None if key.user_id is None else str(key.user_id)
    parts = [conversation.backend.alias, conversation.pk, owner, key.session_id]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"agent_sessions.{digest[:40]}"


class ChannelRelay:
    """Send frames to the channel layer in their order, without holding up a run.

    What a slow layer can't take is dropped: receivers notice by the numbers.
    """

    def __init__(self, layer: Any, *, limit: int = 1_000) -> None:
        self.layer = layer
        self._queue: deque[tuple[str, dict[str, Any]]] = deque(maxlen=limit)
        self._task: asyncio.Task[None] | None = None

    def __call__(self, conversation: Conversation, frame: Frame) -> None:
        """Send a frame to the sockets of other processes."""
        self.send(
            conversation,
            {
                "type": FRAME,
                "run_id": frame.run_id,
                "number": frame.number,
                "event": frame.event,
            },
        )

    def abort(self, conversation: Conversation, run_id: str, mode: str) -> None:
        """Ask the process that has a run to stop it."""
        self.send(conversation, {"type": ABORT, "run_id": run_id, "mode": mode})

    def send(self, conversation: Conversation, message: dict[str, Any]) -> None:
        """Queue a message for the group of a conversation."""
        self._queue.append(
            (group_of(conversation), {**message, "origin": this_process()})
        )
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        while self._queue:
            group, message = self._queue.popleft()
            try:
                await self.layer.group_send(group, message)
            except Exception as exc:
                # Other processes catch up by a sync; the run itself must go on.
                logger.warning(
                    "The channel layer refused a frame (%s). Check CHANNEL_LAYERS.",
                    type(exc).__name__,
                )
