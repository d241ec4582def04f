"""Whom the context of a run names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError

from agent_sessions.backends.keys import names_user

_ABSENT = object()


def names_other(context: Any, owner: Any) -> bool:
    """Return whether a context names a user that is not the owner.

    A context, be it an object or a mapping, names the user of `user`, whose key is
    `user_id`, and who sent its `request` or opened the socket of its `scope`; it may be
    a request, a consumer, a scope or a user itself. An anonymous user is someone else,
    and so is a row of another model.
    A context that has none of these names nobody.
    """
    return any(not _is_owner(named, owner) for named in _named(context))


def _named(context: Any) -> Iterator[Any]:
    """Return the keys of the users whom a context names."""
    if hasattr(context, "is_authenticated") and hasattr(context, "pk"):
        yield _key_of(context)
        return
    for holder in (context, _member(context, "request"), _member(context, "scope")):
        pk = _key_of(_member(holder, "user"))
        if pk is not _ABSENT:
            yield pk
    user_id = _member(context, "user_id")
    if user_id is not None:
        yield user_id


def _key_of(user: Any) -> Any:
    # A row of another model is nobody who could be the owner.
    return getattr(user, "pk", _ABSENT) if names_user(user) else None


def _member(holder: Any, name: str) -> Any:
    if isinstance(holder, Mapping):
        return holder.get(name)
    return getattr(holder, name, None)


def _is_owner(named: Any, owner: Any) -> bool:
    if isinstance(named, bool | float) or named is None:
        return False
    if named == owner:
        return True
    # A key that came as text: "7", or a UUID.
    try:
        return bool(_key(named) == owner)
    except ValidationError:
        return False


def _key(value: Any) -> Any:
    return get_user_model()._meta.pk.to_python(value)
