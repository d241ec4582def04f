"""The user at the other end of a websocket or a stream, read again each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import (
    BACKEND_SESSION_KEY,
    HASH_SESSION_KEY,
    SESSION_KEY,
    get_user_model,
    load_backend,
)
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.crypto import constant_time_compare

from agent_sessions.backends.keys import names_user


class Visitor:
    """The user at the other end of a websocket or a stream, read again each time.

    It is the user that a middleware has put into the scope; a row of another model is
    no user. The user of the Django session needs that session too, read from its store:
    the scope's own is as old as the handshake and doesn't show a log-out. Any other
    user's row is read by its key, through the default manager, as Django's
    authentication does. The first user remains: no connection changes to another one.
    """

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self._scope = scope
        self._is_by_session: bool | None = None
        self._first: tuple[Any, ...] | None = None

    def read(self) -> Any:
        """Return the user, if active and the same as before, or None.

        It queries the database, so call it in a thread.
        """
        if self._is_by_session is None:
            self._is_by_session = self._is_of_session()
        user = self._named()
        if user is None or not user.is_active:
            return None
        # A session keeps the password's hash itself.
        hashes = [] if self._is_by_session else _auth_hashes(user)[:1]
        seen = (user.pk, *hashes)
        self._first = self._first or seen
        return user if seen == self._first else None

    def _is_of_session(self) -> bool:
        if "user" not in self._scope:
            return True
        session, user = self._scope.get("session"), self._scope["user"]
        if session is None or user is None:
            return False
        return str(session.get(SESSION_KEY)) == str(user.pk)

    def _named(self) -> Any:
        if "user" in self._scope:
            user = self._scope["user"]
            if user is None or not (user.is_authenticated and names_user(user)):
                return None
            if not self._is_by_session:
                users = get_user_model()._default_manager
                return users.filter(pk=user.pk).first()
        session = self._scope.get("session")
        return None if session is None else _user_of(session)


def _user_of(session: Any) -> Any:
    """Return the user that a Django session names now, or None.

    Django's get_user() isn't used: with SECRET_KEY_FALLBACKS it changes the session's
    key, and a socket can't send the new one to the browser.
    """
    # The scope's session is a lazy object around the real store, as is its class.
    kept = session.__class__(session.session_key)
    try:
        name, path = kept[SESSION_KEY], kept[BACKEND_SESSION_KEY]
        pk = get_user_model()._meta.pk.to_python(name)
    except (KeyError, ValidationError):
        return None
    if path not in settings.AUTHENTICATION_BACKENDS:
        return None
    user: Any = load_backend(path).get_user(pk)
    if user is None:
        return None
    hashes, kept_hash = _auth_hashes(user), kept.get(HASH_SESSION_KEY) or ""
    is_verified = any(constant_time_compare(kept_hash, one) for one in hashes)
    return user if is_verified or not hashes else None


def _auth_hashes(user: Any) -> list[str]:
    """Return the hashes of a user's password that a session may have; none without one."""
    if not hasattr(user, "get_session_auth_hash"):
        return []
    older = getattr(user, "get_session_auth_fallback_hash", tuple)
    return [user.get_session_auth_hash(), *older()]


def scope_of(request: HttpRequest) -> dict[str, Any]:
    """Return a request's user and session, as a websocket's scope has them."""
    names = ("user", "session")
    return {name: getattr(request, name) for name in names if hasattr(request, name)}


async def objection_of_csrf(request: HttpRequest) -> HttpResponseBase | None:
    """Return Django's answer to a request without its CSRF token."""

    def nothing(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    def check() -> HttpResponseBase | None:
        middleware = CsrfViewMiddleware(nothing)
        middleware.process_request(request)
        return middleware.process_view(request, nothing, (), {})

    # The token may be in the session, and so in the database.
    return await sync_to_async(check)()
