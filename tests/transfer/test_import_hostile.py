"""Sources that were made to hang an import, to fill its memory or to go elsewhere."""

from __future__ import annotations

import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest
from django.core.management import CommandError

from agent_sessions.models import SessionItem
from agent_sessions.transfer.import_ import records
from tests.support import import_sources
from tests.support.import_sources import (
    conversation,
    imported,
    run_import,
    write_sqlite,
)
from tests.transfer.test_import_limits import (
    MEGABYTE,
    MESSAGES,
    SESSIONS,
    line,
    refused,
    write,
)

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

ENDLESS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS id, "
    "'s' AS session_id, '{}' AS message_data, '' AS created_at, '' AS updated_at FROM n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source"


class TestSchemas:
    @pytest.mark.parametrize("which", ["agent_sessions", "agent_messages"])
    def test_a_view_is_not_read(self, path: Path, which: str) -> None:
        tables = {"agent_sessions": SESSIONS, "agent_messages": MESSAGES}
        tables[which] = f"CREATE VIEW {which} AS {ENDLESS}"
        write(path, *tables.values())
        assert "is a view or a virtual table" in refused("sqlite", path)

    def test_a_view_that_passes_for_a_table_is_not_read(self, path: Path) -> None:
        write(path, SESSIONS, MESSAGES, "CREATE TABLE other (x)")
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(
                "UPDATE sqlite_master SET sql = ? WHERE name = 'agent_messages'",
                [f"CREATE VIEW agent_messages AS {ENDLESS}"],
            )
        refused("sqlite", path)

    @pytest.mark.parametrize(
        "change",
        [
            "type = 'index'",
            "name = 'other', tbl_name = 'other'",
            f"type = 'x', sql = 'CREATE VIEW agent_messages AS {ENDLESS}'",
            f"name = 'x', sql = 'CREATE VIEW agent_messages AS {ENDLESS}'",
            "name = 'x', rootpage = 0, sql = 'CREATE VIRTUAL TABLE agent_messages "
            "USING fts5(session_id, message_data, created_at)'",
        ],
    )
    def test_a_schema_that_contradicts_itself_is_not_read(
        self, path: Path, change: str
    ) -> None:
        write(path, SESSIONS, MESSAGES, "CREATE TABLE decoy (x)")
        # Quotes within quotes are doubled.
        head, mark, view = change.partition("sql = '")
        change = head + mark + view[:-1].replace("'", "''") + view[-1:]
        write(
            path,
            "PRAGMA writable_schema = ON",
            f"UPDATE sqlite_master SET {change} WHERE name = 'agent_messages'",  # noqa: S608
            "UPDATE sqlite_master SET name = 'agent_messages' WHERE name = 'decoy'",
        )
        refused("sqlite", path)

    def test_a_virtual_table_is_not_read(self, path: Path) -> None:
        write(
            path,
            SESSIONS,
            "CREATE VIRTUAL TABLE agent_messages USING fts5(session_id, message_data, "
            "created_at)",
        )
        assert "is a view or a virtual table" in refused("sqlite", path)

    def test_a_view_beside_advanced_tables_is_not_read(self, path: Path) -> None:
        write(
            path,
            SESSIONS,
            MESSAGES,
            f"CREATE VIEW message_structure AS {ENDLESS}",
            "CREATE TABLE turn_usage (x)",
        )
        assert "is a view or a virtual table" in refused("advanced-sqlite", path)

    def test_checks_and_triggers_are_not_run(self, path: Path) -> None:
        write(
            path,
            SESSIONS,
            MESSAGES.replace(
                "message_data TEXT",
                "message_data TEXT CHECK (length(hex(randomblob(300000000))) > 1)",
            ),
            "PRAGMA ignore_check_constraints = ON",
            "INSERT INTO agent_sessions VALUES ('s', '', '')",
            "INSERT INTO agent_messages VALUES (1, 's', '{\"role\": \"user\"}', '')",
            "CREATE TRIGGER t AFTER INSERT ON agent_messages BEGIN SELECT 1; END",
        )
        assert "sessions new 1" in run_import("sqlite", path)[0]

    def test_thousands_of_columns_are_no_matter(self, path: Path) -> None:
        more = ", ".join(f"c{number}" for number in range(1_900))
        write(
            path,
            SESSIONS,
            MESSAGES[:-1] + f", {more})",
            "INSERT INTO agent_sessions VALUES ('s', '', '')",
            "INSERT INTO agent_messages (id, session_id, message_data) VALUES "
            "(1, 's', '{\"role\": \"user\"}')",
        )
        assert "1 item" in run_import("sqlite", path)[0]

    @pytest.mark.parametrize("kind", ["sqlite", "advanced-sqlite"])
    def test_ids_of_other_types_are_told(self, path: Path, kind: str) -> None:
        write(
            path,
            SESSIONS,
            MESSAGES.replace("id INTEGER PRIMARY KEY", "id"),
            "CREATE TABLE message_structure (id, session_id, message_id, branch_id, "
            "sequence_number, created_at)",
            "CREATE TABLE turn_usage (id, session_id, branch_id, user_turn_number, "
            "requests, input_tokens, output_tokens, total_tokens, "
            "input_tokens_details, output_tokens_details, created_at)",
            "INSERT INTO agent_sessions VALUES ('s', '', '')",
            "INSERT INTO agent_messages VALUES ('x', 's', '{}', '')",
            "INSERT INTO message_structure VALUES (1, 's', 'x', x'ff', 1, '')",
            "INSERT INTO turn_usage VALUES (1, 's', 7, 'x', 'x', 'x', x'00', 1e300, "
            "'[', 3, 4)",
        )
        refused(kind, path)

    def test_thousands_of_branches_are_refused(self, path: Path) -> None:
        write(
            path,
            SESSIONS,
            MESSAGES,
            "CREATE TABLE message_structure (id, session_id, message_id, branch_id, "
            "sequence_number, created_at)",
            "INSERT INTO agent_sessions VALUES ('s', '', '')",
            "INSERT INTO message_structure WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL "
            "SELECT i + 1 FROM n LIMIT 5000) SELECT i, 's', 1, 'b' || i, 1, '' FROM n",
        )
        assert "more than 2,000 branches" in refused("advanced-sqlite", path)

    def test_so_many_runs_are_refused(self, path: Path) -> None:
        numbers = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
            "LIMIT 100001)"
        )
        write(
            path,
            SESSIONS,
            MESSAGES,
            "CREATE TABLE message_structure (id, session_id, message_id, branch_id, "
            "sequence_number, created_at)",
            "CREATE TABLE turn_usage (id, session_id, branch_id, user_turn_number, "
            "requests, input_tokens, output_tokens, total_tokens, "
            "input_tokens_details, output_tokens_details, created_at)",
            "INSERT INTO agent_sessions VALUES ('s', '', '')",
            "INSERT INTO agent_messages VALUES (1, 's', '{}', '')",
            "INSERT INTO message_structure VALUES (1, 's', 1, 'main', 1, '')",
            f"INSERT INTO turn_usage {numbers} SELECT i, 's', 'main', i, 1, 1, 1, 1, '', '', '' FROM n",  # noqa: S608
        )
        assert "more than 100,000 runs" in refused("advanced-sqlite", path)


