"""Have PostgreSQL compress items by lz4, where it can.

Items of over 2 KB are compressed, by pglz unless one says otherwise, which takes several
times as long, at each append and at each read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor


def use_lz4(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    """Tell the column so; rows that are there already stay as they are."""
    if editor.connection.vendor != "postgresql":
        return
    with editor.connection.cursor() as cursor:
        # PostgreSQL 14 and newer, where it was built with lz4.
        cursor.execute(
            "SELECT 1 FROM pg_settings WHERE name = 'default_toast_compression' "
            "AND 'lz4' = ANY (enumvals)"
        )
        if cursor.fetchone() is None:
            return
    table = editor.quote_name(
        apps.get_model("agent_sessions", "SessionItem")._meta.db_table
    )
    editor.execute(f"ALTER TABLE {table} ALTER COLUMN data SET COMPRESSION lz4")


class Migration(migrations.Migration):
    dependencies: ClassVar = [("agent_sessions", "0001_initial")]

    operations: ClassVar = [
        # Nothing to undo: either way all rows can be read.
        migrations.RunPython(use_lz4, migrations.RunPython.noop, elidable=True)
    ]
