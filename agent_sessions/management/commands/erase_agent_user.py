from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import IO, Any

from django.core.management.base import CommandError
from django.db import DatabaseError

from agent_sessions.backends.database.removal import BATCH_SIZE
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.management.files import open_exclusively, unwritable
from agent_sessions.management.printing import PrintingCommand, as_json
from agent_sessions.management.selecting import count, counted, find_user
from agent_sessions.reports import guarded
from agent_sessions.retention import Selection
from agent_sessions.retention.erasure import Receipt, erase_user

# Exit codes beside 0: something is left, or nothing was done at all.
LEFT = 1
NOT_DONE = 2


class Command(PrintingCommand):
    nothing_done = NOT_DONE
    help = (
        "Erase all sessions of a user, in every backend, with their items, runs and "
        "approvals, and print a receipt as JSON: what was erased, what could not be "
        "and why. The user stays. Run it again to go on with what was left. Exit "
        "codes: 0 everything is erased, 1 something is left, 2 nothing was done."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("user", metavar="USER", help="name of the user")
        parser.add_argument(
            "--receipt",
            metavar="FILE",
            help="write the receipt into this new file (default: standard output)",
        )
        parser.add_argument(
            "--batch-size",
            type=count,
            default=BATCH_SIZE,
            help="rows to delete in one transaction (default: %(default)s)",
        )
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="don't ask",
        )

    @guarded
    def handle(self, *args: Any, **options: Any) -> None:
        try:
            user = find_user(options["user"])
            if options["interactive"]:
                self._ask(user)
        except (AgentSessionError, CommandError) as exc:
            raise CommandError(str(exc), returncode=NOT_DONE) from exc
        # Made before anything is erased, and held: nobody puts another one there.
        file = None if options["receipt"] is None else _new_file(options["receipt"])
        receipt = Receipt.of(user)
        try:
            erase_user(user, receipt, batch_size=options["batch_size"])
        except AgentSessionError as exc:
            raise CommandError(str(exc), returncode=LEFT) from exc
        except DatabaseError as exc:
            # The driver's own words may quote contents, so only its kind is told.
            raise CommandError(
                f"The database refused the call ({type(exc).__name__}). Run the same "
                "command again to go on.",
                returncode=LEFT,
            ) from exc
        finally:
            # Also of what was done before it broke off.
            self._write(receipt, file)
        self._tell(receipt, options["verbosity"])

    def _ask(self, user: Any) -> None:
        totals = Selection(user=user).totals()
        question = (
            f"Erase {counted(totals.sessions, 'session')} of {user.get_username()} "
            f"with {counted(totals.items, 'item')}? This can't be undone. [y/N] "
        )
        # Standard output is the receipt's.
        self.stderr.write(question, self.style.NOTICE, ending="")
        try:
            answer = self.ask()
        except EOFError:
            raise CommandError(
                "There is nobody to ask. Use --noinput to go on without."
            ) from None
        if answer.strip().lower() not in {"y", "yes"}:
            raise CommandError("Cancelled; nothing was erased.")

    def _write(self, receipt: Receipt, file: IO[bytes] | None) -> None:
        text = as_json(receipt.as_json(), indent=2)
        if file is not None:
            try:
                with file:
                    file.write(f"{text}\n".encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as exc:
                # What was done is told all the same.
                self.stderr.write(f"{unwritable(file.name, exc)} The receipt follows.")
            else:
                return
        self.stdout.write_lines(text)

    def _tell(self, receipt: Receipt, verbosity: int) -> None:
        if verbosity:
            items = sum(each.items for each in receipt.erased)
            self.stderr.write(
                f"Erased {counted(len(receipt.erased), 'session')} with "
                f"{counted(items, 'item')}."
            )
        if not receipt.is_complete:
            are = "is" if len(receipt.left) == 1 else "are"
            raise CommandError(
                f"{counted(len(receipt.left), 'session')} {are} left; the receipt says "
                "why. Run the command again to go on.",
                returncode=LEFT,
            )


def _new_file(name: str) -> IO[bytes]:
    try:
        return open_exclusively(Path(name))
    except CommandError as exc:
        raise CommandError(str(exc), returncode=NOT_DONE) from exc
