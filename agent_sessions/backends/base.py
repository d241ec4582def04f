"""What every backend offers: storage on plain dicts, by key, sync and async."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from django.core import checks
from django.core.signing import BadSignature, Signer
from django.views.decorators.debug import sensitive_variables

from agent_sessions.backends.keys import Page, SessionKey, make_key
from agent_sessions.backends.options import (
    check_run_session,
    did_you_mean,
    read_retention,
)
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import EncryptionError, InvalidBackend
from agent_sessions.items import Item
from agent_sessions.reports import guard_public_methods

if TYPE_CHECKING:
    from agent_sessions.backends.database import DatabaseBackend
    from agent_sessions.backends.directory import Directory
    from agent_sessions.concurrency.threads import DatabaseThreads

__all__ = ["BaseSessionBackend", "Page", "SessionKey", "did_you_mean", "make_key"]


class Sealer:
    """Texts that lie beside a session's items, such as what a paused run has stored.

    They are signed: each opens for the same alias, owner and session only.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias

    @sensitive_variables()
    def seal(self, key: SessionKey, text: str) -> str:
        """Make the text that is stored; "" stays so."""
        return self._signer(key).sign(text) if text else ""

    @sensitive_variables()
    def open(self, key: SessionKey, text: str) -> str:
        """Read what seal() made. Raises EncryptionError."""
        try:
            return self._signer(key).unsign(text) if text else ""
        except BadSignature:
            raise EncryptionError(
                f"A text of session {key.session_id!r} doesn't open: it was changed, "
                "was written for another session, or was signed with a SECRET_KEY that "
                "SECRET_KEY_FALLBACKS doesn't have any more."
            ) from None  # Django's frames would show the text in an error report.

    @sensitive_variables()
    def open_all(self, texts: Sequence[tuple[SessionKey, str]]) -> list[str | None]:
        """Read many in a fixed number of queries; None is what doesn't open."""
        found: list[str | None] = []
        for key, text in texts:
            try:
                found.append(self.open(key, text))
            except EncryptionError:
                found.append(None)
        return found

    def _signer(self, key: SessionKey) -> Signer:
        owner = None if key.user_id is None else str(key.user_id)
        place = json.dumps([self._alias, owner, key.session_id])
        return Signer(salt=f"agent_sessions.text {place}")


