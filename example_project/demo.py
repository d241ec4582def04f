"""Serve the demo on this machine: ``python -m example_project.demo``."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import suppress

HOST = "127.0.0.1"


class DemoError(Exception):
    """The demo can't start; the message says why and what to do."""


def main() -> int:
    """Migrate, make the two users, say where it is and serve until Ctrl-C."""
    try:
        port = _port()
        listener = _listener(port)
    except DemoError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    with listener:
        _prepare()
        _announce(port)
        _serve(listener)
    return 0


def _port() -> int:
    wanted = os.environ.get("PORT") or "8000"
    if len(wanted) < 6 and wanted.isdecimal() and 0 < int(wanted) < 65536:
        return int(wanted)
    raise DemoError(f"PORT must be a number from 1 to 65535, not {wanted!r}.")


def _listener(port: int) -> socket.socket:
    """Take the port before anything else is done."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        why = (
            "is in use by another program"
            if error.errno == errno.EADDRINUSE
            else f"can't be used ({error.strerror})"
        )
        other = 8123 if port != 8123 else 8124
        raise DemoError(
            f"Port {port} {why}: choose another with PORT={other} make demo."
        ) from error
    return listener


def _prepare() -> None:
    """Set Django up, migrate and make the users."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")
    # Both are safe only because nothing but this machine reaches the address.
    os.environ.setdefault("DJANGO_DEBUG", "1")
    os.environ.setdefault("DEMO_LOGIN", "1")
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", interactive=False, verbosity=0)
    _make_users()


def _make_users() -> None:
    from django.contrib.auth import get_user_model

    from example_project import state

    for name, password in state.passwords().items():
        user, _ = get_user_model().objects.get_or_create(username=name)
        user.is_staff = user.is_superuser = name == "admin"
        if not user.check_password(password):
            user.set_password(password)
        user.save()


def _announce(port: int) -> None:
    from example_project import model_choice, state

    address = f"http://{HOST}:{port}"
    lines = [
        "",
        f"  Chat    {address}",
        *(
            f"          user {name!r}, password {password!r}"
            for name, password in state.passwords().items()
        ),
        f"  Admin   {address}/admin/ (as 'admin')",
        f"  Model   {model_choice.label()}",
        "",
        "  Ctrl-C stops it; conversations are kept.",
        "",
        "",
    ]
    sys.stdout.write("\n".join(lines))
    sys.stdout.flush()


def _serve(listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        "example_project.asgi:application",
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    # uvicorn has shut down by then and only repeats the signal, which some shells have
    # told their background processes to pass over.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    sys.stdout.write("\n  Stopped.\n")


if __name__ == "__main__":
    sys.exit(main())
