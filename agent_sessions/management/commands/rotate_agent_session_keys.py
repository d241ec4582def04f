from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from typing import Any, cast

from django.core.management.base import CommandError
from django.db import DatabaseError

from agent_sessions.backends.encrypted import EncryptedBackend
from agent_sessions.backends.encrypted.rotation import Rotated, Rotation
from agent_sessions.clearing import Selection
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.handler import sessions
from agent_sessions.importing.progress import Progress
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.management.selecting import count, counted
from agent_sessions.reports import guarded

# Beside 0 and CommandError's 1, where nothing was written.
INCOMPLETE = 3


class Command(PrintingCommand):
    help = (
        "Encrypt what encrypted backends store under the first of their keys, also "
        "what is under older ones. Sessions may be written to meanwhile; positions, "
        "turns and times stay. A call that broke off is simply given again. Exit "
        "codes: 0 all is under the first key, 1 nothing was written, 3 something is "
        "still under another key."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--backend",
            action="append",
            default=[],
            metavar="ALIAS",
            help="only this encrypted alias of AGENT_SESSIONS; may be given again "
            "(default: all of them)",
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=500,
            help="rows to write in one transaction (default: %(default)s)",
        )
        parser.add_argument(
            "--progress",
            action=BooleanOptionalAction,
            help="show a progress bar (default: on a terminal)",
        )

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        self.options = options
        try:
            left = [alias for alias in self._aliases() if not self._rotate(alias)]
        except AgentSessionError as exc:
            raise CommandError(str(exc)) from exc
        except DatabaseError as exc:
            # The driver's own words may quote contents, so only its kind is told.
            raise CommandError(
                f"The database refused the call ({type(exc).__name__}). Run the same "
                "command again to go on.",
                returncode=INCOMPLETE,
            ) from exc
        if left:
            raise CommandError(
                f"Keep the older keys of {', '.join(left)}: not everything is under "
                "the first one.",
                returncode=INCOMPLETE,
            )

    def _aliases(self) -> list[str]:
        wanted: list[str] = self.options["backend"]
        for alias in wanted:
            if not isinstance(sessions[alias], EncryptedBackend):
                raise CommandError(
                    f"{alias} is no EncryptedBackend. Nothing was written."
                )
        found = wanted or [
            alias for alias in sessions if isinstance(sessions[alias], EncryptedBackend)
        ]
        if not found:
            raise CommandError("AGENT_SESSIONS has no EncryptedBackend.")
        return found

    def _rotate(self, alias: str) -> bool:
        """Rotate one alias; tell whether all of it is under the first key now."""
        backend = cast("EncryptedBackend", sessions[alias])
        selection = Selection(backends=(alias,))
        totals = selection.totals()
        shown = self.options["progress"]
        if shown is None:
            shown = bool(self.options["verbosity"]) and self.stderr.isatty()
        # Not self.stderr, which ends every line and colours it.
        bar = Progress(self.stderr.stream, totals.items) if shown else None
        done, number = Rotated(), 0
        for row in selection.rows():
            rotated = Rotation(backend, row).run(batch_size=self.options["batch_size"])
            done.add(rotated)
            number += bool(rotated.items or rotated.texts or rotated.keys)
            if bar is not None:
                bar.add(row.item_count)
        if bar is not None:
            bar.close()
        self._tell(alias, backend, done, number)
        return not done.left

    def _tell(
        self, alias: str, backend: EncryptedBackend, done: Rotated, number: int
    ) -> None:
        if self.options["verbosity"]:
            keys = f", and {counted(done.keys, 'session key')}" if done.keys else ""
            self.stdout.write(
                f"{alias}: {counted(done.items + done.texts, 'item')}{keys} of "
                f"{counted(number, 'session')} put under key "
                f"{backend.source.ring().first.id}."
            )
        for key_id, missing in sorted(done.unknown.items()):
            self.stderr.write(
                f"{alias}: {counted(missing, 'row')} under key {key_id}, which is not "
                "among the keys."
            )
        if done.fixed:
            self.stderr.write(
                f"{alias}: {counted(done.fixed, 'item')} under other keys, which "
                f"{type(backend.inner).__name__} can't rewrite. Copy the sessions to "
                "an alias of the new key with copy_agent_sessions."
            )
        if done.unreadable:
            self.stderr.write(
                f"{alias}: {counted(done.unreadable, 'row')} that don't open: they "
                "were not encrypted, were changed, or moved here."
            )
