"""Where a file of SQLite is read, so that nothing is left beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from agent_sessions.transfer.import_.formats import check_sqlite, has_log, read_head
from agent_sessions.transfer.import_.records import UnreadableSource


class Place:
    """A file of SQLite, or a copy of it; in a folder that may be read-only.

    Who opens a file that keeps a write-ahead log makes two files beside it, which a
    reader can't remove again. So one whose log is empty is read as it lies there, and is
    watched; one whose log nobody has open is copied with it first.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._copy: TemporaryDirectory[str] | None = None
        self._seen: tuple[int, int] | None = None
        more = ""
        try:
            head = read_head(path)
            check_sqlite(name, head)
            log, index = Path(f"{path}-wal"), Path(f"{path}-shm")
            if has_log(head):
                if not log.is_file() or not log.stat().st_size:
                    self._seen = self._look()
                    more = "&immutable=1"
                elif not os.access(index, os.R_OK | os.W_OK):
                    path = self._copied(path, log)
        except OSError as exc:
            self.close()
            raise UnreadableSource(
                f"Can't read {name}: {exc.strerror or type(exc).__name__}."
            ) from None
        self.uri = f"file:{quote(os.fsencode(path))}?mode=ro{more}"

    def check(self) -> None:
        """Raise UnreadableSource where the file was written to since it was opened."""
        if self._seen is not None and self._seen != self._look():
            raise UnreadableSource(
                f"{self._name} was written to while it was read. Run the same command "
                "again to go on."
            )

    def close(self) -> None:
        """Remove the copy, if there is one."""
        if self._copy is not None:
            self._copy.cleanup()

    def _copied(self, path: Path, log: Path) -> Path:
        self._copy = TemporaryDirectory(prefix="agent-sessions-")
        copy = Path(self._copy.name) / "source"
        shutil.copyfile(path, copy)
        shutil.copyfile(log, f"{copy}-wal")
        return copy

    def _look(self) -> tuple[int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size
