from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from agent_sessions.backends.database.removal import BATCH_SIZE
from agent_sessions.clearing import Selection
from agent_sessions.clearing.erasure import Receipt, erase_user
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.management.selecting import count, counted, find_user
from agent_sessions.reports import guarded

# Exit codes beside 0: something is left, or nothing was done at all.
LEFT = 1
NOT_DONE = 2


class Command(BaseCommand):
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
        path = None if options["receipt"] is None else _new_file(options["receipt"])
        receipt = Receipt.of(user)
        try:
            erase_user(user, receipt, batch_size=options["batch_size"])
        except AgentSessionError as exc:
            raise CommandError(str(exc), returncode=LEFT) from exc
        finally:
            # Also of what was done before it broke off.
            text = json.dumps(receipt.as_json(), indent=2)
            if path is None:
                self.stdout.write(text)
            else:
                path.write_text(f"{text}\n", encoding="utf-8")
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
            answer = input()
        except EOFError:
            raise CommandError(
                "There is nobody to ask. Use --noinput to go on without."
            ) from None
        if answer.strip().lower() not in {"y", "yes"}:
            raise CommandError("Cancelled; nothing was erased.")

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


def _new_file(name: str) -> Path:
    """Make the receipt's file before anything is erased. Raises CommandError."""
    path = Path(name)
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        raise CommandError(f"{path} is there already.", returncode=NOT_DONE) from None
    except OSError as exc:
        raise CommandError(
            f"Can't write {path}: {exc.strerror}.", returncode=NOT_DONE
        ) from exc
    return path
