from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import IO, Any

from django.core.management.base import CommandError

from agent_sessions.management.files import open_exclusively, unwritable
from agent_sessions.management.options import add_options, counted, find_user
from agent_sessions.management.printing import PrintingCommand, as_json
from agent_sessions.retention import Selection
from agent_sessions.retention.erasure import Receipt, erase_user


class Command(PrintingCommand):
    # Something is left, or nothing was done at all.
    incomplete = 1
    nothing_done = 2
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
        add_options(parser, "--batch-size", "--noinput")

    def handle(self, *args: Any, **options: Any) -> None:
        user = find_user(options["user"])
        if options["interactive"]:
            totals = Selection(user=user).totals()
            # Standard output is the receipt's.
            self.stderr.write(
                f"Erase {counted(totals.sessions, 'session')} of {user.get_username()} "
                f"with {counted(totals.items, 'item')}? This can't be undone. [y/N] ",
                self.style.NOTICE,
                ending="",
            )
            self.confirm("", undone="erased")
        # Made before anything is erased, and held: nobody puts another one there.
        name = options["receipt"]
        file = None if name is None else open_exclusively(Path(name))
        self.receipt = Receipt.of(user)
        self.begun, self.stopped = True, self._stopped
        try:
            erase_user(user, self.receipt, batch_size=options["batch_size"])
        finally:
            # Also of what was done before it broke off.
            self._write(file)
        if options["verbosity"]:
            self.stderr.write(self._done())
        if left := len(self.receipt.left):
            raise CommandError(
                f"{counted(left, 'session')} {'is' if left == 1 else 'are'} left; the "
                "receipt says why. Run the command again to go on."
            )

    def _stopped(self) -> str:
        return f"Stopped. {self._done()} Run the same command again to go on."

    def _done(self) -> str:
        items = sum(each.items for each in self.receipt.erased)
        return (
            f"Erased {counted(len(self.receipt.erased), 'session')} with "
            f"{counted(items, 'item')}."
        )

    def _write(self, file: IO[bytes] | None) -> None:
        text = as_json(self.receipt.as_json(), indent=2)
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
