"""Checks of passwords in the settings: misread ones, and ones that reports show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.views.debug import get_default_exception_reporter_filter

from agent_sessions.backends.options import (
    ENCODE,
    has_password,
    is_address,
    is_misread,
)

_REDIS = "RedisBackend"


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
        if isinstance(params, dict) and _REDIS in str(params.get("BACKEND")):
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