class BaseSessionBackend(ABC):
    """One store of sessions: its configuration, its client, its operations."""

    # Whether any JSON object can be stored, and comes back as it was given but for the
    # order of its keys. Else an envelope lies in a message, and copies are compared by
    # what they say.
    keeps_exactly: ClassVar[bool] = True
    # Whether it has pop_if() and apop_if(), see PopsIf.
    supports_pop_if: ClassVar[bool] = False
    # Whether it has list_ids(), which returns the ids of the sessions without an owner.
    supports_listing: ClassVar[bool] = False
    # Whether it has load(), which tries what the first use needs and takes seconds.
    supports_loading: ClassVar[bool] = False
    # Whether what it stores, titles too, can't be read without its keys.
    encrypts: ClassVar[bool] = False
    # Whether a session has more than the rows that go with its own. Then a deletion of
    # that row leaves something behind, which erase() removes.
    keeps_outside: ClassVar[bool] = False
    # Names that OPTIONS may hold, with their defaults.
    option_defaults: ClassVar[dict[str, Any]] = {}
    # Of all backends: how long clear_agent_sessions keeps a history, such as "30d".
    retention_defaults: ClassVar[dict[str, Any]] = {"max_idle": None, "max_age": None}
    # And what wraps the sessions of the websocket's runs: a function or its path.
    shared_defaults: ClassVar[dict[str, Any]] = {
        **retention_defaults,
        "run_session": None,
    }
    # Names that OPTIONS must hold.
    required_options: ClassVar[frozenset[str]] = frozenset()
    # The option that holds another alias, for a WrappingBackend.
    inner_option: ClassVar[str | None] = None
    # The dotted path of the class of this backend's sessions, a BackendSession.
    session_class: ClassVar[str] = "agent_sessions.memory.base.BackendSession"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        guard_public_methods(cls)

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        self.alias = alias
        self._check_option_names(options)
        self.options = {**self.shared_defaults, **self.option_defaults, **options}
        self.retention = read_retention(alias, self.options)
        check_run_session(alias, self.options["run_session"])
        # Sets what lies in a shared store apart: the alias that wraps this backend.
        self.namespace = ""
        self.sealer = Sealer(alias)
        # This backend, where its items are readable rows of a Django database. Then it
        # has branches, turns that can be removed, and rewrite().
        self.in_database: DatabaseBackend | None = None
        # Whether an item may have fields that no API knows.
        self.keeps_marks = True

    def _check_option_names(self, options: dict[str, Any]) -> None:
        setting = f"AGENT_SESSIONS[{self.alias!r}]"
        known = option_names(type(self))
        if unknown := sorted(map(str, options.keys() - known)):
            raise InvalidBackend(
                f"{setting} has unknown OPTIONS: {', '.join(unknown)}.",
                hint=did_you_mean(unknown, known)
                + f"{type(self).__name__} takes: {', '.join(sorted(known)) or 'none'}.",
                id="agent_sessions.E008",
            )
        if missing := sorted(self.required_options - options.keys()):
            raise InvalidBackend(
                f"{setting} lacks OPTIONS that {type(self).__name__} needs: "
                f"{', '.join(missing)}.",
                hint=f"Set {setting}['OPTIONS'][{missing[0]!r}].",
                id="agent_sessions.E009",
            )

    def __repr__(self) -> str:
        # Options may hold secrets.
        return f"<{type(self).__name__} {self.alias!r}>"

    @abstractmethod
    def append(self, key: SessionKey, items: Sequence[Item]) -> None:
        """Store a batch whole, contiguous and in order, or not at all."""

    @abstractmethod
    def latest(self, key: SessionKey, limit: int | None) -> list[Item]:
        """Read the newest `limit` readable items, oldest first; None reads all."""

    @abstractmethod
    def pop(self, key: SessionKey) -> Item | None:
        """Remove and return the newest readable item."""

    @abstractmethod
    def clear(self, key: SessionKey) -> int:
        """Remove every item; return how many there were."""

    @abstractmethod
    def page(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        """Read up to `limit` items that lie before or after a position, or the newest.

        Those nearest to the position are read; `before` and `after` exclude it.
        """

    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        """See append(). The asynchronous forms use a thread where nothing else is."""
        await settle(self.threads.run(self.append, key, items))

    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        """See latest()."""
        return await self.threads.run(self.latest, key, limit)

    async def apop(self, key: SessionKey) -> Item | None:
        """See pop()."""
        return await settle(self.threads.run(self.pop, key))

    async def aclear(self, key: SessionKey) -> int:
        """See clear()."""
        return await settle(self.threads.run(self.clear, key))

    async def apage(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        """See page()."""
        return await self.threads.run(
            self.page, key, before=before, after=after, limit=limit
        )

    @property
    @abstractmethod
    def directory(self) -> Directory:
        """The rows that say which sessions this alias has, and whose they are."""

    @property
    @abstractmethod
    def threads(self) -> DatabaseThreads:
        """The threads in which async callers reach the directory's database."""

    def erase(self, key: SessionKey, remote_id: str = "") -> int:
        """Remove what is left of a session whose row is gone; return how many items.

        `remote_id` is what the row said last. Erasing what isn't there is no error.
        """
        return 0

    def check(self) -> list[checks.CheckMessage]:
        """Report what is wrong with the configuration, each with a hint."""
        return []

    def close(self) -> None:  # noqa: B027 - most stores hold nothing to close
        """Close clients and threads; the next use makes new ones."""


def option_names(kind: type[BaseSessionBackend]) -> frozenset[str]:
    """Return the names that the OPTIONS of a backend class may hold."""
    return (
        kind.required_options
        | kind.option_defaults.keys()
        | kind.shared_defaults.keys()
    )
