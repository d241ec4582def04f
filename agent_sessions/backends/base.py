"""What every backend offers: storage on plain dicts, by key, sync and async."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from django.core import checks
from django.views.decorators.debug import sensitive_variables

from agent_sessions.backends.arguments import check_run_session
from agent_sessions.backends.keys import Asking, Page, SessionKey, make_key
from agent_sessions.backends.retention import read_retention
from agent_sessions.backends.signed import open_or_none, sign, unsign
from agent_sessions.backends.spelling import did_you_mean
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.items import Item
from agent_sessions.reports import guard_methods

if TYPE_CHECKING:
    from agent_sessions.backends.database import DatabaseBackend
    from agent_sessions.backends.directory import Directory
    from agent_sessions.concurrency.threads import DatabaseThreads

__all__ = [
    "BaseSessionBackend",
    "Page",
    "SessionKey",
    "did_you_mean",
    "make_key",
]

# Methods that are given contents or keys, or give them. What goes wrong in them is
# reported without these, in every subclass.
_GUARDED = frozenset(
    [
        "__init__",
        "append",
        "latest",
        "pop",
        "pop_if",
        "rewrite",
        "clear",
        "page",
        "erase",
        "forget_key",
        "enroll",
        "assert_open",
        "seal_text",
        "open_text",
        "flush",
        "head",
        "check",
        "check_databases",
        "aappend",
        "alatest",
        "apop",
        "apop_if",
        "aclear",
        "apage",
        "aflush",
        "ahead",
    ]
)


class BaseSessionBackend(ABC):
    """One store of sessions: its configuration, its client, its operations."""

    # Whether the store keeps several branches of one session.
    supports_branches: ClassVar[bool] = False
    # Whether clear_agent_sessions --keep-last-turns can shorten a history.
    supports_trimming: ClassVar[bool] = False
    # Whether any JSON object can be stored, an encrypted item's envelope too.
    takes_any_item: ClassVar[bool] = True
    # Whether pop_if() takes an item in one step with looking at it.
    supports_pop_if: ClassVar[bool] = False
    # Whether rewrite() can put items in the places of others.
    supports_rewriting: ClassVar[bool] = False
    # Whether latest() and alatest() take `decode` too, which reads rows for them.
    takes_decoder: ClassVar[bool] = False
    # Whether what it stores, titles too, can't be read without its keys.
    encrypts: ClassVar[bool] = False
    # Whether items come back as they were given, but for the order of their keys.
    keeps_exactly: ClassVar[bool] = True
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
    # The option that holds another alias, for a backend that wraps that one.
    inner_option: ClassVar[str | None] = None
    # The dotted path of the class of this backend's sessions, a BackendSession.
    session_class: ClassVar[str] = "agent_sessions.memory.base.BackendSession"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).keys() & {"latest", "alatest"}:
            # What a subclass puts in their place may take what is abstract here.
            cls.takes_decoder = vars(cls).get("takes_decoder", False)
        guard_methods(cls, _GUARDED)

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        self.alias = alias
        self._check_option_names(options)
        self.options = {
            **self.shared_defaults,
            **self.option_defaults,
            **options,
        }
        self.retention = read_retention(alias, self.options)
        check_run_session(alias, self.options["run_session"])
        # Sets what lies in a shared store apart: the alias that wraps this backend.
        self.namespace = ""
        # Makes what `inner_option` names; the handler sets it.
        self.make_inner: Callable[[], BaseSessionBackend] | None = None

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Return the names that OPTIONS may hold."""
        return (
            cls.required_options
            | cls.option_defaults.keys()
            | cls.shared_defaults.keys()
        )

    def _check_option_names(self, options: dict[str, Any]) -> None:
        setting = f"AGENT_SESSIONS[{self.alias!r}]"
        known = self.option_names()
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
    def in_database(self) -> DatabaseBackend | None:
        """This backend, where its items are readable rows of a Django database."""
        return None

    @property
    def keeps_outside(self) -> bool:
        """Whether a session has more than the rows that go with its own.

        Then a deletion of that row leaves something behind, which erase() removes.
        """
        return self.inner_option is not None and self.inner.keeps_outside

    def erase(self, key: SessionKey, remote_id: str = "") -> int:
        """Remove what is left of a session whose row is gone; tell how many items.

        `remote_id` is what the row said last. Erasing what isn't there is no error.
        """
        return 0 if self.inner_option is None else self.inner.erase(key, remote_id)

    @property
    def store(self) -> BaseSessionBackend:
        """The backend that holds the items: this one, or what it wraps."""
        return self if self.inner_option is None else self.inner.store

    @contextmanager
    def removing(self, key: SessionKey) -> Iterator[None]:
        """Do what goes with the removal of a history from `store`, in the block."""
        yield

    def forget_key(self, key: SessionKey) -> None:
        """Destroy a session's own encryption key, as its row is about to go."""
        if self.inner_option is not None:
            self.inner.forget_key(key)

    def enroll(self, key: SessionKey) -> None:
        """Make the rows that a session's first use needs. Raises what create() does."""
        self.directory.create(key)

    def pop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        """Remove and return the newest item that is accepted; others stay.

        `asking` returns what is asked of each item, from the newest back: it is called
        again where the store begins anew. Where that raises, nothing happens. Only
        where `supports_pop_if` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} pops what is newest.")

    async def apop_if(self, key: SessionKey, asking: Asking) -> Item | None:
        """See pop_if()."""
        return await settle(self.threads.run(self.pop_if, key, asking))

    def forget_rows(self, using: str) -> None:
        """Forget what is remembered of the rows of a database, which was emptied."""
        if self.inner_option is not None and "inner" in self.__dict__:
            self.inner.forget_rows(using)

    def at_exit(self) -> None:
        """Write what was put off, as the process ends."""
        if self.inner_option is not None and "inner" in self.__dict__:
            self.inner.at_exit()

    def rewrite(
        self,
        key: SessionKey,
        change: Callable[[Item], Item | None],
        *,
        unless: str = "",
        batch_size: int = 500,
    ) -> int:
        """Put changed items in the places of a session's own; tell how many.

        Those of all branches, archived ones too. `change` gives None for what stays.
        An item that is popped or rewritten meanwhile is left alone. Stored texts that
        hold `unless` needn't be looked at. Only where `supports_rewriting` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} can't rewrite items.")

    def assert_open(self, page: Page) -> None:  # noqa: B027 - most encrypt nothing
        """Pass where a page has no item that needs an unknown key.

        Raises EncryptionError.
        """

    @sensitive_variables()
    def seal_text(self, key: SessionKey, text: str) -> str:
        """Sign a text for its session, owner and alias, or encrypt it as items are."""
        return sign(self.alias, key, text) if text else ""

    @sensitive_variables()
    def open_text(self, key: SessionKey, text: str) -> str:
        """Read what seal_text() made. Raises EncryptionError."""
        return unsign(self.alias, key, text) if text else ""

    @sensitive_variables()
    def open_texts(self, texts: Sequence[tuple[SessionKey, str]]) -> list[str | None]:
        """Read many in a fixed number of queries; None is what doesn't open."""
        return [open_or_none(self, key, text) for key, text in texts]

    def flush(self, key: SessionKey) -> None:
        """Bring the session's row up to date with what was written, if it isn't."""
        if self.inner_option is not None:
            self.inner.flush(key)

    async def aflush(self, key: SessionKey) -> None:
        """See flush()."""
        if self.inner_option is not None:
            await self.inner.aflush(key)

    def head(self, key: SessionKey) -> int:
        """Return the position of the newest item; 0 where there is none."""
        newest = self.page(key, limit=1).items
        return newest[-1].position if newest else 0

    async def ahead(self, key: SessionKey) -> int:
        """See head()."""
        newest = (await self.apage(key, limit=1)).items
        return newest[-1].position if newest else 0

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
        """Remove every item; tell how many there were."""

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

    @abstractmethod
    async def aappend(self, key: SessionKey, items: Sequence[Item]) -> None:
        """See append()."""

    @abstractmethod
    async def alatest(self, key: SessionKey, limit: int | None) -> list[Item]:
        """See latest()."""

    @abstractmethod
    async def apop(self, key: SessionKey) -> Item | None:
        """See pop()."""

    @abstractmethod
    async def aclear(self, key: SessionKey) -> int:
        """See clear()."""

    @abstractmethod
    async def apage(
        self,
        key: SessionKey,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page:
        """See page()."""

    @property
    @abstractmethod
    def directory(self) -> Directory:
        """The rows that say which sessions this alias has, and whose they are."""

    @property
    @abstractmethod
    def threads(self) -> DatabaseThreads:
        """The threads in which async callers reach the directory's database."""

    def check(self) -> list[checks.CheckMessage]:
        """Report what is wrong with the configuration, each with a hint."""
        return []

    def check_databases(self, databases: Sequence[str]) -> list[checks.CheckMessage]:
        """Report what only queries can tell, in the databases that may be queried."""
        return []

    def close(self) -> None:  # noqa: B027 - most stores hold nothing to close
        """Let go of clients and threads; the next use makes new ones."""
