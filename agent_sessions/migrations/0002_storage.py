"""Have PostgreSQL compress only long items, and by lz4 where it can.

Rows of over 2 KB are compressed unless one says otherwise, by pglz, and what doesn't get
smaller, as encrypted items don't, is put aside in another table: each takes longer than
the rest of an append, and time at each read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

# In bytes: two such rows and their headers fill a page.
_LONG = 4_000


def set_storage(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    """Tell the table so; rows that are there already stay as they are."""
    if editor.connection.vendor != "postgresql":
        return
    table = editor.quote_name(
        apps.get_model("agent_sessions", "SessionItem")._meta.db_table
    )
    editor.execute(f"ALTER TABLE {table} SET (toast_tuple_target = {_LONG:d})")
    with editor.connection.cursor() as cursor:
        # PostgreSQL 14 and newer, where it was built with lz4.
        cursor.execute(
            "SELECT 1 FROM pg_settings WHERE name = 'default_toast_compression' "
            "AND 'lz4' = ANY (enumvals)"
        )
        if cursor.fetchone() is None:
            return
    editor.execute(f"ALTER TABLE {table} ALTER COLUMN data SET COMPRESSION lz4")


class Migration(migrations.Migration):
    dependencies: ClassVar = [("agent_sessions", "0001_initial")]

    operations: ClassVar = [
        # Nothing to undo: either way all rows can be read.
        migrations.RunPython(set_storage, migrations.RunPython.noop, elidable=True)
    ]
