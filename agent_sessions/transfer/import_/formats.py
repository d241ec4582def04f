"""What a file is, by how it begins: an error then says so."""

from __future__ import annotations

import os
from pathlib import Path

from agent_sessions.transfer.import_.records import UnreadableSource

SQLITE = b"SQLite format 3\x00"
# Bytes of SQLite's header.
HEADER = 100
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
}


def read_head(path: str | os.PathLike[str]) -> bytes:
    """Read how a file begins. Raises OSError."""
    with Path(path).open("rb") as file:
        return file.read(HEADER)


def refuse_strange(name: str, head: bytes) -> None:
    """Refuse what is packed, or is text in UTF-16. Raises UnreadableSource."""
    for mark, packed_by in _PACKED.items():
        if head.startswith(mark):
            raise UnreadableSource(
                f"{name} is compressed, by {packed_by}. Unpack it, and name what was "
                "in it."
            )
    if _is_utf_16(head):
        raise UnreadableSource(
            f"{name} is text in UTF-16. Write it anew in UTF-8: iconv -f UTF-16 -t "
            "UTF-8 does."
        )


def _is_utf_16(head: bytes) -> bool:
    """Return whether bytes are UTF-16, with or without a byte order mark."""
    if head[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        return all(
            character.isprintable() or character.isspace()
            for character in head.decode("utf-16", "ignore")
        )
    # Plain ASCII, as JSON and lists of names begin.
    even, odd = head[:4:2], head[1:4:2]
    return len(head) > 3 and (even == b"\0\0") != (odd == b"\0\0")


def check_text(name: str, head: bytes) -> None:
    """Refuse what is no text. Raises UnreadableSource."""
    refuse_strange(name, head)
    if head.startswith(SQLITE):
        raise UnreadableSource(
            f"{name} is a file of SQLite. Name the KIND whose tables it has."
        )


def check_sqlite(name: str, head: bytes) -> None:
    """Refuse what is no file of SQLite with texts in UTF-8. Raises UnreadableSource."""
    if not head:
        return
    if not head.startswith(SQLITE):
        refuse_strange(name, head)
        if head.lstrip().startswith(b"{"):
            raise UnreadableSource(
                f"{name} is no file of SQLite; it begins as JSON does. Name the KIND "
                "export if it is one."
            )
    elif int.from_bytes(head[56:60], "big") in {2, 3}:
        raise UnreadableSource(
            f"{name} is a file of SQLite whose texts are in UTF-16. Copy it into one in "
            "UTF-8: sqlite3 OLD .dump | sqlite3 NEW."
        )


def has_log(head: bytes) -> bool:
    """Return whether a file of SQLite keeps a write-ahead log beside it."""
    return head[18:20] == b"\x02\x02"
