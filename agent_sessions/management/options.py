"""The options by which every command chooses sessions, and what they say."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management.base import CommandError

from agent_sessions.backends.database.removal import BATCH_SIZE
from agent_sessions.backends.keys import is_text
from agent_sessions.backends.options import parse_age
from agent_sessions.models import AgentSession
from agent_sessions.owners import owners
from agent_sessions.retention import Selection

# The largest number that an option takes: databases count rows with it.
MOST = 2**31 - 1


def age(text: str) -> timedelta:
    try:
        return parse_age(text)
    except ValueError as exc:
        raise ArgumentTypeError(str(exc)) from None


def count(text: str, *, least: int = 1) -> int:
    """Read an option that is a whole number of 1 or more, or of `least`."""
    # Longer ones aren't even read: that takes long.
    short = text.isascii() and text.isdigit() and len(text) <= len(str(MOST))
    number = int(text) if short else -1
    if not least <= number <= MOST:
        raise ArgumentTypeError(
            f"it must be a whole number of {least} or more, up to {MOST}"
        )
    return number


# Options that several commands have; what differs is given to add_options().
_SHARED: dict[str, dict[str, Any]] = {
    "--backend": {
        "action": "append",
        "default": [],
        "metavar": "ALIAS",
        "help": "only sessions of this alias of AGENT_SESSIONS; may be given again "
        "(default: all)",
    },
    "--batch-size": {
        "type": count,
        "default": BATCH_SIZE,
        "help": "rows of one transaction (default: %(default)s)",
    },
    "--dry-run": {"action": "store_true", "help": "write nothing, say what would be"},
    "--json": {"action": "store_true"},
    "--limit": {"type": partial(count, least=0), "default": 100, "metavar": "N"},
    "--noinput": {"action": "store_false", "dest": "interactive", "help": "don't ask"},
    "--progress": {
        "action": BooleanOptionalAction,
        "help": "show a progress bar (default: on a terminal)",
    },
    "--user": {"metavar": "NAME", "help": "only sessions of the user of this name"},
}


# Those that choose sessions, beside their ids and owners.
_CHOOSING: dict[str, dict[str, Any]] = {
    "--older-than": {
        "type": age,
        "metavar": "AGE",
        "help": "only sessions whose last activity is longer ago: 30d, 12h, 1d12h",
    },
    "--idle": {
        "action": "store_true",
        "help": "only sessions idle for longer than the max_idle of their backend",
    },
    "--expired": {
        "action": "store_true",
        "help": "only sessions whose time is over, or that are older than the max_age "
        "of their backend; with --idle, one of both is enough",
    },
}


def add_options(parser: Any, *flags: str, **changes: Any) -> None:
    """Add options that several commands have; `changes` are arguments of each."""
    for flag in flags:
        names = [flag, *(["--no-input"] if flag == "--noinput" else [])]
        parser.add_argument(*names, **(_SHARED[flag] | changes))


def add_selection(parser: ArgumentParser, *, verb: str) -> None:
    parser.add_argument(
        "session_ids", nargs="*", metavar="SESSION_ID", help=f"a session to {verb}"
    )
    owners = parser.add_mutually_exclusive_group()
    add_options(owners, "--user")
    owners.add_argument(
        "--unowned", action="store_true", help="only sessions without an owner"
    )
    add_options(parser, "--backend")
    for flag, arguments in _CHOOSING.items():
        parser.add_argument(flag, **arguments)


def read_selection(options: dict[str, Any], **more: Any) -> Selection:
    """Read what the options choose. Raises CommandError for an unknown user."""
    return Selection(
        tuple(options["session_ids"]),
        tuple(options["backend"]),
        None if options["user"] is None else find_user(options["user"]),
        **{
            name: options[name] for name in ("unowned", "older_than", "idle", "expired")
        },
        **more,
    )


def read_rows(selection: Selection, *, undone: str) -> Iterable[AgentSession]:
    """Return the sessions that are chosen. Raises what find_named() does."""
    if selection.session_ids:
        return find_named(selection, undone=undone)
    return selection.rows()


def find_named(selection: Selection, *, undone: str) -> list[AgentSession]:
    """Find the named sessions. Raises CommandError that names those there aren't.

    `undone` says in the error what has not been done.
    """
    rows, unknown = selection.named()
    if not unknown:
        return rows
    names = ", ".join(map(repr, unknown))
    whose = "" if selection.user is None else f" of {selection.user.get_username()}"
    if len(selection.backends) == 1:
        where = f"The backend {selection.backends[0]!r} has no such session{whose}"
    else:
        where = f"There is no such session{whose}"
    raise CommandError(f"{where}: {names}. {undone}")


def find_user(name: str) -> Any:
    """Find an owner by the name that people log in with. Raises CommandError.

    That of a user whom the default manager leaves out counts too.
    """
    model: Any = get_user_model()
    users = owners()
    try:
        # Databases refuse to look for what they can't hold.
        if is_text(name):
            with suppress(model.DoesNotExist):
                return users.get(**{model.USERNAME_FIELD: name})
            # A project's own rule for names, such as one that ignores case.
            manager = model._default_manager.db_manager(users.db)
            return manager.get_by_natural_key(name)
    except model.MultipleObjectsReturned:
        raise CommandError(
            f"Several users are called {name!r}, some of them perhaps hidden. Give "
            "each a name of its own first."
        ) from None
    except (model.DoesNotExist, ValueError, ValidationError):
        pass
    raise CommandError(f"There is no user {name!r}.")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
