"""Translate between the SDK and AG-UI 1.0: pure functions, no Django, no I/O."""

from __future__ import annotations

from agent_sessions.agui.calls import (
    add_pending_calls,
    call_id_of,
    calls_of,
    interrupts,
    output_call_id,
)
from agent_sessions.agui.content import StreamOptions, capabilities
from agent_sessions.agui.events import (
    LAST,
    EventMapper,
    OpenRun,
    merge,
    run_error,
    run_finished,
    run_started,
    snapshot,
    token_usage,
)
from agent_sessions.agui.frames import (
    SYNC_PREFIX,
    AbortRequest,
    AnyRequest,
    FrameError,
    RunRequest,
    SwitchRequest,
    SyncRequest,
    links_images,
    parse_frame,
    parse_request,
    user_items,
)
from agent_sessions.agui.messages import messages_from_items

__all__ = [
    "LAST",
    "SYNC_PREFIX",
    "AbortRequest",
    "AnyRequest",
    "EventMapper",
    "FrameError",
    "OpenRun",
    "RunRequest",
    "StreamOptions",
    "SwitchRequest",
    "SyncRequest",
    "add_pending_calls",
    "call_id_of",
    "calls_of",
    "capabilities",
    "interrupts",
    "links_images",
    "merge",
    "messages_from_items",
    "output_call_id",
    "parse_frame",
    "parse_request",
    "run_error",
    "run_finished",
    "run_started",
    "snapshot",
    "token_usage",
    "user_items",
]
