"""The newest items of a branch, its ancestors' among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db.backends.base.base import BaseDatabaseWrapper

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.database.answers import Own, Text
from agent_sessions.items import Decode, Item
from agent_sessions.models import MAIN_BRANCH

if TYPE_CHECKING:
    from agent_sessions.backends.database.engine import Engine


def read_newest(
    engine: Engine,
    key: SessionKey,
    limit: int | None,
    own: Own | None,
    decode: Decode,
) -> list[Item]:
    """Read the newest items, oldest first; `own` are those of the branch, once read."""

    def read(connection: BaseDatabaseWrapper) -> list[Item]:
        window, found = limit, own
        while True:
            texts = _texts(engine, connection, (key, window), found)
            if engine.short_reads is not None:
                engine.short_reads.learn(key, texts)
            items = decode(reversed(texts))
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
