"""The SDK's session over any backend."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from agents.memory import SessionABC, SessionSettings
from agents.memory.session_settings import (
    coerce_session_settings,
    resolve_session_limit,
)
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation

from agent_sessions.backends.arguments import check_limit, check_session_id
from agent_sessions.backends.base import (
    BaseSessionBackend,
    SessionKey,
)
from agent_sessions.backends.keys import Asking, PopsIf
from agent_sessions.exceptions import BlockingCall, SessionDoesNotExist
from agent_sessions.items import as_sequence
from agent_sessions.memory.context import names_other
from agent_sessions.reports import guard_public_methods, leave, unwrapped

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.run_context import RunContextWrapper

T = TypeVar("T")


@guard_public_methods
class BackendSession(SessionABC):
    """A conversation in a backend, for `Runner.run(..., session=session)`.

    Cheap to make: nothing is read or written before a method is called, and it may
    be used from any event loop and thread. The SDK gives each method its run as
    `wrapper`: where the run's context names another user than the session's owner,
    all raise SessionDoesNotExist before anything is read or written.
    """

    def __init__(
        self,
        backend: BaseSessionBackend,
        key: SessionKey,
        *,
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.key = key
        self.session_settings = session_settings

    @classmethod
    def from_key(
        cls,
        backend: BaseSessionBackend,
        key: SessionKey,
        *,
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> Self:
        """Open a session whose id and owner have been checked."""
        session = cls.__new__(cls)
        BackendSession.__init__(
            session, backend, key, session_settings=session_settings
        )
        return session

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.session_id!r} in {self.backend.alias!r}>"

    @property
    def session_id(self) -> str:
        """The id by which its owner knows the session."""
        return self.key.session_id

    @session_id.setter
    def session_id(self, value: str) -> None:
        # The SDK's protocol has a plain attribute.
        self.key = replace(self.key, session_id=check_session_id(value))

    @property
    def session_settings(self) -> SessionSettings:
        """The SDK's settings of the session, such as how many items are read."""
        return self._session_settings

    @session_settings.setter
    def session_settings(self, value: SessionSettings | dict[str, Any] | None) -> None:
        # The Runner needs the real class: with a dict it raises AttributeError.
        self._session_settings = coerce_session_settings(
            SessionSettings() if value is None else value
        )

    @property
    def sync(self) -> SyncSession:
        """The same session for views and shells: no event loop is involved."""
        return SyncSession(self)

    def fenced(self, fence: int | None) -> Self:
        """Return the same session as a run writes to it under its lease."""
        return self.from_key(
            self.backend,
            self.key.fenced(fence),
            session_settings=self.session_settings,
        )

    @unwrapped
    async def get_items(
        self,
        limit: int | None = None,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> list[TResponseInputItem]:
        """Read the newest `limit` items, oldest first.

        None reads what `session_settings.limit` says, else everything; 0 reads
        nothing. Rows that can't be read are passed over and don't count. Raises
        InvalidLimit, SessionDoesNotExist and StorageError.
        """
        before = sys.exception()
        try:
            await self._admit(wrapper)
            return await self.backend.alatest(self.key, _limit(self, limit))  # type: ignore[return-value]
        except Exception as exc:
            leave(exc, before)
            raise

    async def add_items(
        self,
        items: list[TResponseInputItem],
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> None:
        """Store a batch whole and in order, or not at all.

        Raises InvalidItem, SessionDoesNotExist, LeaseLost and StorageError.
        """
        await self._admit(wrapper)
        await self.backend.aappend(self.key, as_sequence(items))

    async def pop_item(
        self, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> TResponseInputItem | None:
        """Remove and return the newest readable item; None where there is none."""
        await self._admit(wrapper)
        return await self.backend.apop(self.key)  # type: ignore[return-value]

    async def pop_if(
        self,
        asking: Asking,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> TResponseInputItem | None:
        """Remove and return the newest item that is accepted; others stay.

        `asking` returns what is asked of each item, from the newest back: it is called
        again where the store begins anew. Where that raises, nothing happens. Only
        where the backend's `supports_pop_if` is set.
        """
        await self._admit(wrapper)
        store = cast("PopsIf", self.backend)
        return await store.apop_if(self.key, asking)  # type: ignore[return-value]

    async def clear_session(
        self, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> None:
        """Remove every item; the session stays usable."""
        await self._admit(wrapper)
        await self.backend.aclear(self.key)

    async def clear(self) -> None:
        """See clear_session()."""
        await self.clear_session()

    def assert_usable(self) -> None:
        """Pass, unless the session is of a kind that can be closed, and is."""

    async def _admit(self, wrapper: RunContextWrapper[Any] | None) -> None:
        """Refuse a run whose context names someone else than the session's owner.

        A session without an owner takes any run: what several people share, such as
        a room's conversation, has no owner that one of them could be.
        """
        if wrapper is None or self.key.user_id is None or wrapper.context is None:
            return
        try:
            named = names_other(wrapper.context, self.key.user_id)
        except SynchronousOnlyOperation:
            # A request's user that is not loaded yet.
            named = await sync_to_async(names_other)(wrapper.context, self.key.user_id)
        if named:
            raise SessionDoesNotExist(self.session_id)


def _limit(session: BackendSession, limit: int | None) -> int | None:
    """Return how many items are read: what was asked for, else the session's own."""
    return check_limit(resolve_session_limit(limit, session.session_settings))


def blocking(kind: type[T]) -> type[T]:
    """Decorate a synchronous face so that its methods say what to call in async code."""
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, _told(method))
    return kind


def _told(method: Any) -> Any:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except SynchronousOnlyOperation:
            raise BlockingCall(method.__name__) from None

    return call


@guard_public_methods
@blocking
class SyncSession:
    """The synchronous face of a session, on the caller's own connection."""

    def __init__(self, session: BackendSession) -> None:
        self._session = session

    def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """See BackendSession.get_items()."""
        session = self._usable()
        return session.backend.latest(session.key, _limit(session, limit))  # type: ignore[return-value]

    def add_items(self, items: list[TResponseInputItem]) -> None:
        """See BackendSession.add_items()."""
        session = self._usable()
        session.backend.append(session.key, as_sequence(items))

    def pop_item(self) -> TResponseInputItem | None:
        """See BackendSession.pop_item()."""
        session = self._usable()
        return session.backend.pop(session.key)  # type: ignore[return-value]

    def clear_session(self) -> None:
        """See BackendSession.clear_session()."""
        session = self._usable()
        session.backend.clear(session.key)

    def clear(self) -> None:
        """See BackendSession.clear_session()."""
        self.clear_session()

    def _usable(self) -> BackendSession:
        self._session.assert_usable()
        return self._session
