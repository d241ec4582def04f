"""What a run is made of, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent_sessions.agui import StreamOptions

if TYPE_CHECKING:
    from agents import Agent, RunConfig

    from agent_sessions.runs.active import ActiveRun


@dataclass(frozen=True, slots=True)
class RunLimits:
    """How long a run may take, wait and be kept; durations in seconds."""

    # None leaves it to the SDK's default.
    max_turns: int | None = None
    run_timeout: float = 600
    # A run that nobody listens to is cancelled after its turn.
    detach_timeout: float = 60
    heartbeat: float = 20
    stale_after: float = 60
    # How long an ended run's events are kept for replays.
    keep_log: float = 120
    log_events: int = 2_000
    log_bytes: int = 1_000_000
    # Text deltas are joined for so long, or up to so many characters.
    merge_interval: float = 0.05
    merge_size: int = 1024
    approval_timeout: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class RunSetup:
    """The agent and everything else that one run gets."""

    agent: Agent[Any]
    context: Any = None
    run_config: RunConfig | None = None
    options: StreamOptions = field(default_factory=StreamOptions)
    limits: RunLimits = field(default_factory=RunLimits)
    # Called with the run and its error once it has failed, plain or async.
    on_error: Callable[[ActiveRun, Exception], Any] | None = None


def find_agent(root: Agent[Any], name: str) -> Agent[Any]:
    """Find the agent that spoke last among those `root` can hand off to.

    Gives `root` where none has that name, so a renamed agent starts afresh.
    """
    pending, seen = [root], set()
    while pending:
        agent = pending.pop(0)
        if agent.name == name:
            return agent
        if id(agent) in seen:
            continue
        seen.add(id(agent))
        for target in agent.handoffs:
            reference = getattr(target, "_agent_ref", None)
            found: Any = target if reference is None else reference()
            if hasattr(found, "handoffs"):
                pending.append(found)
    return root
