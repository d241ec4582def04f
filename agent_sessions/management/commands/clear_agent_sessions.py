from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from django.utils.translation import ngettext

from agent_sessions import clearing
from agent_sessions.backends.base import BaseSessionBackend, make_key
from agent_sessions.exceptions import AgentSessionError, InvalidSessionId
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.models import AgentSession

# Ids of one query; databases limit how many values it takes.
CHUNK = 500
# Exit codes beside 0 and CommandError's 1, where nothing was written.
INCOMPLETE = 3


class Command(BaseCommand):
    help = (
        "Remove all items of the named sessions. Nothing is written if one of them "
        "doesn't exist. A session with an active run is left out. Exit codes: 0 all "
        "done, 1 nothing written, 3 some sessions were left as they are."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "session_ids", nargs="+", metavar="SESSION_ID", help="a session to clear"
        )
        parser.add_argument(
            "--backend",
            default=DEFAULT_ALIAS,
            help="alias of AGENT_SESSIONS that has the sessions (default: default)",
        )
        parser.add_argument("--user", help="name of the user who owns them all")
        parser.add_argument(
            "--delete",
            action="store_true",
            help="delete the sessions themselves too, not only their items",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="write nothing, say what would be"
        )
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="don't ask before more than one session",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity: int = options["verbosity"]
        try:
            backend = sessions[options["backend"]]
        except AgentSessionError as exc:
            raise CommandError(str(exc)) from exc
        owner = _find_user(options["user"]) if options["user"] is not None else None
        rows = _find_rows(backend, options["session_ids"], owner)
        busy = [row for row in rows if clearing.has_active_run(row)]
        idle = [row for row in rows if row not in busy]
        for row in busy:
            self.stderr.write(
                f"{row.session_id}: left out, because run {row.run_id} is active."
            )
        if options["dry_run"]:
            self._tell("Would clear", idle, sum(row.item_count for row in idle))
            failed = 0
        else:
            if options["interactive"] and len(idle) > 1:
                self._ask(idle, delete=options["delete"])
            failed = self._clear(idle, delete=options["delete"])
        if busy or failed:
            count = len(busy) + failed
            raise CommandError(
                ngettext(
                    "%d session was left as it is.",
                    "%d sessions were left as they are.",
                    count,
                )
                % count,
                returncode=INCOMPLETE,
            )

    def _clear(self, rows: list[AgentSession], *, delete: bool) -> int:
        """Clear rows one by one; tell how many could not be."""
        remove = clearing.delete if delete else clearing.clear
        done: list[AgentSession] = []
        items = 0
        for row in rows:
            try:
                items += remove(row)
            except AgentSessionError as exc:
                self.stderr.write(f"{row.session_id}: {exc}")
            else:
                done.append(row)
        self._tell("Deleted" if delete else "Cleared", done, items)
        return len(rows) - len(done)

    def _ask(self, rows: list[AgentSession], *, delete: bool) -> None:
        items = sum(row.item_count for row in rows)
        question = (
            f"{'Delete' if delete else 'Clear'} {len(rows)} sessions with {items} "
            "items? This can't be undone. [y/N] "
        )
        try:
            answer = input(question)
        except EOFError:
            raise CommandError(
                "There is nobody to ask. Use --noinput to go on without."
            ) from None
        if answer.strip().lower() not in {"y", "yes"}:
            raise CommandError("Cancelled; nothing was written.")

    def _tell(self, done: str, rows: list[AgentSession], items: int) -> None:
        if self.verbosity:
            named = ngettext("%d session", "%d sessions", len(rows)) % len(rows)
            counted = ngettext("%d item", "%d items", items) % items
            self.stdout.write(f"{done} {named} with {counted}.")


def _find_user(name: str) -> Any:
    """Find an owner by the name that people log in with."""
    model = get_user_model()
    try:
        return model._default_manager.get_by_natural_key(name)
    except model.DoesNotExist:
        raise CommandError(f"There is no user {name!r}.") from None


def _find_rows(
    backend: BaseSessionBackend, session_ids: list[str], owner: Any
) -> list[AgentSession]:
    """Find the sessions in the order given. Raises CommandError naming the others."""
    wanted = list(dict.fromkeys(session_ids))
    found: dict[str, AgentSession] = {}
    for ids in _storable(wanted):
        rows = AgentSession.objects.using(backend.directory.using).filter(
            backend=backend.alias, session_id__in=ids
        )
        if owner is not None:
            rows = rows.filter(user_id=owner.pk)
        found |= {row.session_id: row for row in rows}
    if unknown := [name for name in wanted if name not in found]:
        whose = "" if owner is None else f" of {owner.get_username()}"
        raise CommandError(
            f"The backend {backend.alias!r} has no such session{whose}: "
            f"{', '.join(map(repr, unknown))}. Nothing was written."
        )
    return [found[name] for name in wanted]


def _storable(session_ids: list[str]) -> Iterator[list[str]]:
    """Give the ids that a database can look for, in chunks."""
    ids = [name for name in session_ids if _is_storable(name)]
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK]


def _is_storable(session_id: str) -> bool:
    try:
        make_key(session_id, None)
    except InvalidSessionId:
        return False
    return True
