"""Who is at the other end of a websocket, looked up anew each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

from channels.security.websocket import OriginValidator
from django.conf import settings
from django.contrib.auth import SESSION_KEY, get_user, get_user_model
from django.http import HttpRequest

from agent_sessions.backends.database.threads import DatabaseThreads

LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]"]


def origin_is_allowed(scope: Mapping[str, Any]) -> bool:
    """Tell whether a handshake comes from a page of ALLOWED_HOSTS, or from no page.

    Browsers send cookies along with any page's websocket and there is no CSRF token,
    so the Origin header is the defence; other programs send none, and no cookies of
    a victim either.
    """
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    if not origins:
        return True
    hosts = settings.ALLOWED_HOSTS or (LOCAL_HOSTS if settings.DEBUG else [])
    validator = OriginValidator(_nothing, hosts)
    return all(validator.valid_origin(urlparse(o.decode("latin1"))) for o in origins)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Stand where the validator, of which only the matching is used, wants an app."""


async def current_user(scope: Mapping[str, Any], threads: DatabaseThreads) -> Any:
    """Look up the active user of a socket; None where nobody is logged in any more.

    The Django session is read afresh: the scope's is the one of the handshake, which
    doesn't know of a log-out. Where another middleware authenticated the user, it is
    the user's row alone that is read again.
    """
    user = await threads.run(_read_user, scope)
    return user if user is not None and user.is_active else None


def _read_user(scope: Mapping[str, Any]) -> Any:
    session = scope.get("session")
    if session is not None and SESSION_KEY in session:
        request = HttpRequest()
        # The scope's session is a lazy object around the real store.
        store = type(getattr(session, "_wrapped", session))
        request.session = store(session.session_key)
        found = get_user(request)
        return found if found.is_authenticated else None
    user: Any = scope.get("user")
    if user is None or not user.is_authenticated:
        return None
    return get_user_model()._default_manager.filter(pk=user.pk).first()
