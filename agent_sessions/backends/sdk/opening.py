"""Sessions of someone else's class: made, shared, kept for a while, closed."""

from __future__ import annotations

import asyncio
import inspect
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from django.utils.module_loading import import_string

from agent_sessions.backends.sdk.noticing import RunView
from agent_sessions.exceptions import InvalidBackend

# The method of SQLAlchemySession that makes an engine for each session.
_ENGINE_MAKER = "agents.extensions.memory.sqlalchemy_session"


class Opened:
    """One open session: who uses it, and how many items it has, if that is known."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.lock = asyncio.Lock()
        self.users = 0
        self.count: int | None = None
        self.run: RunView | None = None

    def view(self, fence: int | None) -> RunView | None:
        """Return what the run under a lease knows; None outside a run."""
        if fence is None:
            return None
        if self.run is None or self.run.fence != fence:
            self.run = RunView(fence)
        return self.run


class OpenSessions:
    """The sessions that one event loop has open, at most `keep` that nobody uses."""

    def __init__(self, make: Maker, keep: int) -> None:
        self._make = make
        self._keep = keep
        self._opened: OrderedDict[str, Opened] = OrderedDict()

    @asynccontextmanager
    async def use(self, session_id: str) -> AsyncIterator[Opened]:
        """Open a session, or wait until its other users in this process are done."""
        opened = self._opened.get(session_id)
        if opened is None:
            opened = self._opened[session_id] = Opened(self._make(session_id))
        self._opened.move_to_end(session_id)
        opened.users += 1
        try:
            async with opened.lock:
                yield opened
        finally:
            opened.users -= 1
            await self._close_unused()

    async def aclose(self) -> None:
        """Close every session, and what they share."""
        opened, self._opened = self._opened, OrderedDict()
        for each in opened.values():
            await close(each.session)
        await self._make.aclose()

    async def _close_unused(self) -> None:
        over = len(self._opened) - self._keep
        if over <= 0:
            return
        unused = [
            session_id
            for session_id, each in self._opened.items()
            if not each.users and not in_memory(each.session)
        ]
        for session_id in unused[:over]:
            await close(self._opened.pop(session_id).session)


class Maker:
    """Makes sessions from the dotted path, or the class, and its arguments.

    SQLAlchemySession.from_url would make an engine, with a pool of connections, for
    each session: here they share one.
    """

    def __init__(self, target: str | Callable[..., Any], arguments: dict[str, Any]):
        self._make = resolve(target) if isinstance(target, str) else target
        self._arguments = arguments
        self._engine: Any = None
        self._by_name = "session_id" in _names(self._make)
        if self._makes_engines():
            self._share_engine()

    def __call__(self, session_id: str) -> Any:
        if self._by_name:
            session = self._make(session_id=session_id, **self._arguments)
        else:
            session = self._make(session_id, **self._arguments)
        refuse_conversations(type(session))
        return session

    async def aclose(self) -> None:
        """Close what the sessions share."""
        if self._engine is not None:
            await self._engine.dispose()

    def _makes_engines(self) -> bool:
        function = getattr(self._make, "__func__", None)
        return (
            getattr(function, "__module__", "") == _ENGINE_MAKER
            and getattr(function, "__name__", "") == "from_url"
        )

    def _share_engine(self) -> None:
        from sqlalchemy.ext.asyncio import create_async_engine

        arguments = dict(self._arguments)
        url = arguments.pop("url")
        self._engine = create_async_engine(url, **arguments.pop("engine_kwargs", {}))
        self._make = self._make.__self__  # type: ignore[attr-defined]
        self._arguments = {**arguments, "engine": self._engine}


def resolve(path: str) -> Callable[..., Any]:
    """Import a class, or a class method. Raises InvalidBackend."""
    try:
        try:
            found = import_string(path)
        except ImportError:
            owner, _, method = path.rpartition(".")
            if "." not in owner:
                raise
            found = getattr(import_string(owner), method)
    except (ImportError, AttributeError) as exc:
        raise InvalidBackend(
            f"The session class {path!r} can't be imported: {exc}",
            hint="Install what it needs, and check the option 'session'.",
            id="agent_sessions.E020",
        ) from exc
    if not callable(found):
        raise InvalidBackend(
            f"{path!r} is neither a class nor a class method.",
            hint="Check the option 'session'.",
            id="agent_sessions.E020",
        )
    return found  # type: ignore[no-any-return]


def refuse_conversations(kind: type) -> None:
    """Refuse the class that the Runner must see itself. Raises InvalidBackend."""
    if any(
        base.__name__ == "OpenAIConversationsSession" and "agents." in base.__module__
        for base in kind.__mro__
    ):
        raise InvalidBackend(
            "The Runner has rules of its own for OpenAIConversationsSession, which "
            "SDKBackend would hide from it.",
            hint="Use agent_sessions.backends.openai.OpenAIConversationsBackend.",
            id="agent_sessions.E020",
        )


def in_memory(session: Any) -> bool:
    """Return whether closing a session would lose its history."""
    return str(getattr(session, "db_path", "")) == ":memory:"


async def close(session: Any) -> None:
    """Close a session, by whichever way its class has."""
    closing = getattr(session, "close", None) or getattr(session, "aclose", None)
    if callable(closing):
        result = closing()
        if inspect.isawaitable(result):
            await result


def _names(target: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return set()
