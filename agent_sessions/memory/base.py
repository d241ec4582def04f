"""The SDK's session over any backend."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, cast

from agents.memory import SessionABC, SessionSettings
from agents.memory.session_settings import (
    coerce_session_settings,
    resolve_session_limit,
)
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.core.exceptions import SynchronousOnlyOperation, ValidationError

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.keys import (
    Asking,
    PopsIf,
    check_limit,
    check_session_id,
    names_user,
)
from agent_sessions.concurrency.connections import note_opening
from agent_sessions.exceptions import BlockingCall, SessionClosed, SessionDoesNotExist
from agent_sessions.items import as_sequence
from agent_sessions.reports import guard_public_methods, leave, unwrapped
from agent_sessions.signals import items_added

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.run_context import RunContextWrapper

    # What the SDK gives each method of a session, and what it takes for its settings.
    Wrapper = RunContextWrapper[Any] | None
    Settings = SessionSettings | dict[str, Any] | None

P = ParamSpec("P")
S = TypeVar("S", bound="BackendSession")
T = TypeVar("T")

# Set while a synchronous face runs a method.
_is_blocking: ContextVar[bool] = ContextVar("is_blocking", default=False)


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
        session_settings: Settings = None,
    ) -> None:
        note_opening()
        self.backend = backend
        self.key = key
        self.session_settings = session_settings

    @classmethod
    def from_key(
        cls,
        backend: BaseSessionBackend,
        key: SessionKey,
        *,
        session_settings: Settings = None,
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
    def session_settings(self, value: Settings) -> None:
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
            self.backend, self.key.fenced(fence), session_settings=self.session_settings
        )

    @unwrapped
    async def get_items(
        self, limit: int | None = None, *, wrapper: Wrapper = None
    ) -> list[TResponseInputItem]:
        """Read the newest `limit` items, oldest first.

        None reads what `session_settings.limit` says, else everything; 0 reads
        nothing. Rows that can't be read are passed over and don't count. Raises
        InvalidLimit, SessionDoesNotExist and StorageError.
        """
        before = sys.exception()
        try:
            await self._admit(wrapper)
            limit = resolve_session_limit(limit, self.session_settings)
            backend = self.backend
            return await self._call(backend.latest, backend.alatest, check_limit(limit))  # type: ignore[arg-type]
        except Exception as exc:
            leave(exc, before)
            raise

    async def add_items(
        self, items: list[TResponseInputItem], *, wrapper: Wrapper = None
    ) -> None:
        """Store a batch whole and in order, or not at all.

        Raises InvalidItem, SessionDoesNotExist, LeaseLost and StorageError.
        """
        await self._admit(wrapper)
        backend, batch = self.backend, as_sequence(items)
        await self._call(backend.append, backend.aappend, batch)
        if batch and items_added.receivers:
            await self._announce(len(batch))

    async def pop_item(self, *, wrapper: Wrapper = None) -> TResponseInputItem | None:
        """Remove and return the newest readable item, or return None."""
        await self._admit(wrapper)
        return await self._call(self.backend.pop, self.backend.apop)  # type: ignore[arg-type]

    async def pop_if(
        self, asking: Asking, *, wrapper: Wrapper = None
    ) -> TResponseInputItem | None:
        """Remove and return the newest item that is accepted; others stay.

        `asking` returns what is asked of each item, from the newest back: it is called
        again where the store begins anew. Where that raises, nothing happens. Only
        where the backend's `supports_pop_if` is set.
        """
        await self._admit(wrapper)
        store = cast("PopsIf", self.backend)
        return await store.apop_if(self.key, asking)  # type: ignore[return-value]

    async def clear_session(self, *, wrapper: Wrapper = None) -> None:
        """Remove every item; the session stays usable."""
        await self._admit(wrapper)
        await self._call(self.backend.clear, self.backend.aclear)

    async def clear(self) -> None:
        """See clear_session()."""
        await self.clear_session()

    async def _announce(self, count: int) -> None:
        """Send items_added, on the connection on which the items were stored."""
        # Not above: a session of its own needs no settings, and so no models.
        from agent_sessions.models import AgentSession

        announce = self.backend.directory.announce
        args = (items_added, AgentSession, self.key)
        if _is_blocking.get():
            announce(*args, count=count)
        else:
            await self.backend.threads.run(announce, *args, count=count)

    async def _call(
        self,
        blocking: Callable[Concatenate[SessionKey, P], T],
        awaiting: Callable[Concatenate[SessionKey, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call the backend: for the synchronous face the form that blocks."""
        if _is_blocking.get():
            return blocking(self.key, *args, **kwargs)
        return await awaiting(self.key, *args, **kwargs)

    async def _admit(self, wrapper: Wrapper) -> None:
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


