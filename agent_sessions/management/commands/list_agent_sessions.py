from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from datetime import datetime
from itertools import chain, islice
from typing import Any

from agent_sessions.management.options import (
    add_options,
    add_selection,
    find_named,
    read_selection,
)
from agent_sessions.management.printing import PrintingCommand, json_list, moment, table
from agent_sessions.models import AgentSession
from agent_sessions.retention import Selection

# The columns of the table, and the heads of those that have another name.
COLUMNS = (
    *("id", "user", "backend", "items", "input_tokens", "output_tokens", "state"),
    *("updated_at", "created_at"),
)
HEADS = {
    "id": "session",
    "input_tokens": "tokens in",
    "output_tokens": "out",
    "updated_at": "used",
    "created_at": "made",
}


class Command(PrintingCommand):
    help = (
        "List sessions, those with the newest activity first. Of what was said nothing "
        "is shown, but the title where --titles is given. Exit codes: 0 done, 1 there "
        "is no such session, user or backend."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_selection(parser, verb="list")
        parser.add_argument(
            "--state", choices=AgentSession.State.values, help="only sessions so far"
        )
        add_options(
            parser, "--limit", help="how many to list, 0 for all (default: 100)"
        )
        parser.add_argument(
            "--titles",
            action="store_true",
            help="show titles, which quote the first message",
        )
        add_options(parser, "--json", help="print a JSON list, a session a line")

    def handle(self, *args: Any, **options: Any) -> None:
        limit = options["limit"]
        rows = _rows(read_selection(options, state=options["state"] or ""), limit)
        facts = (
            _facts(row, titles=options["titles"]) for row in islice(rows, limit or None)
        )
        if options["json"]:
            for line in json_list(facts):
                self.stdout.write(line)
        elif (first := next(facts, None)) is None:
            self.stdout.write("There are no such sessions.")
        else:
            names = [*COLUMNS, *(["title"] if options["titles"] else [])]
            cells = (
                [_cell(each[name]) for name in names] for each in chain([first], facts)
            )
            for line in table([HEADS.get(name, name) for name in names], cells):
                self.stdout.write(line)
        if limit and next(rows, None) is not None:
            self.stderr.write(f"There are more than {limit}; --limit 0 lists all.")


def _rows(selection: Selection, limit: int) -> Iterator[AgentSession]:
    if selection.session_ids:
        yield from find_named(selection, undone="Nothing was listed.")
        return
    for query in selection.queries():
        ordered = query.order_by("-active_on", "-pk").select_related("user")
        if limit:
            # One more tells that there is more. MariaDB's driver reads all it asks for.
            ordered = ordered[: limit + 1]
        yield from ordered.defer("metadata").iterator(chunk_size=500)


def _facts(row: AgentSession, *, titles: bool) -> dict[str, Any]:
    names = ("input_tokens", "output_tokens", "state", "updated_at", "created_at")
    return {
        "id": row.session_id,
        "backend": row.backend,
        "user": None if row.user is None else row.user.get_username(),
        "items": row.item_count,
        **{name: getattr(row, name) for name in (*names, "expires_at")},
        **({"title": row.title} if titles else {}),
    }


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return moment(value)
    return "-" if value is None else value
