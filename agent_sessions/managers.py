"""Managers that leave out what has been removed, and rows that know where they lie."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from django.db import models

from agent_sessions.owners import user_key
from agent_sessions.times import stored

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser

    from agent_sessions.models import AgentSession  # noqa: F401 - in strings

_M = TypeVar("_M", bound=models.Model, covariant=True)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def removed(path: str = "removed_at") -> models.Q:
    """Return the condition that a session has been removed.

    It is a comparison: with IS NULL, SQLite would take the index of that column for the
    best of all, and read and sort every session; for IS NOT NULL it takes none.
    """
    return models.Q(**{f"{path}__gt": stored(_EPOCH)})


class SessionQuerySet(models.QuerySet["AgentSession"]):
    """Sessions, to be narrowed to one owner."""

    def for_user(self, user: AbstractBaseUser | None) -> SessionQuerySet:
        """Narrow to one owner's sessions; None means those without an owner.

        Raises InvalidOwner.
        """
        if user is None:
            return self.filter(user__isnull=True)
        pk = user_key(user)
        return self.none() if pk is None else self.filter(user_id=pk)


_SessionManager = models.Manager.from_queryset(SessionQuerySet)


class SessionManager(_SessionManager["AgentSession"]):
    """Every session but those that have been removed and are still to be deleted.

    So are the other managers here. Code that has a session's key already goes around
    them, by way of `_base_manager`: what is removed has another key.
    """

    def get_queryset(self) -> SessionQuerySet:
        """Return the rows of sessions that have not been removed."""
        rows = super().get_queryset().exclude(removed())
        return cast("SessionQuerySet", rows)


class OwnedQuerySet(models.QuerySet[Any]):
    """A query set over rows that belong to a session, by way of `owner_path`."""

    def for_user(self, user: AbstractBaseUser | None) -> OwnedQuerySet:
        """Narrow to the rows of one owner's sessions; None means no owner.

        Raises InvalidOwner.
        """
        path = self.model.owner_path
        if user is None:
            return self.filter(**{f"{path}__user__isnull": True})
        pk = user_key(user)
        return self.none() if pk is None else self.filter(**{f"{path}__user_id": pk})


class LiveManager(models.Manager[_M]):
    """Every row but those of removed sessions.

    Which those are is asked apart: a join would keep databases from reading a history
    in the order of its index.
    """

    def get_queryset(self) -> models.QuerySet[_M]:
        """Return the rows of sessions that have not been removed."""
        model: Any = self.model
        to_session, _, rest = model.owner_path.partition("__")
        parents = model._meta.get_field(to_session).related_model
        path = f"{rest}__removed_at" if rest else "removed_at"
        gone = parents._base_manager.filter(removed(path)).values("pk")
        return super().get_queryset().exclude(**{f"{to_session}_id__in": gone})


OwnedManager = LiveManager.from_queryset(OwnedQuerySet)


class StoredModel(models.Model):
    """A row that is read again from where it lies, whatever a router says of reading.

    A replica that lags behind would tell of an older lease, or of no row at all.
    """

    if TYPE_CHECKING:
        _base_manager: ClassVar[models.Manager[Any]]

    class Meta:
        abstract = True

    def refresh_from_db(
        self, using: str | None = None, fields: Any = None, from_queryset: Any = None
    ) -> None:
        """Read the row, or its deferred fields, from its own database."""
        super().refresh_from_db(using or self._state.db, fields, from_queryset)
