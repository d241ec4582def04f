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
from agent_sessions.reports import guarded
from agent_sessions.retention import Selection
from agent_sessions.times import iso

# The heads of the table, by what is beneath each.
HEADS = {
    "id": "session",
    "user": "user",
    "backend": "backend",
    "items": "items",
    "input_tokens": "tokens in",
    "output_tokens": "out",
    "state": "state",
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

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        limit = options["limit"]
        rows = _rows(read_selection(options, state=options["state"] or ""))
        self._print(islice(rows, limit or None), options)
        if limit and next(rows, None) is not None:
            self.stderr.write(f"There are more than {limit}; --limit 0 lists all.")

    def _print(self, rows: Iterator[AgentSession], options: dict[str, Any]) -> None:
        facts = (_facts(row, titles=options["titles"]) for row in rows)
        if options["json"]:
            for line in json_list(_as_json(each) for each in facts):
                self.stdout.write(line)
            return
        heads = HEADS | ({"title": "title"} if options["titles"] else {})
        cells = (tuple(_cell(each[name]) for name in heads) for each in facts)
        first = next(cells, None)
        if first is None:
            self.stdout.write("There are no such sessions.")
            return
        for line in table(tuple(heads.values()), chain([first], cells)):
            self.stdout.write(line)


def _rows(selection: Selection) -> Iterator[AgentSession]:
    if selection.session_ids:
        yield from find_named(selection, undone="Nothing was listed.")
        return
    for query in selection.queries():
        ordered = query.order_by("-active_on", "-pk").select_related("user")
        yield from ordered.defer("metadata").iterator(chunk_size=500)


def _facts(row: AgentSession, *, titles: bool) -> dict[str, Any]:
    return {
        "id": row.session_id,
        "backend": row.backend,
        "user": None if row.user is None else row.user.get_username(),
        "items": row.item_count,
        "input_tokens": row.input_tokens,
        "output_tokens": row.output_tokens,
        "state": row.state,
        "updated_at": row.updated_at,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        **({"title": row.title} if titles else {}),
    }


def _as_json(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: iso(value) if isinstance(value, datetime) else value
        for name, value in facts.items()
    }


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return moment(value)
    return "-" if value is None else value
