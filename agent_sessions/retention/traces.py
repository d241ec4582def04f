"""What names a person's sessions beside their rows: the admin's log, and lone keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import Any

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import router
from django.db.models import Model

from agent_sessions.backends.remote.erasure import owner_text
from agent_sessions.models import AgentSession, SessionSecret

# What stands in the log for an erased session.
ERASED = "erased"
# Entries looked at, and changed, at a time.
_CHUNK = 500
_MOST_KEY = 2**63 - 1


def owner_filter(model: type[Model], user_id: Any) -> dict[str, Any] | None:
    """Return which rows of a model are a person's; None where it has no owner."""
    if issubclass(model, AgentSession):
        return {"user_id": user_id}
    if path := getattr(model, "owner_path", ""):
        return {f"{path}__user_id": user_id}
    if any(field.name == "owner" for field in model._meta.fields):
        return {"owner": owner_text(user_id)}
    return None


def blank_log_of(user_id: Any, databases: Collection[str]) -> int:
    """Take out of the admin's log what a person's rows are called; tell how often.

    Who did what kind of thing, and when, stays. It is asked while the rows are still
    there: nothing else says whose an entry is.
    """
    count = 0
    for model in _logged_models():
        owned = owner_filter(model, user_id)
        if owned is None:
            continue
        for entries in _entries(model):
            keys = {pk: _key(object_id) for pk, object_id in entries}
            wanted = {key for key in keys.values() if key is not None}
            own = set[Any]()
            for using in databases:
                rows = model._base_manager.using(using).filter(**owned)
                own.update(rows.filter(pk__in=wanted).values_list("pk", flat=True))
            count += _blank(pk for pk, key in keys.items() if key in own)
    return count


def blank_log_about(pks: Iterable[Any]) -> int:
    """Do so for sessions that are gone by now, by the keys that their rows had."""
    gone, count = {str(pk) for pk in pks}, 0
    for model in _logged_models():
        if gone and issubclass(model, AgentSession):
            for entries in _entries(model):
                count += _blank(pk for pk, object_id in entries if object_id in gone)
    return count


def delete_lone_keys(user_id: Any, databases: Collection[str], before: datetime) -> int:
    """Delete a person's session keys that no session has; tell how many.

    A session that is just being made has its key before its row: what is younger than
    `before` stays.
    """
    count = 0
    for using in databases:
        rows = AgentSession.objects.using(using).filter(user_id=user_id)
        keys = SessionSecret.objects.using(using).filter(
            owner=owner_text(user_id), created_at__lt=before
        )
        for key in keys.iterator(chunk_size=_CHUNK):
            if not rows.filter(backend=key.backend, session_id=key.session_id).exists():
                count += keys.filter(pk=key.pk).delete()[0]
    return count


def _logged_models() -> Iterator[type[Model]]:
    """Return the models of this app, and a project's proxies of them."""
    if apps.is_installed("django.contrib.admin"):
        own = tuple(apps.get_app_config("agent_sessions").get_models())
        for model in apps.get_models():
            if issubclass(model, own):
                yield model


def _entries(model: type[Model]) -> Iterator[list[tuple[int, str | None]]]:
    """Return the log's entries about a model that still name something."""
    from django.contrib.admin.models import LogEntry
    from django.contrib.contenttypes.models import ContentType

    # From where they are written: a replica may lag behind.
    using = router.db_for_write(LogEntry)
    kinds = ContentType.objects.db_manager(using)
    kind = kinds.get_for_model(model, for_concrete_model=False)
    entries = LogEntry.objects.using(using).filter(content_type=kind)
    entries = entries.exclude(object_id=None)
    after = 0
    while chunk := list(
        entries.filter(pk__gt=after)
        .order_by("pk")
        .values_list("pk", "object_id")[:_CHUNK]
    ):
        yield chunk
        after = chunk[-1][0]


def _blank(pks: Iterable[int]) -> int:
    from django.contrib.admin.models import LogEntry

    found = list(pks)
    return LogEntry.objects.filter(pk__in=found).update(
        object_id=None, object_repr=ERASED, change_message=""
    )


def _key(object_id: str | None) -> int | None:
    """Read the key of a row, as the log has it."""
    try:
        key = AgentSession._meta.pk.to_python(object_id)
    except (ValidationError, ValueError):
        return None
    return key if isinstance(key, int) and 0 < key <= _MOST_KEY else None
