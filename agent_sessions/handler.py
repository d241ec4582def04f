"""Backends by alias, from the AGENT_SESSIONS setting, as CACHES does it."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from django.conf import ENVIRONMENT_VARIABLE
from django.conf import settings as django_settings
from django.utils.connection import BaseConnectionHandler
from django.utils.module_loading import import_string

from agent_sessions.backends.keys import SessionKey, make_key
from agent_sessions.backends.options import DEFAULT_ALIAS as DEFAULT_ALIAS
from agent_sessions.backends.options import did_you_mean, did_you_mean_alias
from agent_sessions.exceptions import InvalidBackend, MissingExtra
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    from agents.memory import SessionSettings
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

    from agent_sessions.backends.base import BaseSessionBackend
    from agent_sessions.backends.wrapping import WrappingBackend
    from agent_sessions.memory import BackendSession

DATABASE_BACKEND = "agent_sessions.backends.database.DatabaseBackend"
CHAT_BACKEND = "AGENT_SESSIONS_CHAT_BACKEND"
if TYPE_CHECKING:
    _Handler = BaseConnectionHandler["BaseSessionBackend"]
else:
    _Handler = BaseConnectionHandler

ALIAS_LENGTH = 64
# Begins the aliases of backends that DjangoSession makes where no alias fits.
UNLISTED = "django:"
_KEYS = frozenset({"BACKEND", "OPTIONS"})
_SHAPE = (
    'Write it as CACHES is written: AGENT_SESSIONS = {"default": {"BACKEND": '
    f'"{DATABASE_BACKEND}", "OPTIONS": {{}}}}}}.'
)


class SessionBackendHandler(_Handler):
    """Build each alias's backend once per process, on first use."""

    settings_name = "AGENT_SESSIONS"
    exception_class = InvalidBackend
    # Backends are shared between threads; they keep what belongs to one themselves.
    thread_critical = False

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        super().__init__(settings)
        self._backends: dict[str, BaseSessionBackend] = {}

    @guarded
    def configure_settings(self, settings: dict[str, Any] | None) -> dict[str, Any]:
        """Return the setting, or its default. Raises InvalidBackend."""
        if settings is None:
            settings = getattr(django_settings, self.settings_name, None)
        if settings is None:
            return {DEFAULT_ALIAS: {"BACKEND": DATABASE_BACKEND}}
        if not isinstance(settings, dict):
            raise InvalidBackend(
                f"AGENT_SESSIONS must be a dict of aliases, not a "
                f"{type(settings).__name__}.",
                hint=_SHAPE,
                id="agent_sessions.E001",
            )
        return settings

    def __getitem__(self, alias: Any) -> BaseSessionBackend:
        # BaseConnectionHandler keeps one object per thread and context; a backend
        # holds its own pool, so there is one per process.
        if not isinstance(alias, str) and alias not in list(self.settings):
            raise self.unknown_alias(alias)
        if (backend := self._backends.get(alias)) is not None:
            return backend
        return self._backends.setdefault(alias, self._make(alias))

    @guarded
    def _make(self, alias: str) -> BaseSessionBackend:
        try:
            params = self.settings[alias]
        except KeyError:
            if (unlisted := self._unlisted(alias)) is None:
                raise self.unknown_alias(alias) from None
            return unlisted
        return self.create_connection(alias, params)

    @guarded
    def create_connection(
        self, alias: str, params: dict[str, Any] | None = None
    ) -> BaseSessionBackend:
        """Make an alias's backend from its settings. Raises InvalidBackend."""
        params = self.settings[alias] if params is None else params
        setting = f"AGENT_SESSIONS[{alias!r}]"
        _check_params(setting, alias, params)
        backend_class = _import_backend(setting, params["BACKEND"])
        options = params.get("OPTIONS")
        try:
            backend = backend_class(alias, {} if options is None else options)
        except MissingExtra as exc:
            raise _missing_extra(setting, exc) from exc
        if backend.inner_option is not None:
            inner = backend.options.get(backend.inner_option)
            cast("WrappingBackend", backend).make_inner = partial(
                self._make_inner, alias, inner
            )
        return backend

    def _make_inner(self, alias: str, inner: Any) -> BaseSessionBackend:
        """Build the backend that an alias wraps, under that alias."""
        wrapped = [alias]
        while True:
            if inner in wrapped:
                raise InvalidBackend(
                    f"AGENT_SESSIONS[{alias!r}] wraps itself: "
                    f"{' > '.join([*wrapped, inner])}.",
                    hint="Make it wrap an alias that stores items.",
                    id="agent_sessions.E013",
                )
            if inner not in self.settings:
                raise self.unknown_alias(inner)
            wrapped.append(inner)
            params = self.settings[inner]
            _check_params(f"AGENT_SESSIONS[{inner!r}]", inner, params)
            kind = _import_backend(f"AGENT_SESSIONS[{inner!r}]", params["BACKEND"])
            if kind.inner_option is None:
                break
            inner = (params.get("OPTIONS") or {}).get(kind.inner_option)
        return self.create_connection(alias, self.settings[wrapped[1]])

    def expect(self, alias: Any) -> None:
        """Raise InvalidBackend for an unknown alias; do nothing before settings exist."""
        if not django_settings.configured and not os.environ.get(ENVIRONMENT_VARIABLE):
            return
        try:
            known = self.settings
        except InvalidBackend:
            # AGENT_SESSIONS as a whole is wrong, which the checks report.
            return
        if not isinstance(alias, str) or (
            alias not in known and not alias.startswith(UNLISTED)
        ):
            raise self.unknown_alias(alias)

    def unknown_alias(self, alias: Any) -> InvalidBackend:
        """Return the error for an alias that AGENT_SESSIONS doesn't have."""
        known = list(map(str, self.settings))
        return InvalidBackend(
            f"AGENT_SESSIONS has no alias {alias!r}; it has: "
            f"{', '.join(sorted(known)) or 'none'}.",
            hint=did_you_mean_alias(str(alias), known)
            + f"Add {alias!r} to AGENT_SESSIONS, or use an alias that it has.",
            id="agent_sessions.E002",
        )

    def database(self, database: str | None = None) -> BaseSessionBackend:
        """Return the backend that keeps items in a Django database.

        That is the first configured alias of that kind and database, or an
        unlisted one, so that DjangoSession works whatever AGENT_SESSIONS says.
        """
        from django.db import router

        from agent_sessions.backends.database import DatabaseBackend
        from agent_sessions.models import AgentSession

        wanted = database or router.db_for_write(AgentSession)
        for alias, params in self.settings.items():
            if _is_a(params, DatabaseBackend):
                backend = self[alias]
                if cast("DatabaseBackend", backend).using == wanted:
                    return backend
        return self[f"{UNLISTED}{wanted}"]

    def _unlisted(self, alias: str) -> BaseSessionBackend | None:
        from agent_sessions.backends.database import DatabaseBackend

        database = alias.removeprefix(UNLISTED)
        if database in {alias, ""}:
            return None
        return DatabaseBackend(alias, {"database": database})

    def reset(self) -> None:
        """Close every backend and forget the settings; the next use reads them again."""
        backends, self._backends = self._backends, {}
        self.__dict__.pop("settings", None)
        self._settings = None
        for backend in backends.values():
            backend.close()


