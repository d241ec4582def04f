"""Find the agents' websocket routes in an ASGI application of any shape."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

# Where middleware keeps what it wraps: Channels' own, Starlette's and its like,
# functools.wraps and functools.partial.
_INNER = ("application", "inner", "app", "__wrapped__", "func")


def unguarded_routes(application: Any) -> list[str]:
    """Name the routes to an AgentConsumer that nothing checks the origin for.

    An application that nobody can look into has none: a check guesses no fault.
    """
    consumers = sys.modules.get("agent_sessions.consumers")
    security = sys.modules.get("channels.security.websocket")
    if consumers is None or security is None:
        # Then the application can't have routes to them either.
        return []
    found = _walk(application, "", security.OriginValidator, frozenset())
    return [
        route
        for route, consumer, options in found
        if issubclass(consumer, consumers.AgentConsumer)
        and not options.get("validate_origin", consumer.validate_origin)
    ]


def _walk(
    node: Any, route: str, guard: type, path: frozenset[int]
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Give the unguarded consumers below a node: route, class, options."""
    if node is None or id(node) in path or isinstance(node, guard):
        return
    path |= {id(node)}
    consumer = _attribute(node, "consumer_class")
    if isinstance(consumer, type):
        options = _attribute(node, "consumer_initkwargs")
        yield route, consumer, options if isinstance(options, Mapping) else {}
        return
    for step, below in _below(node):
        yield from _walk(below, route + step, guard, path)


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
