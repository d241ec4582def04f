"""A history's items: appended, read, and taken from its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Exists, F, OuterRef, QuerySet
from django.utils import timezone

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.database.lineage import family, walk
from agent_sessions.backends.database.sql.base import AnyBatch, Statement
from agent_sessions.backends.directory import active
from agent_sessions.backends.keys import Asking, anything
from agent_sessions.exceptions import StorageError
from agent_sessions.items import Item, StoredItem, decode, decode_all
from agent_sessions.items.kinds import is_opening
from agent_sessions.models import MAIN_BRANCH, AgentSession, Branch, SessionItem

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

# More items than these are encoded or decoded in a thread: the loop has others to serve.
MANY = 100
# How many rows a pop looks at first; more only behind unreadable ones.
_WINDOW = 4

# A row's JSON, which a driver may give as it came over the wire.
Text = str | bytes
Rows = Sequence[Sequence[Any]]
# Executes a statement that reads; None where a thread has to.
Ask = Callable[[str, Sequence[Any]], Awaitable[Rows | None]]

# -- appending -------------------------------------------------------------------------


def append_batch(
    engine: Engine, key: SessionKey, batch: AnyBatch, *, is_first: bool = False
) -> None:
    """Store a batch; `is_first` says that no row was found for it.

    Raises StorageError, and what assert_own() and create() do.
    """
    try:
        _write(engine, key, batch, is_first)
    except (StorageError, UnicodeEncodeError) as exc:
        narrowed = engine.statements.narrowed(batch, exc)
        if narrowed is None:
            raise
        _write(engine, key, narrowed, is_first)


def _write(engine: Engine, key: SessionKey, batch: AnyBatch, is_first: bool) -> None:
    statements = engine.statements
    # In a transaction the row of a session with a branch that is named is held first.
    alone = key.branch is None and statements.appends_alone(engine.connection, batch)

    def write(connection: BaseDatabaseWrapper) -> bool:
        return statements.append(connection, key, batch, timezone.now())

    def begin(connection: BaseDatabaseWrapper) -> bool:
        # A run makes no session. Its branch may have been made while it waited.
        if key.fence is not None and write(connection):
            return True
        engine.directory.create(key)
        return write(connection)

    if is_first and engine.run(begin):
        return
    while not (engine.run(write, alone=alone) or engine.run(begin)):
        pass


# -- reading ---------------------------------------------------------------------------


class Reading:
    """A read of a session's newest items, wherever its statements are executed.

    An event loop may begin, and a thread go on with the rows that it has.
    """

    def __init__(self, engine: Engine, key: SessionKey, limit: int | None) -> None:
        self.key = key
        self._engine = engine
        self._limit = limit
        # The newest rows' texts, and what they hold, oldest first.
        self.texts: list[Text] = []
        self._items: list[Item] = []
        self._is_done = False
        # Whether the key's own session and branch are there, as far as was looked.
        self._is_found = True
        self._steps = self._newest()
        self._statement = next(self._steps)

    async def begin(self, ask: Ask) -> list[Item]:
        """Read in the loop as far as it may."""
        rows = await ask(*self._statement)
        while rows is not None and len(rows) <= MANY:
            self._advance(rows)
            if self._is_done:
                break
            rows = await ask(*self._statement)
        if self._is_done and self._is_found:
            return self._items
        return await self._engine.threads.run(self.finish, rows)

    def finish(self, rows: Rows | None = None) -> list[Item]:
        """Read what is left; `rows` are those of the statement that is next.

        Raises StorageError, and what assert_own() does.
        """
        engine = self._engine
        while not self._is_done:
            if rows is None:
                execute = partial(engine.statements.rows, statement=self._statement)
                rows = engine.run(execute, alone=True)
            self._advance(rows)
            rows = None
        if not self._is_found:
            engine.run(lambda connection: engine.directory.assert_own(self.key))
        return self._items

    def _advance(self, rows: Rows) -> None:
        try:
            self._statement = self._steps.send(rows)
        except StopIteration:
            self._is_done = True

    def _newest(self) -> Generator[Statement, Rows, None]:
        window = self._limit
        while True:
            yield from self._window(window)
            items = decode_all(reversed(self.texts))
            if self._limit is None or window is None:
                self._items = items
                return
            if len(items) >= self._limit or len(self.texts) < window:
                self._items = items[-self._limit :]
                return
            # Unreadable rows don't count: look further back.
            window *= 2

    def _window(self, window: int | None) -> Generator[Statement, Rows, None]:
        """Read the newest rows that a branch shows, newest first."""
        key, statements = self.key, self._engine.statements
        own = yield statements.latest(key, window)
        self.texts = [row[0] for row in own]
        # Each row tells its branch and that one's parent.
        if own and (len(own) == window or own[0][2] is None):
            return
        found = yield statements.lineage(key)
        current = found[0][0] if found else None
        if current is None and (found or key.branch not in {None, MAIN_BRANCH}):
            self._is_found = False
            return
        if own and own[0][1] != current:
            # Somebody has switched to another branch meanwhile.
            yield from self._window(window)
            return
        branches = family(row[1:] for row in found)
        ancestors = () if current is None else walk(branches, current)[1:]
        if ancestors:
            # As many as the window has, though fewer are needed: the same statement
            # each time.
            rows = yield statements.inherited(ancestors, window)
            if window is None:
                # The database would copy a whole history to sort it.
                rows = sorted(rows, key=itemgetter(1), reverse=True)
            self.texts = [*self.texts, *(row[0] for row in rows)][:window]


def read_page(
    branches: Branches, *, before: int | None, after: int | None, limit: int
) -> Page:
    """Read a stretch of a history, oldest first, and whether more lies around it."""
    branch = branches.current()
    if branch is None:
        return Page([], False)
    rows = partial(branches.items, branch)
    columns = ("position", "turn", "data", "created_at")
    if after is None:
        bound = {} if before is None else {"upto": before - 1}
        wanted = rows(**bound).order_by("-position").values_list(*columns)
        found = list(wanted[: limit + 1])
        has_earlier = len(found) > limit
        found = found[:limit][::-1]
        has_later = before is not None and _any(rows(after=before - 1), "position")
    else:
        wanted = rows(after=after).order_by("position").values_list(*columns)
        found = list(wanted[: limit + 1])
        has_later = len(found) > limit
        found = found[:limit]
        has_earlier = after > 0 and _any(rows(upto=after), "-position")
    items = [
        StoredItem(position, turn, decode(data), data, created_at)
        for position, turn, data, created_at in found
    ]
    return Page(items, has_earlier, has_later)


def _any(rows: QuerySet[Any], order: str) -> bool:
    """Return whether there are rows; with an order, an index finds the first one."""
    return rows.order_by(order).values_list("position").first() is not None


# -- popping ---------------------------------------------------------------------------


class _PassedOver(Exception):
    """The newest row is to stay, but it has been taken in this transaction."""


def pop_newest(
    engine: Engine, key: SessionKey, asking: Asking = anything
) -> Item | None:
    """Take the newest readable item that is accepted, in a transaction."""
    take = partial(_take, engine, key, asking)
    try:
        return engine.run(partial(take, at_once=True))
    except _PassedOver:
        return engine.run(partial(take, at_once=False))


def _take(
    engine: Engine,
    key: SessionKey,
    asking: Asking,
    connection: BaseDatabaseWrapper,
    *,
    at_once: bool,
) -> Item | None:
    held = engine.lock(connection, key)
    if held is None:
        return None
    accept = asking()
    text = None
    if at_once and key.branch is None:
        text = engine.statements.take_newest(connection, held)
    if text is not None:
        item = decode(text)
        if item is None or not accept(item):
            raise _PassedOver
        return item
    return _take_after_a_look(engine.branches(key, held), held.pk, accept)


def _take_after_a_look(
    branches: Branches, session: int, accept: Callable[[Item], bool]
) -> Item | None:
    """Take the newest readable item from a session whose row is held.

    One that isn't accepted is passed over like an unreadable one.
    Unreadable rows are passed over and kept: a pop must not destroy what a repair
    or the right key could still read. What a branch has from its parent stays there:
    the branch then ends earlier.
    """
    branch = branches.current()
    if branch is None:
        return None
    columns = ("pk", "branch_id", "position", "turn", "data", "type", "role")
    children = Branch.objects.using(branches.using).filter(
        parent_id=OuterRef("branch_id"), fork_position__gte=OuterRef("position")
    )
    rows = branches.items(branch).order_by("-position")
    rows = rows.values_list(*columns, Exists(children))
    seen, window = 0, _WINDOW
    while True:
        found = list(rows[seen:window])
        for pk, owner, position, turn, data, kind, role, is_shared in found:
            item = decode(data)
            if item is None or not accept(item):
                continue
            opens = is_opening(kind, role)
            before = max(turn - 1, 0) if opens else turn
            if owner != branch.pk or is_shared:
                branches.replace(branch, position - 1, before)
            else:
                SessionItem._base_manager.using(branches.using).filter(pk=pk).delete()
                AgentSession.objects.using(branches.using).filter(pk=session).update(
                    item_count=F("item_count") - 1, **active(timezone.now())
                )
                if opens:
                    own = Branch._base_manager.using(branches.using).filter(
                        pk=branch.pk
                    )
                    own.update(turn=before)
            return item
        if seen + len(found) < window:
            return None
        seen, window = window, window * 2
