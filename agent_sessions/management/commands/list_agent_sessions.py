from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from agent_sessions.management.printing import PrintingCommand, json_list, moment, table
from agent_sessions.management.selecting import (
    add_limit,
    add_options,
    add_selection,
    find_named,
    read_selection,
)
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded
from agent_sessions.retention import Selection
from agent_sessions.times import iso

HEADS = (
    "session",
    "user",
    "backend",
    "items",
    "tokens in",
    "out",
    "state",
    "used",
    "made",
)


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
        add_limit(parser, 100, "how many to list")
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
        titles = options["titles"]
        if options["json"]:
            for line in json_list(_as_json(row, titles=titles) for row in rows):
                self.stdout.write(line)
            return
        heads = (*HEADS, "title") if titles else HEADS
        cells = (_cells(row, titles=titles) for row in rows)
        first = next(cells, None)
        if first is None:
            self.stdout.write("There are no such sessions.")
            return
        for line in table(heads, chain([first], cells)):
            self.stdout.write(line)


def _rows(selection: Selection) -> Iterator[AgentSession]:
    if selection.session_ids:
        yield from find_named(selection, undone="Nothing was listed.")
        return
    for query in selection.queries():
        ordered = query.order_by("-active_on", "-pk").select_related("user")
        yield from ordered.defer("metadata").iterator(chunk_size=500)


def _cells(row: AgentSession, *, titles: bool) -> tuple[Any, ...]:
    return (
        row.session_id,
        "-" if row.user is None else row.user.get_username(),
        row.backend,
        row.item_count,
        row.input_tokens,
        row.output_tokens,
        row.state,
        moment(row.updated_at),
        moment(row.created_at),
        *((row.title,) if titles else ()),
    )


def _as_json(row: AgentSession, *, titles: bool) -> dict[str, Any]:
    return {
        "id": row.session_id,
        "backend": row.backend,
        "user": None if row.user is None else row.user.get_username(),
        "items": row.item_count,
        "input_tokens": row.input_tokens,
        "output_tokens": row.output_tokens,
        "state": row.state,
        "updated_at": iso(row.updated_at),
        "created_at": iso(row.created_at),
        "expires_at": None if row.expires_at is None else iso(row.expires_at),
        **({"title": row.title} if titles else {}),
    }
