"""Token usage: the SDK's figures of a run, as rows keep them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from agents import Agent, RunConfig, Trace
    from agents.run_context import RunContextWrapper
    from agents.usage import Usage

    from agent_sessions.models import AgentRun

# The columns that the session's row has too.
COUNTERS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
)
DETAILS = ("input_tokens_details", "output_tokens_details")


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run used: the columns of its row, and details without a column."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, usage: Usage) -> Spent:
        """Copy the figures of the SDK's object, which goes on counting."""
        from agents.usage import serialize_usage

        details = serialize_usage(usage)
        for name in DETAILS:
            # The SDK writes zeros also where there are no details.
            if getattr(usage, name) is None:
                details[name] = []
        return cls(
            usage.requests or 0,
            usage.input_tokens or 0,
            usage.output_tokens or 0,
            getattr(usage.input_tokens_details, "cached_tokens", 0) or 0,
            getattr(usage.output_tokens_details, "reasoning_tokens", 0) or 0,
            usage.total_tokens or 0,
            details,
        )

    def columns(self) -> dict[str, Any]:
        """Return the columns of a run's row."""
        return {
            **self.counters(),
            "total_tokens": self.total_tokens,
            "usage": self.details,
        }

    def counters(self) -> dict[str, int]:
        """Return the columns that are counted on the session's row."""
        return {name: getattr(self, name) for name in COUNTERS}


def since(usage: Usage, before: Usage | None) -> Usage:
    """Return what was used since `before`.

    A resumed run counts on from what its first part used.
    """
    from agents.usage import Usage, deserialize_usage, serialize_usage

    if before is None:
        before = Usage()
    now, then = serialize_usage(usage), serialize_usage(before)
    entries = usage.request_usage_entries[len(before.request_usage_entries) :]
    rest = deserialize_usage(_minus(now, then))
    rest.request_usage_entries = entries
    return rest


def snapshot(usage: Usage) -> Usage:
    """Return a copy of the SDK's object as it is now."""
    return since(usage, None)


def usage_of(run: AgentRun) -> Usage | None:
    """Return the SDK's object with what a run's row says that it used."""
    from agents.usage import deserialize_usage

    try:
        return deserialize_usage(run.usage)
    except Exception:
        # An imported row may have any JSON there.
        return None


def _minus(now: Any, then: Any) -> Any:
    if isinstance(now, dict):
        then = then if isinstance(then, dict) else {}
        return {name: _minus(value, then.get(name)) for name, value in now.items()}
    if isinstance(now, list):
        # Details come in a list of one.
        return [_minus(value, then[0] if then else None) for value in now[:1]]
    if isinstance(now, int) and isinstance(then, int):
        return max(now - then, 0)
    return now


def model_of(agent: Agent[Any], run_config: RunConfig | None = None) -> str:
    """Return the name of a run's model; "" for the SDK's default one."""
    model = getattr(run_config, "model", None) or agent.model
    if model is None or isinstance(model, str):
        return model or ""
    return str(getattr(model, "model", type(model).__name__))


def trace_of(trace: Trace | None) -> str:
    """Return a trace's id; "" if tracing is off."""
    trace_id = "" if trace is None else trace.trace_id
    return trace_id if trace_id.startswith("trace_") else ""


def sdk_version() -> str:
    """Return the version of the SDK that runs use."""
    from agents import __version__

    return __version__


# Which run a run context belongs to, so that no run is recorded twice.
_runs: WeakKeyDictionary[RunContextWrapper[Any], str] = WeakKeyDictionary()


def remember(context: RunContextWrapper[Any], run_id: str) -> None:
    """Remember that a run has a row already."""
    _runs[context] = run_id


def recorded_as(context: RunContextWrapper[Any]) -> str | None:
    """Return the id of the row that a run has already."""
    try:
        return _runs.get(context)
    except TypeError:
        # Not the SDK's own object, so that nothing can have been noted of it.
        return None
