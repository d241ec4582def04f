"""What a flush between two tests puts back.

Django looks for missing content types and permissions after each, model by model, which
takes longer than most tests do.
"""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.contrib.auth.management import create_permissions
from django.contrib.auth.models import Permission
from django.contrib.contenttypes.management import create_contenttypes
from django.contrib.contenttypes.models import ContentType
from django.db.models.signals import post_migrate


def keep_permissions(database: str) -> None:
    """Restore the rows that migrations made after a flush of a database."""
    rows: dict[type[Any], list[Any]] = {
        model: list(model._base_manager.using(database).order_by("pk"))
        for model in (ContentType, Permission)
    }

    def put_back(app_config: AppConfig, using: str, **options: Any) -> None:
        if using != database or "plan" in options:
            # Somebody migrates, and may have made models.
            create_contenttypes(app_config, using=using, **options)
            create_permissions(app_config, using=using, **options)
        elif app_config.name == "django.contrib.contenttypes":
            for model, kept in rows.items():
                model._base_manager.using(using).bulk_create(kept)

    post_migrate.disconnect(create_contenttypes)
    post_migrate.disconnect(
        dispatch_uid="django.contrib.auth.management.create_permissions"
    )
    post_migrate.connect(put_back, weak=False)
