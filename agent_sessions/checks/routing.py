"""Find the agents' websocket routes in an ASGI application of any shape."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

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