class TestSizes:
    def test_a_message_that_is_too_long_ends_its_session(self, path: Path) -> None:
        write_sqlite(path, "s", conversation(2))
        write_sqlite(path, "t", conversation(2))
        for size in (records.ITEM_BYTES + 1, 2 * records.ITEM_BYTES):
            update = (
                "UPDATE agent_messages SET message_data = CAST(zeroblob({}) AS TEXT) "
                "WHERE id = 7"
            )
            write(path, update.format(size))
            told = import_sources.refused("sqlite", path)
            assert "s: refused: one of its messages has more than 33,554,432" in told
            assert imported("s") == conversation(2)[:6]
            assert imported("t") == conversation(2)

    def test_long_messages_are_read_a_few_at_a_time(self, path: Path) -> None:
        items = [
            {"role": "user", "content": str(number) * 3 * MEGABYTE}
            for number in range(5)
        ]
        write_sqlite(path, "s", items)
        run_import("sqlite", path)
        assert imported("s") == items

    @pytest.mark.parametrize("column", ["session_id", "created_at", "updated_at"])
    def test_long_ids_and_times_don_t_fill_the_memory(
        self, path: Path, column: str
    ) -> None:
        write(
            path,
            SESSIONS,
            MESSAGES,
            "INSERT INTO agent_sessions VALUES ('s', '', '')",
            f"UPDATE agent_sessions SET {column} = hex(zeroblob(1000000))",  # noqa: S608
        )
        if column == "session_id":
            assert "more than 65,536 bytes" in refused("sqlite", path)
        else:
            assert refused("sqlite", path).startswith("Can't read")


