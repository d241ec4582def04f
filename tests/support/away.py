"""A database that is away, for every thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper


class Outage:
    """A database that goes away at its statement number `at`, and comes back."""

    def __init__(self, at: int = 1) -> None:
        self.at = at
        self.seen = 0
        self._is_over = False

    @property
    def began(self) -> bool:
        """Whether a statement has failed."""
        return self.seen >= self.at

    def end(self) -> None:
        """Let the database answer again."""
        self._is_over = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count statements, and refuse those that come in the outage."""
        cursor, names = CursorWrapper, ("_execute", "_executemany")
        with ExitStack() as stack:
            # So ours are sent by Django's cursors too.
            stack.enter_context(
                mock.patch.object(BaseDatabaseWrapper, "queries_logged", True)
            )
            for name in names:
                around = self._around(getattr(cursor, name))
                stack.enter_context(mock.patch.object(cursor, name, around))
            yield

    def _around(self, execute: Any) -> Any:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if self.began and not self._is_over:
                raise OperationalError("server closed the connection unexpectedly")
            return execute(*args, **kwargs)

        return maybe


@contextmanager
def database_away() -> Iterator[None]:
    """Make each statement fail as it does if the server can't be reached."""
    with Outage().watched():
        yield
