"""The owners of sessions: saved users of the project's user model."""

from __future__ import annotations

from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import SynchronousOnlyOperation, ValidationError
from django.db import router
from django.db.models import Model

from agent_sessions.exceptions import InvalidOwner, UserNotLoaded


def owner_key(user: Any) -> Any:
    """Return the primary key of a saved user. Raise InvalidOwner for any other."""
    pk = user_key(user)
    # A key that the model chooses, such as a UUID, is there before the row is.
    if pk is None or (isinstance(user, Model) and user._state.adding):
        raise InvalidOwner
    return pk


def user_key(user: Any) -> Any:
    """Return a user's primary key; None for an anonymous or unsaved user.

    A lazy user is loaded if blocking is allowed here. Raise InvalidOwner for a value
    that is no user.
    """
    try:
        if isinstance(user, Model):
            return _own_key(user)
        if isinstance(user, type) or not hasattr(user, "is_authenticated"):
            name = user.__name__ if isinstance(user, type) else type(user).__name__
            kind = "the class " if isinstance(user, type) else "a value of type "
            raise InvalidOwner(f"{kind}{name} is no user")
        # AnonymousUser, and users who have no row at hand, such as those of a token.
        return None if user.pk is None else _as_key(user.pk)
    except SynchronousOnlyOperation:
        raise UserNotLoaded from None


def _own_key(user: Model) -> Any:
    model = get_user_model()
    own, found = model._meta.concrete_model, user._meta.concrete_model
    if own is None or found is None or not issubclass(found, own):
        raise InvalidOwner(
            f"{user._meta.label} is not the user model, {model._meta.label}"
        )
    return user.pk


def _as_key(pk: Any) -> Any:
    try:
        return get_user_model()._meta.pk.to_python(pk)
    except ValidationError:
        raise InvalidOwner("its key is none of the user model") from None


def owners() -> Any:
    """Return every user, also those that the default manager leaves out.

    A hidden user still has sessions to list, move and erase. Users are read from the
    database that they are written to: a replica may lag behind.
    """
    model = get_user_model()
    return model._base_manager.using(router.db_for_write(model))
