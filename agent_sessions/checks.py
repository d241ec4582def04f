"""System checks: mistakes in the settings, each with a hint and an id.

docs/checks.md has the table of ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections, router
from django.views.debug import get_default_exception_reporter_filter

from agent_sessions.backends.base import BaseSessionBackend
from agent_sessions.backends.database.checks import check_columns
from agent_sessions.backends.options import (
    ENCODE,
    check_policy,
    has_password,
    is_address,
    is_misread,
)
from agent_sessions.backends.wrapping import innermost
from agent_sessions.characters import printable
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.handler import CHAT_BACKEND, DEFAULT_ALIAS, sessions

_REDIS_LAYER = "channels_redis.core.RedisChannelLayer"
_IN_MEMORY_LAYER = "channels.layers.InMemoryChannelLayer"
Check = Callable[..., list[CheckMessage]]


def _printed(check: Check) -> Check:
    """Decorate a check whose messages are to be lines of what may be printed.

    Django's own `check` command prints them, too, and they quote settings, the errors
    of other people's modules and what lies in stores.
    """

    @wraps(check)
    def clean(*args: Any, **kwargs: Any) -> list[CheckMessage]:
        messages = check(*args, **kwargs)
        for message in messages:
            message.msg = printable(message.msg)
            message.hint = message.hint and printable(message.hint)
        return messages

    return clean


@_printed
def check_backends(**kwargs: Any) -> list[CheckMessage]:
    """Build each configured backend and ask it for its own findings."""
    try:
        aliases = list(sessions)
    except InvalidBackend as exc:
        return [_error(exc)]
    messages: list[CheckMessage] = []
    if DEFAULT_ALIAS not in aliases:
        messages.append(_error(sessions.unknown_alias(DEFAULT_ALIAS)))
    messages += _check_chat(aliases)
    for alias in aliases:
        try:
            backend = sessions[alias]
        except InvalidBackend as exc:
            messages.append(_error(exc))
        else:
            messages += _check_inner(backend)
            messages += _check_owners(backend)
            messages += backend.check()
            if "connections" in backend.options:
                messages += check_policy(backend, backend.directory.using)
    return messages


@_printed
def check_databases(
    *, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Report columns that don't fit, in the databases that may be queried.

    Django names them where `check --database` or `migrate` runs.
    """
    asked: set[str] = set()
    for alias in _aliases() if databases else ():
        # Told by check_backends.
        with suppress(InvalidBackend):
            asked.add(sessions[alias].directory.using)
    found = sorted(asked & set(databases or ()))
    return [message for using in found for message in check_columns(using)]


@_printed
def check_session_classes(**kwargs: Any) -> list[CheckMessage]:
    """Import the classes behind SDKBackend, which takes seconds: `check --deploy`."""
    messages: list[CheckMessage] = []
    for alias in _aliases():
        with suppress(InvalidBackend):
            backend: Any = sessions[alias]
            try:
                if backend.supports_loading:
                    backend.load()
            except InvalidBackend as exc:
                messages.append(_error(exc))
    return messages


def _check_chat(aliases: Sequence[str]) -> list[CheckMessage]:
    """Report that the chat's alias is unknown."""
    chosen: Any = getattr(settings, CHAT_BACKEND, DEFAULT_ALIAS)
    if chosen in aliases or chosen == DEFAULT_ALIAS:
        return []
    error = sessions.unknown_alias(chosen)
    return [
        Error(
            f"{CHAT_BACKEND} is {chosen!r}. {error.message}",
            hint=error.hint,
            id=error.id,
        )
    ]


def _aliases() -> list[str]:
    try:
        return list(sessions)
    except InvalidBackend:
        # Told by check_backends.
        return []


def _check_owners(backend: BaseSessionBackend) -> list[CheckMessage]:
    """Report sessions in another database than the users that may own them."""
    try:
        using = backend.directory.using
    except InvalidBackend:
        # Told for the alias that it wraps.
        return []
    users = router.db_for_write(get_user_model())
    if _place(using) == _place(users):
        return []
    return [
        Warning(
            f"AGENT_SESSIONS[{backend.alias!r}] keeps its sessions in the database "
            f"{using!r}, but users are in {users!r}: a session that has an owner can't "
            "be stored, since no foreign key leads to another database.",
            hint=f"Let the option database name {users!r}, or leave it out. Where only "
            f"sessions without an owner are kept, or {using!r} has the same users, "
            "silence this warning.",
            id="agent_sessions.W008",
        )
    ]


def _place(using: str) -> tuple[str, ...]:
    """Return which database an alias leads to: several may lead to one."""
    place = connections[using].settings_dict
    return tuple(str(place[name]) for name in ("ENGINE", "HOST", "PORT", "NAME"))


def _check_inner(backend: BaseSessionBackend) -> list[CheckMessage]:
    """Report that what a backend wraps isn't there, or is the backend itself."""
    try:
        innermost(backend)
    except InvalidBackend as exc:
        if exc.id == "agent_sessions.E002":
            return [
                Error(
                    f"AGENT_SESSIONS[{backend.alias!r}] can't wrap that: {exc.message}",
                    hint=exc.hint,
                    id="agent_sessions.E013",
                )
            ]
        # Whatever else is wrong is told for the inner alias.
        return [_error(exc)] if exc.id == "agent_sessions.E013" else []
    return []