def stores_plain_items(session: object, base: Any) -> bool:
    """Return whether no subclass of `base` changes items on their way in or out."""
    kind: Any = type(session)
    return isinstance(session, base) and (
        (kind.add_items, kind.get_items) == (base.add_items, base.get_items)
    )


class ClosableSession(BackendSession):
    """A session that close() ends, unless its client was given to it.

    Its backend has disconnect() and ping().

    As the SDK's: a client that is the caller's stays open, and then the session stays
    usable. Closing twice is no error.
    """

    _closed = False

    async def close(self) -> None:
        """Close connections; every later call raises SessionClosed.

        Where it fails, the session has ended all the same, and closing again goes on.
        """
        if self._owns_client():
            self._closed = True
            await cast("Any", self.backend).disconnect()

    async def ping(self) -> bool:
        """Return whether the store answers. Raises SessionClosed."""
        self._assert_open()
        return bool(await cast("Any", self.backend).ping())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _assert_open(self) -> None:
        if self._closed:
            raise SessionClosed(type(self).__name__)

    async def _admit(self, wrapper: Wrapper) -> None:
        self._assert_open()
        await super()._admit(wrapper)

    def _owns_client(self) -> bool:
        """Return whether only our own code has the client."""
        raise NotImplementedError


def twin(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], T]:
    """Make the synchronous form of a session's method, on the caller's connection.

    It runs the method's own coroutine, which has nothing to wait for where _call()
    blocks. In async code it raises BlockingCall instead of Django's error.
    """

    @wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        token = _is_blocking.set(True)
        try:
            method(self._session, *args, **kwargs).send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        except SynchronousOnlyOperation:
            name = f"{method.__name__}()"
            raise BlockingCall(f"session.sync.{name}", f"session.{name}") from None
        finally:
            _is_blocking.reset(token)
        raise AssertionError(f"{method.__name__}() waits for something.")

    return call


@guard_public_methods
class SyncSession:
    """The synchronous face of a session, on the caller's own connection."""

    def __init__(self, session: BackendSession) -> None:
        self._session = session

    get_items = twin(BackendSession.get_items)
    add_items = twin(BackendSession.add_items)
    pop_item = twin(BackendSession.pop_item)
    clear_session = twin(BackendSession.clear_session)
    clear = twin(BackendSession.clear)


# -- whom the context of a run names ----------------------------------------------------

_ABSENT = object()


def names_other(context: Any, owner: Any) -> bool:
    """Return whether a context names a user that is not the owner.

    A context, be it an object or a mapping, names the user of `user`, whose key is
    `user_id`, and who sent its `request` or opened the socket of its `scope`; it may be
    a request, a consumer, a scope or a user itself. An anonymous user is someone else,
    and so is a row of another model.
    A context that has none of these names nobody.
    """
    return any(not _is_owner(named, owner) for named in _named(context))


def _named(context: Any) -> Iterator[Any]:
    """Return the keys of the users whom a context names."""
    if hasattr(context, "is_authenticated") and hasattr(context, "pk"):
        yield _key_of(context)
        return
    for holder in (context, _member(context, "request"), _member(context, "scope")):
        pk = _key_of(_member(holder, "user"))
        if pk is not _ABSENT:
            yield pk
    user_id = _member(context, "user_id")
    if user_id is not None:
        yield user_id


def _key_of(user: Any) -> Any:
    # A row of another model is nobody who could be the owner.
    return getattr(user, "pk", _ABSENT) if names_user(user) else None


def _member(holder: Any, name: str) -> Any:
    if isinstance(holder, Mapping):
        return holder.get(name)
    return getattr(holder, name, None)


def _is_owner(named: Any, owner: Any) -> bool:
    if isinstance(named, bool | float) or named is None:
        return False
    if named == owner:
        return True
    # A key that came as text: "7", or a UUID.
    try:
        return bool(_key(named) == owner)
    except ValidationError:
        return False


def _key(value: Any) -> Any:
    return get_user_model()._meta.pk.to_python(value)
