"""What a branch shows, its ancestors' items among it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.base import Page, SessionKey
from agent_sessions.backends.database.answers import Own, Text, own_rows, read_lineage
from agent_sessions.backends.database.branches import Branches
from agent_sessions.items import Item, StoredItem, decode, decode_all
from agent_sessions.models import MAIN_BRANCH

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine

# More items than these are encoded or decoded in a thread: the loop has others to serve.
MANY = 100

# Executes a statement that reads; None where a thread has to.
Ask = Callable[[str, Sequence[Any]], Awaitable[Sequence[Sequence[Any]] | None]]


async def aread_newest(
    engine: Engine, ask: Ask, asked: tuple[SessionKey, int | None]
) -> tuple[list[Item] | None, Own | None]:
    """Read the newest items, or None and the rows from which a thread goes on."""
    statement = engine.statements.latest_statement(*asked)
    rows = await ask(*statement)
    if rows is None:
        return None, None
    own = own_rows(rows)
    if len(rows) > MANY:
        return None, own
    texts = await _shown(engine, ask, asked, own)
    if texts is None:
        return None, own
    items = decode_all(reversed(texts))
    # Unreadable rows don't count: a thread looks further back.
    return (items if len(items) == len(texts) else None), own


async def _shown(
    engine: Engine, ask: Ask, asked: tuple[SessionKey, int | None], own: Own
) -> list[Text] | None:
    """Read what a branch shows beside its own rows; None where a thread has to."""
    key, limit = asked
    if own.is_all(limit):
        return own.texts
    if own.branch_id is None or limit is None:
        return None
    statements = engine.statements
    family = await ask(*statements.lineage_statement(key))
    segments = read_lineage(family or ())
    if not segments or segments[0].branch_id != own.branch_id:
        return None
    rows = await ask(*statements.inherited_statement(segments[1:], limit))
    if rows is None:
        return None
    return [*own.texts, *(row[0] for row in rows)][:limit]


def read_newest(
    engine: Engine,
    key: SessionKey,
    limit: int | None,
    own: Own | None = None,
) -> list[Item]:
    """Read the newest items, oldest first; `own` are those of the branch, once read."""

    def read(connection: BaseDatabaseWrapper) -> list[Item]:
        window, found = limit, own
        while True:
            texts = _texts(engine, connection, (key, window), found)
            if engine.transport is not None:
                engine.transport.learn(key, texts)
            items = decode_all(reversed(texts))
            if limit is None or window is None:
                return items
            if len(items) >= limit or len(texts) < window:
                return items[-limit:]
            # Unreadable rows don't count: look further back.
            window, found = window * 2, None

    return engine.run(read, alone=True)


def _texts(
    engine: Engine,
    connection: BaseDatabaseWrapper,
    asked: tuple[SessionKey, int | None],
    own: Own | None,
) -> list[Text]:
    """Read the newest rows that a branch shows, newest first."""
    key, window = asked
    statements = engine.statements
    if own is None:
        own = statements.latest(connection, key, window)
    if own.is_all(window):
        return own.texts
    segments = statements.lineage(connection, key)
    if segments is None or not (segments or key.branch in {None, MAIN_BRANCH}):
        engine.directory.assert_own(key)
        return own.texts
    if own.branch_id not in {None, *(segment.branch_id for segment in segments[:1])}:
        # Somebody has switched to another branch meanwhile.
        return _texts(engine, connection, asked, None)
    ancestors = segments[1:]
    if not ancestors:
        return own.texts
    # As many as the window has, though fewer are needed: the same statement each time.
    texts = [*own.texts, *statements.inherited(connection, ancestors, window)]
    return texts[:window]


def read_page(
    branches: Branches, *, before: int | None, after: int | None, limit: int
) -> Page:
    """Read a stretch of a history, oldest first, and whether more lies around it."""
    branch = branches.current()
    if branch is None:
        return Page([], False)
    rows = branches.items(branch)
    wanted = rows.values_list("position", "turn", "data", "created_at")
    if after is None:
        if before is not None:
            wanted = wanted.filter(position__lt=before)
        found = list(wanted.order_by("-position")[: limit + 1])
        has_earlier = len(found) > limit
        found = found[:limit][::-1]
        has_later = before is not None and rows.filter(position__gte=before).exists()
    else:
        wanted = wanted.filter(position__gt=after)
        found = list(wanted.order_by("position")[: limit + 1])
        has_later = len(found) > limit
        found = found[:limit]
        has_earlier = after > 0 and rows.filter(position__lte=after).exists()
    items = [
        StoredItem(position, turn, decode(data), data, created_at)
        for position, turn, data, created_at in found
    ]
    return Page(items, has_earlier, has_later)
