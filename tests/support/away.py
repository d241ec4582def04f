"""A database that is away, for every thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

COMMIT: Any = BaseDatabaseWrapper.commit


class Outage:
    """A database that goes away at its statement number `at`, and comes back.

    Where it `commits`, that is the commit of this number: it is done, and its answer
    lost.
    """

    def __init__(self, at: int = 1, *, commits: bool = False) -> None:
        self.at = at
        self.commits = commits
        self.seen = 0
        self._is_over = False

    @property
    def began(self) -> bool:
        """Whether a statement has failed."""
        return self.seen >= self.at

    def end(self) -> None:
        """Bring the database back."""
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
            patched = [(BaseDatabaseWrapper, "commit"), *((cursor, n) for n in names)]
            for kind, name in patched:
                around = self._around(getattr(kind, name))
                stack.enter_context(mock.patch.object(kind, name, around))
            yield

    def _around(self, execute: Any) -> Any:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            is_commit = execute is COMMIT or args[1:2] == ("COMMIT",)
            self.seen += is_commit or not self.commits
            if self.commits and is_commit and self.seen == self.at:
                execute(*args, **kwargs)
            if self.began and not self._is_over:
                raise OperationalError("server closed the connection unexpectedly")
            return execute(*args, **kwargs)

        return maybe


@contextmanager
def database_away() -> Iterator[None]:
    """Make each statement fail as it does if the server can't be reached."""
    with Outage().watched():
        yield
