"""What lets a worker do the runs of a door: where="task", and agents by their path."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from django.utils.module_loading import import_string

from agent_sessions.agui import RunRequest, StreamOptions
from agent_sessions.exceptions import InvalidConsumer
from agent_sessions.runs import Conversation, RunLimits

if TYPE_CHECKING:
    from agents import Agent

Where = Literal["process", "task"]
# What JSON has, for a queue.
_CARRIED = str | int | float | bool | None


class WorkerMixin:
    """Where the runs of an AgentConsumer or an AgentRunView execute."""

    # Or its dotted path, or that of a function of the user and the session's id.
    agent: Agent[Any] | str | None = None
    # In the "process" that was asked, or as a "task" in a worker.
    where: Where = "process"
    # What tasks are enqueued with: queue_name, priority, backend.
    task_options: Mapping[str, Any] = {}
    stream_options: StreamOptions = StreamOptions()
    limits: RunLimits = RunLimits()
    # Who is there, and the session that they talk in.
    user: Any
    conversation: Any

    @classmethod
    def _check_place(cls, options: Mapping[str, Any]) -> None:
        """Refuse an agent that isn't there, and what no worker could get at."""
        agent = options.get("agent", cls.agent)
        if isinstance(agent, str):
            cls._import_agent(agent)
        elif options.get("agent") is not None and not hasattr(agent, "handoffs"):
            raise InvalidConsumer(
                f"{cls.__name__}.agent is an Agent or its dotted path, not {agent!r}. "
                "What chooses one goes into get_agent()."
            )
        where = options.get("where", cls.where)
        if where not in get_args(Where):
            raise InvalidConsumer(
                f"{cls.__name__}.where is {where!r}. Give one of: "
                f"{', '.join(get_args(Where))}."
            )
        if where == "process":
            return
        # Without the extra it fails here, not at the first message.
        import_module("agent_sessions.runs.tasks")
        if not cls.__qualname__.isidentifier():
            raise InvalidConsumer(
                f"A worker can't import {cls.__module__}.{cls.__qualname__}. Define it "
                "at the top of its module."
            )
        for name, value in options.items():
            if name != "task_options" and not isinstance(value, _CARRIED):
                raise InvalidConsumer(
                    f'{cls.__name__}.{name} can\'t go to a worker of where="task". Set '
                    "it as an attribute of a subclass, or give an agent's dotted path."
                )

    @classmethod
    def _import_agent(cls, path: str) -> Any:
        """Import an agent, or the function that returns one. Raise InvalidConsumer."""
        try:
            named = import_string(path)
        except ImportError as exc:
            raise InvalidConsumer(
                f"{cls.__name__}.agent: can't import {path!r}. It is the dotted path of "
                "an Agent, or of a function that returns one."
            ) from exc
        if not hasattr(named, "handoffs") and not callable(named):
            raise InvalidConsumer(
                f"{cls.__name__}.agent: {path!r} is neither an Agent nor a function."
            )
        return named

    def _named_agent(self, path: str) -> Any:
        named = self._import_agent(path)
        if hasattr(named, "handoffs"):
            return named
        return named(self.user, self.conversation.session_id)

    async def _enqueue(self, conversation: Conversation, request: RunRequest) -> bool:
        """Queue a run, for which a worker makes a door like this one.

        Return False if its id was used before.
        """
        # Late: Django 5.2 has tasks only with an extra.
        from agent_sessions.runs.tasks import Door, enqueue

        kind = type(self)
        given = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_")
            and hasattr(kind, name)
            and isinstance(value, _CARRIED)
        }
        path = f"{kind.__module__}.{kind.__qualname__}"
        door = Door(path, given, dict(self.task_options))
        return await enqueue(
            conversation, request, door, self.limits, self.stream_options
        )
