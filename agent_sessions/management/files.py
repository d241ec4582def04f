"""Files that commands write: private, whole or not there, and nobody else's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import mkstemp
from typing import IO

from django.core.management.base import CommandError


def open_exclusively(path: Path) -> IO[bytes]:
    """Make a file that is not there yet; nobody else may read it.

    Raises CommandError. No link is followed.
    """
    try:
        return open(path, "xb", opener=partial(os.open, mode=0o600))
    except FileExistsError:
        raise CommandError(f"{path} is there already.") from None
    except (OSError, ValueError) as exc:
        raise unwritable(path, exc) from exc


@contextmanager
def writing(path: Path, *, overwrite: bool) -> Iterator[IO[bytes]]:
    """Write a file that is there only once it is whole.

    It is written under a name that nobody can guess, and then takes its place: what
    was there stays until then, and stays where the block raises. Raises CommandError
    where the place is taken, and OSError.
    """
    _check_place(path, overwrite=overwrite)
    number, name = mkstemp(prefix=".agent-sessions-", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # Somebody may have taken the place meanwhile.
        _check_place(path, overwrite=overwrite)
        part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def unwritable(path: object, exc: Exception) -> CommandError:
    return CommandError(
        f"Can't write to {path}: {getattr(exc, 'strerror', None) or exc}."
    )


def _check_place(path: Path, *, overwrite: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise CommandError(f"{path} is a link. Name the file that it leads to.")
    if not stat.S_ISREG(mode):
        raise CommandError(
            f"{path} is no regular file. Name a file, or - for standard output."
        )
    if not overwrite:
        raise CommandError(f"{path} is there already. Use --overwrite to replace it.")
