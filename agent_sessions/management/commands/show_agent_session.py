from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from django.core.management.base import CommandError

from agent_sessions.backends.base import BaseSessionBackend, SessionKey
from agent_sessions.backends.reading import read_history
from agent_sessions.items import StoredItem
from agent_sessions.management.options import add_options, find_named
from agent_sessions.management.printing import PrintingCommand, as_json, moment
from agent_sessions.models import AgentSession
from agent_sessions.retention import Selection, store_of
from agent_sessions.retention.selection import is_storable
from agent_sessions.transcript.markdown import markdown
from agent_sessions.transfer.export import describe_item, describe_session

_PAGE = 200


class Command(PrintingCommand):
    help = (
        "Show what was said in a session, oldest first, as Markdown that a terminal "
        "takes. Exit codes: 0 done, 1 there is no such session or it can't be read."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("session_id", metavar="SESSION_ID", help="whose items")
        add_options(
            parser,
            "--backend",
            help="alias of AGENT_SESSIONS that has it, where several have that id",
        )
        parser.add_argument(
            "--branch", metavar="NAME", help="another branch than the current one"
        )
        add_options(
            parser, "--limit", help="the last N items, 0 for all (default: 100)"
        )
        add_options(parser, "--json", help="print a JSON object")

    def handle(self, *args: Any, **options: Any) -> None:
        row = _find(options)
        backend, key = store_of(row)
        branch = options["branch"]
        if branch is not None:
            if backend.in_database is None:
                raise CommandError(
                    f"The backend {row.backend!r} keeps no branches; leave "
                    "--branch out."
                )
            # Databases refuse to look for other names.
            if not is_storable(branch):
                raise CommandError(f"There is no branch {branch!r}.")
            key = replace(key, branch=branch)
        items = _items(backend, key, options["limit"])
        for line in (_as_json if options["json"] else _as_text)(row, items):
            self.stdout.write_lines(line)


def _find(options: dict[str, Any]) -> AgentSession:
    selection = Selection((options["session_id"],), tuple(options["backend"]))
    rows = find_named(selection, undone="Nothing was shown.")
    if len(rows) > 1:
        aliases = ", ".join(sorted(row.backend for row in rows))
        raise CommandError(
            f"Several backends have a session of that id: {aliases}. Name one with "
            "--backend."
        )
    return rows[0]


def _as_text(row: AgentSession, items: Iterator[StoredItem]) -> Iterator[str]:
    facts = (
        ("Backend", row.backend),
        ("Owner", "" if row.user is None else row.user.get_username()),
        ("Title", row.title),
        ("State", row.state),
        ("Items", str(row.item_count)),
        ("Created", moment(row.created_at)),
        ("Last activity", moment(row.updated_at)),
    )
    return markdown(items, title=row.session_id, facts=facts)


def _as_json(row: AgentSession, items: Iterator[StoredItem]) -> Iterator[str]:
    """Return the lines of one JSON object, an item a line."""
    session = describe_session(row) | {"backend": row.backend}
    yield f'{{"session": {as_json(session)}, "items": ['
    before = ""
    for item in items:
        if before:
            yield f"{before},"
        before = describe_item(item)
    if before:
        yield before
    yield "]}"


def _items(
    backend: BaseSessionBackend, key: SessionKey, limit: int
) -> Iterator[StoredItem]:
    """Read the last items of a history, or all; the oldest first."""
    after, first = 0, None
    # In pages: they needn't fit in memory together.
    while limit > 0:
        page = backend.page(key, before=first, limit=min(limit, _PAGE))
        if not page.items:
            break
        first = page.items[0].position
        after = first - 1
        limit -= len(page.items)
        if not page.has_earlier:
            break
    yield from read_history(backend, key, after=after)
