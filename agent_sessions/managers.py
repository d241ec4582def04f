"""Managers that leave out removed sessions, and rows that know their database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from django.db import models

from agent_sessions.owners import user_key
from agent_sessions.times import stored

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser

_M = TypeVar("_M", bound=models.Model, covariant=True)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def removed(path: str = "removed_at") -> models.Q:
    """Return the condition that a session has been removed.

    It is a comparison: for IS NULL, SQLite would prefer the index of that column, and
    read and sort every session; for IS NOT NULL it uses none.
    """
    return models.Q(**{f"{path}__gt": stored(_EPOCH)})


class OwnedQuerySet(models.QuerySet[_M]):
    """Sessions, or rows that belong to one by way of their `owner_path`."""

    def for_user(self, user: AbstractBaseUser | None) -> Self:
        """Return the rows of one owner's sessions; None means no owner.

        Raises InvalidOwner.
        """
        model: Any = self.model
        owner = f"{model.owner_path}__user_id".removeprefix("__")
        if user is None:
            return self.filter(**{f"{owner}__isnull": True})
        pk = user_key(user)
        return self.none() if pk is None else self.filter(**{owner: pk})


class LiveManager(models.Manager[_M]):
    """Every row but those of sessions that are removed and still to be deleted.

    Code that has a session's key already goes around it, by way of `_base_manager`:
    what is removed has another key.
    """

    def get_queryset(self) -> models.QuerySet[_M]:
        """Return the rows of sessions that have not been removed."""
        model: Any = self.model
        rows = super().get_queryset()
        to_session, _, rest = model.owner_path.partition("__")
        if not to_session:
            return rows.exclude(removed())
        # Asked apart: a join would keep databases from reading a history in the order
        # of its index.
        parents = model._meta.get_field(to_session).related_model
        path = f"{rest}__removed_at" if rest else "removed_at"
        gone = parents._base_manager.filter(removed(path)).values("pk")
        return rows.exclude(**{f"{to_session}_id__in": gone})


OwnedManager = LiveManager.from_queryset(OwnedQuerySet)


class StoredModel(models.Model):
    """A row that is read again from its own database, whatever a router says.

    A replica that lags behind would have an older lease, or no row at all.
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
