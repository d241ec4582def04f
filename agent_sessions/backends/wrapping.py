"""Backends around other backends, such as the one that encrypts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.exceptions import InvalidBackend

if TYPE_CHECKING:
    from agent_sessions.backends.directory import Directory
    from agent_sessions.concurrency.threads import DatabaseThreads


class WrappingBackend(BaseSessionBackend):
    """Base of backends that change what another one stores."""

    # Makes what `inner_option` names; the handler sets it.
    make_inner: Callable[[], BaseSessionBackend] | None = None

    @cached_property
    def inner(self) -> BaseSessionBackend:
        """The backend that this one wraps: of its own, under this one's alias.

        So its rows and keys are never those of the wrapped alias: `namespace` is to
        be part of the names in a store that knows nothing of aliases.
        """
        if self.make_inner is None:
            raise InvalidBackend(f"{type(self).__name__} wraps no backend.")
        inner = self.make_inner()
        inner.namespace = self.alias
        return inner

    @property
    def directory(self) -> Directory:
        return self.inner.directory

    @property
    def threads(self) -> DatabaseThreads:
        return self.inner.threads

    def erase(self, key: SessionKey, remote_id: str = "") -> int:
        return self.inner.erase(key, remote_id)

    def close(self) -> None:
        if (inner := self.__dict__.pop("inner", None)) is not None:
            inner.close()

    @contextmanager
    def removing(self, key: SessionKey) -> Iterator[None]:
        """Do what goes with the removal of a history from its store, in the block."""
        with removing(self.inner, key):
            yield

    def forget_key(self, key: SessionKey) -> None:
        """Destroy a session's own encryption key, as its row is about to go."""
        forget_key(self.inner, key)


def innermost(backend: BaseSessionBackend) -> BaseSessionBackend:
    """Return the backend that holds the items: the one that is wrapped in the end."""
    while isinstance(backend, WrappingBackend):
        backend = backend.inner
    return backend


def removing(
    backend: BaseSessionBackend, key: SessionKey
) -> AbstractContextManager[None]:
    """See WrappingBackend.removing(). Around a store there is nothing to do."""
    if isinstance(backend, WrappingBackend):
        return backend.removing(key)
    return nullcontext()


def forget_key(backend: BaseSessionBackend, key: SessionKey) -> None:
    """See WrappingBackend.forget_key(). A store has no key of a session."""
    if isinstance(backend, WrappingBackend):
        backend.forget_key(key)
