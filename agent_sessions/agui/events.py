"""Map one run's SDK stream events to AG-UI events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from agent_sessions.agui import lifecycle
from agent_sessions.agui.content import as_dict, clean
from agent_sessions.agui.interrupts import add_pending_calls, interrupts
from agent_sessions.agui.options import StreamOptions
from agent_sessions.agui.output import OutputItems
from agent_sessions.agui.tools import HANDOFF, output_call_id

Event = dict[str, Any]


class EventMapper:
    """Maps the stream of one run; every sequence it gives is legal AG-UI.

    Raw model events make the deltas; run items fill in what a model didn't stream.
    """

    def __init__(
        self, *, thread_id: str, run_id: str, options: StreamOptions | None = None
    ) -> None:
        self.thread_id = thread_id
        self.run_id = run_id
        self.options = options or StreamOptions()
        self._items = OutputItems(run_id, self.options)
        self._step: str | None = None
        self._over = False

    def started(self, user_messages: Sequence[dict[str, Any]] = ()) -> Event:
        """Open the run."""
        return lifecycle.run_started(self.thread_id, self.run_id, user_messages)

    def map(self, event: Any) -> list[Event]:
        """Map one SDK stream event; after the run's end nothing comes any more."""
        events: list[Event] = []
        if self._over:
            return events
        if event.type == "raw_response_event":
            self._items.raw(event.data, events)
        elif event.type == "run_item_stream_event":
            if event.name == "handoff_occured":
                self._handoff(event.item, events)
            else:
                self._items.run_item(event.name, event.item, events)
        else:
            self._enter_agent(event.new_agent, events)
        return events

    def finished(
        self, usage: Any = None, *, outcome: Literal["success", "cancelled"] = "success"
    ) -> list[Event]:
        """Close what is open, then the run."""
        return self._end({"type": outcome}, usage)

    def interrupted(
        self,
        interruptions: Sequence[Any],
        *,
        expires_at: datetime | None = None,
        messages: list[dict[str, Any]],
        before: str | None = None,
        usage: Any = None,
    ) -> list[Event]:
        """Close the run on approvals: SDK items, or dicts that `interrupts` made."""
        asked = [
            *(item for item in interruptions if isinstance(item, dict)),
            *interrupts(
                (item for item in interruptions if not isinstance(item, dict)),
                expires_at,
            ),
        ]
        shown = add_pending_calls(messages, asked, self.options)
        return self._end(
            {"type": "interrupt", "interrupts": asked},
            usage,
            lifecycle.snapshot(shown, before=before),
        )

    def error(self, code: str, message: str, usage: Any = None) -> list[Event]:
        """Close what is open, then the run as failed."""
        if self._over:
            return []
        events = self._close_all()
        self._over = True
        events.append(
            lifecycle.run_error(code, message, run_id=self.run_id, usage=usage)
        )
        return events

    def _end(
        self, outcome: dict[str, Any], usage: Any, *last_words: Event
    ) -> list[Event]:
        if self._over:
            return []
        events = self._close_all()
        self._over = True
        events.extend(last_words)
        events.append(
            lifecycle.run_finished(self.thread_id, self.run_id, outcome, usage)
        )
        return events

    def _close_all(self) -> list[Event]:
        events: list[Event] = []
        self._items.close(events)
        if self._step is not None:
            events.append({"type": "STEP_FINISHED", "stepName": self._step})
            self._step = None
        return events

    def _enter_agent(self, agent: Any, events: list[Event]) -> None:
        events.extend(self._close_all())
        self._step = self._items.agent_name = clean(agent.name)
        self._items.handoff_tools = handoff_tool_names(agent)
        events.append({"type": "STEP_STARTED", "stepName": self._step})

    def _handoff(self, item: Any, events: list[Event]) -> None:
        self._items.end_handoff(output_call_id(as_dict(item.raw_item)), events)
        source, target = item.source_agent, item.target_agent
        events.append(
            {
                "type": "CUSTOM",
                "name": HANDOFF,
                "value": {"from": clean(source.name), "to": clean(target.name)},
            }
        )


def handoff_tool_names(agent: Any) -> frozenset[str]:
    """Return the names of the tools by which an agent hands over."""
    # Here, where a run is going and so it is loaded: it takes seconds.
    from agents import Handoff

    return frozenset(
        entry.tool_name
        if isinstance(entry, Handoff)
        else Handoff.default_tool_name(entry)
        for entry in agent.handoffs
    )
