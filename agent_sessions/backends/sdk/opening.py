"""Sessions of someone else's class: made, shared, kept for a while, closed."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pkgutil import resolve_name
from typing import Any

from agent_sessions.backends.options import did_you_mean
from agent_sessions.exceptions import InvalidBackend

# The method of SQLAlchemySession that makes an engine for each session.
_ENGINE_MAKER = "agents.extensions.memory.sqlalchemy_session"
# What misspelt paths are compared with.
_KNOWN = (
    "agents.memory.SQLiteSession",
    "agents.extensions.memory.AdvancedSQLiteSession",
    "agents.extensions.memory.AsyncSQLiteSession",
    "agents.extensions.memory.MongoDBSession.from_uri",
    "agents.extensions.memory.RedisSession.from_url",
    "agents.extensions.memory.SQLAlchemySession.from_url",
)


class Opened:
    """One open session, and who uses it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.lock = asyncio.Lock()
        self.users = 0


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
    each session: here they share one. Errors name the alias's `setting`, and options
    of its backend's `own` that may be misspelt. Raises InvalidBackend where the class
    can't be imported or doesn't take the arguments.
    """

    def __init__(
        self,
        target: str | Callable[..., Any],
        arguments: dict[str, Any],
        setting: str,
        own: Iterable[str] = (),
    ) -> None:
        self._make = resolve(target) if isinstance(target, str) else target
        self._name = name_of(target)
        self._arguments = arguments
        self._setting = setting
        self._own = sorted(own)
        self._engine: Any = None
        if inspect.isclass(self._make):
            refuse_conversations(self._make)
        self._by_name = self._check_arguments()

    def __call__(self, session_id: str) -> Any:
        if self._engine is None and self._makes_engines():
            self._share_engine()
        named = {"session_id": session_id} if self._by_name else {}
        given = () if self._by_name else (session_id,)
        try:
            session = self._make(*given, **named, **self._arguments)
        except TypeError as exc:
            # Of a class that passes its arguments on: only the name is quoted.
            raise self._misfit(exc, ()) or exc from None
        refuse_conversations(type(session))
        return session

    async def aclose(self) -> None:
        """Close what the sessions share."""
        if self._engine is not None:
            await self._engine.dispose()

    def _check_arguments(self) -> bool:
        """Compare the arguments with the signature.

        Return whether the session's id goes by its name.
        """
        try:
            signature = inspect.signature(self._make)
        except (TypeError, ValueError):
            return False
        by_name = "session_id" in signature.parameters
        given, named = ([], {"session_id": ""}) if by_name else ([""], {})
        try:
            signature.bind(*given, **named, **self._arguments)
        except TypeError as exc:
            known = signature.parameters.keys() - {"session_id"}
            raise self._misfit(exc, known) or InvalidBackend(
                f"{self._name} can't be called with a session's id and these OPTIONS.",
                hint=f"Compare {self._setting} with its signature.",
                id="agent_sessions.E020",
            ) from None
        return by_name

    def _misfit(self, exc: TypeError, known: Iterable[str]) -> InvalidBackend | None:
        """Return the error for an argument that a call lacks or doesn't take."""
        found = re.search(r"(missing|unexpected) .*?'(\w+)'", str(exc))
        if found is None:
            return None
        kind, name = found.groups()
        if kind == "missing":
            return InvalidBackend(
                f"{self._setting} lacks OPTIONS that {self._name} needs: {name}.",
                hint=f"Set {self._setting}['OPTIONS'][{name!r}].",
                id="agent_sessions.E009",
            )
        if name not in self._arguments:
            return None
        known = sorted(known)
        hint = f"It takes: {', '.join(known)}." if known else "See its documentation."
        return InvalidBackend(
            f"{self._setting} has OPTIONS that {self._name} doesn't take: {name}.",
            hint=did_you_mean([name], [*known, *self._own]) + hint,
            id="agent_sessions.E008",
        )

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


def name_of(target: str | Callable[..., Any]) -> str:
    path = target if isinstance(target, str) else getattr(target, "__qualname__", "it")
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1][:1].islower() else parts[-1:])


def resolve(path: str) -> Callable[..., Any]:
    try:
        found = resolve_name(path)
        if callable(found):
            return found  # type: ignore[no-any-return]
        reason = "it is neither a class nor a class method"
    except (ImportError, AttributeError, ValueError) as exc:
        reason = str(exc)
    raise InvalidBackend(
        f"The session class {path!r} can't be used: {reason}",
        hint=did_you_mean([path], _KNOWN)
        + "Install what it needs, and check the option 'session'.",
        id="agent_sessions.E020",
    )


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
    closing = getattr(session, "close", None) or getattr(session, "aclose", None)
    if callable(closing):
        result = closing()
        if inspect.isawaitable(result):
            await result
