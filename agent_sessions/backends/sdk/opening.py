"""Sessions of someone else's class: made, shared, kept for a while, closed."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from pkgutil import resolve_name
from typing import Any

from agent_sessions.backends.options import did_you_mean
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.items import Item

logger = logging.getLogger("agent_sessions.backends")

# How many of the newest items a run's view knows.
_VIEWED = 100
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


class RunView:
    """The newest items as one run has read and written them.

    A session class can't compare a lease in the same step as it writes. A run that has
    lost its lease in another process may therefore write once more, after the next run
    has read: that is noticed here.
    """

    def __init__(self, fence: int) -> None:
        self.fence = fence
        # Digests, oldest first; `is_all` says that there are no others.
        self._known: list[bytes] = []
        self._is_all = False

    def wrote(self, items: Sequence[Item]) -> None:
        """Note what the run has added."""
        self._keep([*self._known, *map(_digest, items)], is_all=self._is_all)

    def popped(self) -> None:
        """Note that the run has taken the newest item."""
        self._known = self._known[:-1]

    def cleared(self) -> None:
        """Note that the run has removed everything."""
        self._keep([], is_all=True)

    def read(self, items: Sequence[Item], *, is_all: bool, alias: str) -> None:
        """Compare what the run reads with what it knows, and know that from now on."""
        known, was_all = self._known, self._is_all
        self._keep([_digest(item) for item in items], is_all=is_all)
        found = self._known
        if not (was_all and self._is_all):
            length = min(len(known), len(found))
            known, found = known[len(known) - length :], found[len(found) - length :]
        if known != found:
            logger.warning(
                "The history of a session in %r changed beside the run under lease %d: "
                "by hand, or by a run that was writing as it lost its lease",
                alias,
                self.fence,
            )

    def _keep(self, digests: list[bytes], *, is_all: bool) -> None:
        self._known = digests[-_VIEWED:]
        self._is_all = is_all and len(digests) <= _VIEWED


def _digest(item: Item) -> bytes:
    text = json.dumps(item, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Opened:
    """One open session, and who uses it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.lock = asyncio.Lock()
        self.users = 0
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
    """Name a class, or a class method with its class."""
    path = target if isinstance(target, str) else getattr(target, "__qualname__", "it")
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1][:1].islower() else parts[-1:])


def resolve(path: str) -> Callable[..., Any]:
    """Import a class, or a class method. Raises InvalidBackend."""
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
    """Close a session, by whichever way its class has."""
    closing = getattr(session, "close", None) or getattr(session, "aclose", None)
    if callable(closing):
        result = closing()
        if inspect.isawaitable(result):
            await result