class ChatAlias:
    """The alias that AGENT_SESSIONS_CHAT_BACKEND names, as an attribute of a class.

    The consumer and the views share it. It is read at each access, as other settings
    are. A subclass or an object may set its own alias.
    """

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return getattr(django_settings, CHAT_BACKEND, DEFAULT_ALIAS)


def _check_params(setting: str, alias: Any, params: Any) -> None:
    """Raise InvalidBackend if an alias's settings have the wrong shape."""
    if not isinstance(alias, str) or not 1 <= len(alias) <= ALIAS_LENGTH:
        raise InvalidBackend(
            f"{setting}: an alias is a str of 1 to {ALIAS_LENGTH} characters.",
            hint="It is stored with every session; choose a short name.",
            id="agent_sessions.E014",
        )
    if not isinstance(params, dict) or not params.get("BACKEND"):
        raise InvalidBackend(
            f"{setting} needs a BACKEND, the dotted path of a backend class.",
            hint=_SHAPE,
            id="agent_sessions.E003",
        )
    if unknown := sorted(map(str, params.keys() - _KEYS)):
        raise InvalidBackend(
            f"{setting} has unknown keys: {', '.join(unknown)}.",
            hint=did_you_mean(unknown, _KEYS)
            + "Put a backend's own options into OPTIONS.",
            id="agent_sessions.E007",
        )
    options = params.get("OPTIONS")
    if options is not None and not isinstance(options, dict):
        raise InvalidBackend(
            f"{setting}['OPTIONS'] must be a dict, not a {type(options).__name__}.",
            hint=_SHAPE,
            id="agent_sessions.E010",
        )