def _error(exc: InvalidBackend) -> Error:
    return Error(exc.message, hint=exc.hint, id=exc.id)


# -- passwords -------------------------------------------------------------------------


@_printed
def check_layers(**kwargs: Any) -> list[CheckMessage]:
    """Report addresses of channel layers that are misread."""
    layers = getattr(settings, "CHANNEL_LAYERS", None)
    return [
        Error(
            f"{where} has characters that are taken for something else.",
            hint=ENCODE,
            id="agent_sessions.E030",
        )
        for where, address in _addresses("CHANNEL_LAYERS", layers)
        if is_misread(address)
    ]


@_printed
def check_shown_passwords(**kwargs: Any) -> list[CheckMessage]:
    """Report passwords that Django's error reports show: `check --deploy`.

    They list the settings, and hide those whose name says that they are secret.
    """
    cleanse = get_default_exception_reporter_filter().cleanse_setting
    return [
        Warning(
            f"{where} holds a password, which error reports show.",
            hint="Give the password by a name that Django hides: client_options="
            "{'password': …} of RedisBackend, PASSWORD in the OPTIONS of CACHES, "
            "arguments={'engine_kwargs': {'connect_args': {'password': …}}} of "
            "SDKBackend, {'address': …, 'password': …} in the hosts of CHANNEL_LAYERS.",
            id="agent_sessions.W030",
        )
        for name, value in _settings()
        for where, address in _addresses(name, cleanse(name, value))
        if has_password(address)
    ]


def _settings() -> Iterator[tuple[str, Any]]:
    aliases = getattr(settings, "AGENT_SESSIONS", None)
    yield "AGENT_SESSIONS", aliases
    yield "CHANNEL_LAYERS", getattr(settings, "CHANNEL_LAYERS", None)
    for params in aliases.values() if isinstance(aliases, dict) else ():
        if isinstance(params, dict) and "RedisBackend" in str(params.get("BACKEND")):
            cache = (params.get("OPTIONS") or {}).get("cache") or "default"
            yield f"CACHES[{cache!r}]", settings.CACHES.get(cache)


def _addresses(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Find the URLs in a setting, each with where it stands."""
    if is_address(value):
        yield where, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _addresses(f"{where}[{name!r}]", each)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _addresses(f"{where}[{number}]", each)


# -- what is fine on a developer's machine only: `check --deploy` ----------------------


@_printed
def check_deployment(**kwargs: Any) -> list[CheckMessage]:
    """Report what loses messages or lets strangers in, once there is a server."""
    uses_channels = not {"channels", "daphne"}.isdisjoint(settings.INSTALLED_APPS)
    if not (getattr(settings, "ASGI_APPLICATION", None) or uses_channels):
        return []
    messages = _check_channel_layer()
    if "*" in settings.ALLOWED_HOSTS:
        messages.append(
            Warning(
                'AgentConsumer takes sockets from any web site, since "*" in '
                "ALLOWED_HOSTS allows every origin.",
                hint="A page of someone else's could then talk to the agent as the "
                "user who is logged in. Name the hosts in ALLOWED_HOSTS; or wrap the "
                "routes in channels.security.websocket.OriginValidator with the "
                "origins of your pages, and silence this warning.",
                id="agent_sessions.W026",
            )
        )
    return messages


def _check_channel_layer() -> list[CheckMessage]:
    layers = getattr(settings, "CHANNEL_LAYERS", None)
    layer = layers.get("default") if isinstance(layers, dict) else None
    if not layer:
        found, id_ = "CHANNEL_LAYERS has no default layer", "agent_sessions.W021"
    elif not isinstance(layer, dict):
        return []
    elif layer.get("BACKEND") == _IN_MEMORY_LAYER:
        found, id_ = "CHANNEL_LAYERS['default'] is in memory", "agent_sessions.W022"
    else:
        return _check_redis_layer(layer)
    return [
        Warning(
            f"{found}, so a websocket hears the runs of other server processes up to "
            "half a second late.",
            hint="With more than one process, set CHANNEL_LAYERS['default'] to "
            "channels_redis.core.RedisChannelLayer; the extra is channels-redis.",
            id=id_,
        )
    ]


def _check_redis_layer(layer: dict[str, Any]) -> list[CheckMessage]:
    """Find the layer whose sockets would break every five seconds.

    redis-py 8 gives up reading after 5 s, just as long as channels_redis waits for a
    message (django/channels_redis issue 422).
    """
    if layer.get("BACKEND") != _REDIS_LAYER or not _redis_gives_up():
        return []
    config = layer.get("CONFIG")
    hosts = config.get("hosts") if isinstance(config, dict) else None
    if not isinstance(hosts, list | tuple):
        hosts = [None]
    if all(_has_timeout(host) for host in hosts):
        return []
    return [
        Warning(
            "CHANNEL_LAYERS['default'] leaves redis-py its time-out of 5 seconds, after "
            "which every idle websocket breaks off.",
            hint='Give each host as {"address": "redis://…", "socket_timeout": None}.',
            id="agent_sessions.W025",
        )
    ]


def _has_timeout(host: Any) -> bool:
    if isinstance(host, dict):
        return "socket_timeout" in host or _has_timeout(host.get("address"))
    return isinstance(host, str) and "socket_timeout=" in host


def _redis_gives_up() -> bool:
    try:
        return int(version("redis").partition(".")[0]) >= 8
    except (PackageNotFoundError, ValueError):
        return False
