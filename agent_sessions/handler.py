"""Backends by alias, from the AGENT_SESSIONS setting, as CACHES does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from django.utils.connection import BaseConnectionHandler
from django.utils.module_loading import import_string

from agent_sessions.exceptions import InvalidBackend

if TYPE_CHECKING:
    from agents.memory import SessionABC
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

    from agent_sessions.backends.base import BaseSessionBackend

DEFAULT_ALIAS = "default"
DATABASE_BACKEND = "agent_sessions.backends.database.DatabaseBackend"
_KEYS = frozenset({"BACKEND", "OPTIONS"})


class SessionBackendHandler(BaseConnectionHandler):
    """Build each alias's backend once per process, on first use."""

    settings_name = "AGENT_SESSIONS"
    exception_class = InvalidBackend
    # Backends are shared between threads; they keep what belongs to one themselves.
    thread_critical = False

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        super().__init__(settings)
        self._backends: dict[str, BaseSessionBackend] = {}

    def configure_settings(self, settings: dict[str, Any] | None) -> dict[str, Any]:
        if settings is None:
            from django.conf import settings as django_settings

            settings = getattr(django_settings, self.settings_name, None)
        if settings is None:
            return {DEFAULT_ALIAS: {"BACKEND": DATABASE_BACKEND}}
        if not isinstance(settings, dict):
            raise InvalidBackend(
                f"AGENT_SESSIONS must be a dict of aliases, not a "
                f"{type(settings).__name__}."
            )
        return settings

    def __getitem__(self, alias: str) -> BaseSessionBackend:
        # BaseConnectionHandler keeps one object per thread and context; a backend
        # holds its own pool, so there is one per process.
        try:
            return self._backends[alias]
        except KeyError:
            pass
        try:
            params = self.settings[alias]
        except KeyError:
            known = ", ".join(sorted(self.settings)) or "none"
            raise InvalidBackend(
                f"AGENT_SESSIONS has no alias {alias!r}; it has: {known}."
            ) from None
        return self._backends.setdefault(alias, self.create_connection(alias, params))

    def create_connection(
        self, alias: str, params: dict[str, Any] | None = None
    ) -> BaseSessionBackend:
        params = self.settings[alias] if params is None else params
        if not isinstance(params, dict) or "BACKEND" not in params:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}] needs a BACKEND, the dotted path of a "
                "backend class."
            )
        if unknown := sorted(params.keys() - _KEYS):
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}] has unknown keys: {', '.join(unknown)}. "
                "Put a backend's own options into OPTIONS."
            )
        try:
            backend_class = import_string(params["BACKEND"])
        except ImportError as exc:
            raise InvalidBackend(
                f"AGENT_SESSIONS[{alias!r}]: can't import BACKEND "
                f"{params['BACKEND']!r}: {exc}"
            ) from exc
        return cast(
            "BaseSessionBackend", backend_class(alias, params.get("OPTIONS") or {})
        )

    def database(self, database: str | None = None) -> BaseSessionBackend:
        """Give the backend that keeps items in a Django database.

        That is the first configured alias of that kind and database, or an
        unlisted one, so that DjangoSession works whatever AGENT_SESSIONS says.
        """
        from agent_sessions.backends.database import DatabaseBackend

        for alias, params in self.settings.items():
            if isinstance(params, dict) and params.get("BACKEND") == DATABASE_BACKEND:
                backend = self[alias]
                if cast("DatabaseBackend", backend).database == database:
                    return backend
        alias = "database" if database is None else f"database-{database}"
        if alias not in self._backends:
            self._backends.setdefault(
                alias, DatabaseBackend(alias, {"database": database})
            )
        return self._backends[alias]

    def reset(self) -> None:
        """Forget the settings and every backend; the next use reads them anew."""
        backends, self._backends = self._backends, {}
        self.__dict__.pop("settings", None)
        self._settings = None
        for backend in backends.values():
            backend.close()


sessions = SessionBackendHandler()


def get_session(
    session_id: str,
    *,
    user: AbstractBaseUser | AnonymousUser | None = None,
    backend: str = DEFAULT_ALIAS,
    **options: Any,
) -> SessionABC:
    """Open a session of a configured backend for the SDK's Runner.

    `user` owns it; None means a session without an owner. Nothing is read or
    written before the first call of the session's methods. Raises InvalidBackend
    and InvalidSessionId.
    """
    return sessions[backend].get_session(session_id, user=user, **options)


def reset_backends(*, setting: str, **kwargs: Any) -> None:
    """Follow override_settings, as Django's own handlers do."""
    if setting in {"AGENT_SESSIONS", "DATABASES", "CACHES"}:
        sessions.reset()