def page(kind: int, cells: list[bytes], size: int, last: int = 0) -> bytes:
    """Make a page of a b-tree; `kind` 5 leads to others, 13 has rows."""
    body, places, end = bytearray(size), [], size
    for cell in cells:
        end -= len(cell)
        body[end : end + len(cell)] = cell
        places.append(end)
    head = struct.pack(">BHHHB", kind, 0, len(cells), end, 0)
    if kind == 5:
        head += struct.pack(">I", last)
    head += b"".join(struct.pack(">H", place) for place in places)
    body[: len(head)] = head
    return bytes(body)


class TestDamage:
    def test_a_tree_that_leads_to_itself_is_refused(self, path: Path) -> None:
        write_sqlite(path, "s", conversation(50))
        with closing(sqlite3.connect(path)) as connection:
            (root,) = connection.execute(
                "SELECT rootpage FROM sqlite_master WHERE name = 'agent_messages'"
            ).fetchone()
            (size,) = connection.execute("PRAGMA page_size").fetchone()
        data = bytearray(path.read_bytes())
        pages = len(data) // size
        # Sixteen levels, whose every entry leads to the same next one: 300 ** 16 rows.
        levels = list(range(pages + 1, pages + 17))
        for level, below in zip(levels, [*levels[1:], root + 1], strict=True):
            cells = [struct.pack(">I", below) + bytes([1]) for _ in range(300)]
            data += page(5, cells, size, below)
            assert level * size == len(data)
        cells = [struct.pack(">I", levels[0]) + bytes([1]) for _ in range(300)]
        data[(root - 1) * size : root * size] = page(5, cells, size, levels[0])
        data[28:32] = struct.pack(">I", len(data) // size)
        path.write_bytes(data)
        assert "is damaged" in refused("sqlite", path)

    @pytest.mark.parametrize("at", range(20))
    def test_flipped_bytes_give_an_error_or_the_items(
        self, path: Path, at: int
    ) -> None:
        write_sqlite(path, "s", conversation(30))
        data = bytearray(path.read_bytes())
        for place in range(at * len(data) // 60, len(data), len(data) // (at + 1)):
            data[place] ^= 0xFF
        path.write_bytes(data)
        try:
            out, _ = run_import("sqlite", path)
        except CommandError:
            return
        # What is broken within a text is kept as it is, and counted.
        assert SessionItem.objects.count() == 120, out

    @pytest.mark.parametrize(
        "content", [b"", b"x", b"SQLite format 3\0", os.urandom(9_000), b"\x1f\x8b\x08"]
    )
    @pytest.mark.parametrize("kind", ["sqlite", "advanced-sqlite", "export"])
    def test_files_of_other_kinds_are_refused(
        self, path: Path, kind: str, content: bytes
    ) -> None:
        path.write_bytes(content)
        if kind == "export" and not content:
            run_import(kind, path)
        else:
            refused(kind, path)

    @pytest.mark.parametrize("kind", ["sqlite", "export"])
    def test_a_name_of_odd_bytes_is_a_name(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / os.fsdecode(b"\xff ?#%.db")
        if kind == "sqlite":
            write_sqlite(tmp_path / "s", "s", conversation(1))
            (tmp_path / "s").rename(path)
        else:
            path.write_text(line())
        assert "sessions new 1" in run_import(kind, path)[0]
        assert "unchanged 1" in run_import(kind, path)[0]

    @pytest.mark.parametrize("kind", ["sqlite", "export"])
    def test_what_is_no_file_is_refused(self, path: Path, kind: str) -> None:
        os.mkfifo(path)
        for place in (path, path.parent, "/dev/zero", "/dev/null", "a\0b", "x" * 5_000):
            refused(kind, place)
