"""Checks of what is fine on a developer's machine only: `check --deploy`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Warning
from django.utils.module_loading import import_string

REDIS_LAYER = "channels_redis.core.RedisChannelLayer"
IN_MEMORY_LAYER = "channels.layers.InMemoryChannelLayer"


def check_deployment(**kwargs: Any) -> list[CheckMessage]:
    """Report what loses messages or lets strangers in, once there is a server."""
    path = getattr(settings, "ASGI_APPLICATION", None)
    if not path and not _uses_channels():
        return []
    return [*_check_layers(), *(_check_routing(path) if path else _check_hosts())]


def _uses_channels() -> bool:
    return not {"channels", "daphne"}.isdisjoint(settings.INSTALLED_APPS)


def _check_layers() -> list[CheckMessage]:
    layers = getattr(settings, "CHANNEL_LAYERS", None)
    layer = layers.get("default") if isinstance(layers, dict) else None
    if not layer:
        return [
            Warning(
                "CHANNEL_LAYERS has no default layer, so a websocket sees only the "
                "runs of its own server process.",
                hint="With more than one process, set CHANNEL_LAYERS['default'] to "
                "channels_redis.core.RedisChannelLayer; the extra is channels-redis.",
                id="agent_sessions.W021",
            )
        ]
    if isinstance(layer, dict) and layer.get("BACKEND") == IN_MEMORY_LAYER:
        return [
            Warning(
                "CHANNEL_LAYERS['default'] is in memory, so a websocket sees only the "
                "runs of its own server process.",
                hint="Use channels_redis.core.RedisChannelLayer; the extra is "
                "channels-redis.",
                id="agent_sessions.W022",
            )
        ]
    return _check_redis_layer(layer) if isinstance(layer, dict) else []


def _check_redis_layer(layer: dict[str, Any]) -> list[CheckMessage]:
    """Find the layer whose sockets would break every five seconds.

    redis-py 8 gives up reading after 5 s, just as long as channels_redis waits for a
    message (django/channels_redis issue 422).
    """
    if layer.get("BACKEND") != REDIS_LAYER or not _redis_gives_up():
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


def _check_routing(path: str) -> list[CheckMessage]:
    try:
        application = import_string(path)
    except Exception as exc:
        return [
            Warning(
                f"ASGI_APPLICATION {path!r} can't be imported: "
                f"{type(exc).__name__}: {exc}",
                hint="Its websocket routes could not be checked. Correct the path, or "
                "what the module imports.",
                id="agent_sessions.W024",
            )
        ]
    return [
        *map(_unguarded, unguarded_routes(application)),
        *map(_wildcard, wildcard_routes(application, settings.ALLOWED_HOSTS)),
    ]


def _check_hosts() -> list[CheckMessage]:
    """Return what an AgentConsumer does by itself, where its routes can't be found."""
    return [_wildcard(None)] if "*" in settings.ALLOWED_HOSTS else []


def _unguarded(route: str) -> CheckMessage:
    return Warning(
        f"The websocket route {route!r} of ASGI_APPLICATION takes sockets from "
        "any web site.",
        hint="A page of someone else's could then talk to the agent as the user "
        "who is logged in. Leave validate_origin on, or wrap the routes in "
        "channels.security.websocket.AllowedHostsOriginValidator.",
        id="agent_sessions.W023",
    )


def _wildcard(route: str | None) -> CheckMessage:
    where = f"The websocket route {route!r} of ASGI_APPLICATION takes"
    return Warning(
        f"{where if route is not None else 'AgentConsumer takes'} sockets from any web "
        'site, since "*" allows every origin.',
        hint="A page of someone else's could then talk to the agent as the user who is "
        "logged in. Name the hosts in ALLOWED_HOSTS, or wrap the routes in "
        "channels.security.websocket.OriginValidator with the origins of your pages.",
        id="agent_sessions.W026",
    )


# -- the agents' websocket routes in an ASGI application of any shape ------------------

# Where middleware keeps what it wraps: Channels' own, Starlette's and its like,
# functools.wraps and functools.partial.
_INNER = ("application", "inner", "app", "__wrapped__", "func")


def unguarded_routes(application: Any) -> list[str]:
    """Name the routes to an AgentConsumer that nothing checks the origin for.

    An application that nobody can look into has none: a check guesses no fault.
    """
    return [
        route for route, hosts in _agent_routes(application, own_hosts=()) if not hosts
    ]


def wildcard_routes(application: Any, own_hosts: Collection[str]) -> list[str]:
    """Name the routes to an AgentConsumer whose checks all allow every origin.

    `own_hosts` are those that the consumer allows by itself.
    """
    return [
        route
        for route, hosts in _agent_routes(application, own_hosts)
        if hosts and all("*" in allowed for allowed in hosts)
    ]


def _agent_routes(
    application: Any, own_hosts: Collection[str]
) -> Iterator[tuple[str, list[Collection[str]]]]:
    """Return each route to an AgentConsumer, with what each check on it allows."""
    consumers = sys.modules.get("agent_sessions.consumers")
    security = sys.modules.get("channels.security.websocket")
    if consumers is None or security is None:
        # Then the application can't have routes to them either.
        return
    guard = security.OriginValidator
    for route, path, consumer, options in _walk(application, "", ()):
        if issubclass(consumer, consumers.AgentConsumer):
            hosts = [_allowed(node, guard) for node in path if isinstance(node, guard)]
            if options.get("validate_origin", consumer.validate_origin):
                hosts.append(own_hosts)
            yield route, hosts


def _allowed(validator: Any, plain: Any) -> Collection[str]:
    """Return the origins that a validator allows; none where it has rules of its own."""
    kind = type(validator)
    for rule in ("valid_origin", "validate_origin", "match_allowed_origin"):
        if getattr(kind, rule) is not getattr(plain, rule):
            return ()
    allowed = _attribute(validator, "allowed_origins")
    return allowed if isinstance(allowed, Collection) else ()


def _walk(
    node: Any, route: str, path: tuple[Any, ...]
) -> Iterator[tuple[str, tuple[Any, ...], Any, Mapping[str, Any]]]:
    """Return the consumers below a node: route, what lies around, class, options."""
    if node is None or any(node is one for one in path):
        return
    consumer = _attribute(node, "consumer_class")
    if isinstance(consumer, type):
        options = _attribute(node, "consumer_initkwargs")
        yield route, path, consumer, options if isinstance(options, Mapping) else {}
        return
    for step, below in _below(node):
        yield from _walk(below, route + step, (*path, node))


def _below(node: Any) -> Iterator[tuple[str, Any]]:
    mapping = _attribute(node, "application_mapping")
    if isinstance(mapping, Mapping):
        yield from (("", below) for below in mapping.values())
    routes = _attribute(node, "routes")
    if isinstance(routes, (list, tuple)):
        for entry in routes:
            pattern = _attribute(entry, "pattern")
            yield str(pattern or ""), _attribute(entry, "callback")
            yield str(pattern or ""), _attribute(entry, "app")
    for name in _INNER:
        yield "", _attribute(node, name)


def _attribute(node: Any, name: str) -> Any:
    """Read an attribute of an object that may do anything when asked."""
    try:
        return getattr(node, name, None)
    except Exception:
        return None