def _import_backend(setting: str, path: Any) -> type[BaseSessionBackend]:
    """Import the class that BACKEND names, or is."""
    from agent_sessions.backends.base import BaseSessionBackend

    try:
        found = import_string(path) if isinstance(path, str) else path
    except MissingExtra as exc:
        raise _missing_extra(setting, exc) from exc
    except ImportError as exc:
        raise InvalidBackend(
            f"{setting}: can't import BACKEND {path!r}: {exc}.",
            hint=did_you_mean([path], [DATABASE_BACKEND])
            + "BACKEND is the dotted path of a class, and its module must be "
            "importable.",
            id="agent_sessions.E004",
        ) from exc
    if not (isinstance(found, type) and issubclass(found, BaseSessionBackend)):
        raise InvalidBackend(
            f"{setting}: BACKEND {path!r} is no subclass of BaseSessionBackend.",
            hint="Name a class of agent_sessions.backends, or derive your own from "
            "agent_sessions.backends.base.BaseSessionBackend.",
            id="agent_sessions.E005",
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise InvalidBackend(
            f"{setting}: BACKEND {path!r} is abstract.",
            hint=f"Name a subclass that has: {', '.join(missing)}.",
            id="agent_sessions.E005",
        )
    return found


def _is_a(params: Any, kind: type[BaseSessionBackend]) -> bool:
    """Return whether an alias's BACKEND can be imported and is of a kind."""
    path = params.get("BACKEND") if isinstance(params, dict) else None
    try:
        found = import_string(path) if isinstance(path, str) else path
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, kind)


def _missing_extra(setting: str, exc: MissingExtra) -> InvalidBackend:
    return InvalidBackend(
        f"{setting}: {exc}",
        hint=f"The extra is called {exc.extra!r}.",
        id="agent_sessions.E006",
    )


sessions = SessionBackendHandler()


def get_session(
    session_id: str,
    *,
    user: AbstractBaseUser | AnonymousUser | None = None,
    backend: str = DEFAULT_ALIAS,
    branch: str | None = None,
    session_settings: SessionSettings | dict[str, Any] | None = None,
) -> BackendSession:
    """Open a session of a configured backend for the SDK's Runner.

    `user` owns it; None means a session without an owner. `branch` names a branch of
    it, where the store has any. Nothing is read or written before the first call of
    the session's methods. Raises InvalidBackend, InvalidSessionId,
    InvalidOwner and InvalidBranch.
    """
    store = sessions[backend]
    if branch is not None and store.in_database is None:
        raise InvalidBackend(
            f"{type(store).__name__} keeps no branches; leave branch out."
        )
    key = make_key(session_id, user, branch=branch)
    return open_session(store, key, session_settings=session_settings)


def open_session(
    backend: BaseSessionBackend,
    key: SessionKey,
    *,
    session_settings: SessionSettings | dict[str, Any] | None = None,
) -> BackendSession:
    """Open a session whose id and owner have been checked."""
    kind = import_string(backend.session_class)
    session: BackendSession = kind.from_key(
        backend, key, session_settings=session_settings
    )
    return session


def reset_backends(*, setting: str, **kwargs: Any) -> None:
    """Reset the backends when a setting changes, as Django's handlers do in tests."""
    if setting in {"AGENT_SESSIONS", "DATABASES", "CACHES"}:
        sessions.reset()
