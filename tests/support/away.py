"""A database that is away, for Django's own cursors in every thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest import mock

from django.db import OperationalError
from django.db.backends.utils import CursorWrapper


@contextmanager
def database_away() -> Iterator[None]:
    """Make each statement fail as it does if the server can't be reached."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OperationalError("server closed the connection unexpectedly")

    with (
        mock.patch.object(CursorWrapper, "_execute", refuse),
        mock.patch.object(CursorWrapper, "_executemany", refuse),
    ):
        yield
