"""System checks of what only a server needs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator, OriginValidator
from django.core import checks
from django.test import override_settings
from django.urls import path, re_path

from agent_sessions import checks as our_checks
from agent_sessions.checks.deployment import unguarded_routes, wildcard_routes
from agent_sessions.consumers import AgentConsumer


def redis_layer(*hosts: Any) -> dict[str, Any]:
    config = {"CONFIG": {"hosts": list(hosts)}} if hosts else {}
    layer = {"BACKEND": "channels_redis.core.RedisChannelLayer", **config}
    return {"default": layer}


URL = "redis://127.0.0.1"
REDIS_LAYER = redis_layer({"address": URL, "socket_timeout": None})


class SupportConsumer(AgentConsumer):
    agent: Any = object()


# Any, as Channels' types of routes don't meet Django's of path().
open_consumer: Any = SupportConsumer.as_asgi(validate_origin=False)


def nested(route: str, application: Any) -> Any:
    """Route to an application, or to more routes."""
    return path(route, application)


guarded_application = ProtocolTypeRouter(
    {
        "websocket": AllowedHostsOriginValidator(
            AuthMiddlewareStack(
                URLRouter([nested("ws/<str:session_id>/", open_consumer)])
            )
        )
    }
)
open_application = ProtocolTypeRouter(
    {
        "websocket": AuthMiddlewareStack(
            URLRouter([nested("ws/<str:session_id>/", open_consumer)])
        )
    }
)


def ids(messages: list[checks.CheckMessage]) -> list[str]:
    return [str(message.id).removeprefix("agent_sessions.") for message in messages]


def deploy_ids() -> list[str]:
    return ids(our_checks.check_deployment())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (REDIS_LAYER, []),
        (redis_layer(f"{URL}?socket_timeout=60"), []),
        (redis_layer({"address": f"{URL}?socket_timeout=60"}), []),
        (redis_layer(), ["W025"]),
        (redis_layer(URL), ["W025"]),
        (redis_layer(("127.0.0.1", 6379)), ["W025"]),
        (redis_layer({"address": URL}), ["W025"]),
        (redis_layer({"address": URL, "socket_timeout": None}, URL), ["W025"]),
        ({"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}, ["W022"]),
        ({}, ["W021"]),
        (None, ["W021"]),
        ("redis", ["W021"]),
        ({"other": {}}, ["W021"]),
    ],
)
def test_channel_layers(layers: Any, expected: list[str]) -> None:
    with override_settings(
        ASGI_APPLICATION="tests.checks.test_checks_deployment.guarded_application",
        CHANNEL_LAYERS=layers,
    ):
        assert deploy_ids() == expected


def test_a_project_without_websockets_is_left_alone() -> None:
    assert deploy_ids() == []


@override_settings(CHANNEL_LAYERS={})
def test_a_channels_app_is_enough_to_look_at_layers(settings: Any) -> None:
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "channels"]
    assert deploy_ids() == ["W021"]


@override_settings(CHANNEL_LAYERS=REDIS_LAYER)
def test_a_route_without_origin_validation_is_named() -> None:
    with override_settings(
        ASGI_APPLICATION="tests.checks.test_checks_deployment.open_application"
    ):
        (message,) = our_checks.check_deployment()
    assert message.id == "agent_sessions.W023"
    assert "'ws/<str:session_id>/'" in message.msg


@pytest.mark.parametrize(
    "name", ["tests.checks.test_checks_deployment.absent", "no.where", "", 5]
)
@override_settings(CHANNEL_LAYERS=REDIS_LAYER)
def test_an_application_that_is_not_there(name: Any) -> None:
    with override_settings(ASGI_APPLICATION=name):
        assert deploy_ids() == (["W024"] if name else [])


@override_settings(CHANNEL_LAYERS=REDIS_LAYER)
def test_an_application_whose_module_fails(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_asgi.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with override_settings(ASGI_APPLICATION="broken_asgi.application"):
        (message,) = our_checks.check_deployment()
    assert "ZeroDivisionError: division by zero" in message.msg


def router(*routes: Any) -> ProtocolTypeRouter:
    return ProtocolTypeRouter({"websocket": URLRouter(list(routes))})


class Stubborn:
    """An application that answers no question."""

    def __getattr__(self, name: str) -> Any:
        # pytest asks for names like these.
        raise AttributeError(name) if name.startswith("__") else RuntimeError(name)


def circle() -> Any:
    outer = SimpleNamespace()
    outer.inner = SimpleNamespace(app=outer)
    return outer


def guarded_consumer() -> Any:
    return OriginValidator(open_consumer, ["example.org"])


class OpenConsumer(SupportConsumer):
    validate_origin = False


class StrangeConsumer:
    """Another library's consumer, which is its own business."""


def strange_consumer() -> None:
    """Stand for what as_asgi() gives."""


strange_consumer.consumer_class = StrangeConsumer  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("application", "expected"),
    [
        (None, []),
        (lambda scope: None, []),
        (5, []),
        (Stubborn(), []),
        (circle(), []),
        (ProtocolTypeRouter({}), []),
        (SimpleNamespace(application_mapping=3, routes=7), []),
        (strange_consumer, []),
        (SupportConsumer.as_asgi(), []),
        (OpenConsumer.as_asgi(validate_origin=True), []),
        (OpenConsumer.as_asgi(), [""]),
        (open_consumer, [""]),
        (guarded_consumer(), []),
        (router(nested("a/", guarded_consumer())), []),
        (
            router(
                nested("a/", open_consumer), nested("b/", SupportConsumer.as_asgi())
            ),
            ["a/"],
        ),
        (
            router(re_path(r"^ws/(?P<session_id>\w+)/$", open_consumer)),
            [r"^ws/(?P<session_id>\w+)/$"],
        ),
        (router(nested("a/", URLRouter([nested("b/", open_consumer)]))), ["a/b/"]),
        (SimpleNamespace(app=router(nested("a/", open_consumer))), ["a/"]),
        (partial(open_consumer), [""]),
        (
            SimpleNamespace(
                routes=[SimpleNamespace(path="/ws", app=open_consumer, pattern=None)]
            ),
            [""],
        ),
    ],
)
def test_routing_of_any_shape(application: Any, expected: list[str]) -> None:
    assert unguarded_routes(application) == expected


@pytest.mark.parametrize(
    "absent", ["agent_sessions.consumers", "channels.security.websocket"]
)
def test_routing_without_channels(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, absent)
    assert unguarded_routes(open_application) == []


# -- an origin check that lets everybody in --------------------------------------------


class OwnValidator(OriginValidator):
    """A validator with rules of its own, which may well refuse what "*" allows."""

    def validate_origin(self, parsed_origin: Any) -> bool:
        return False


def validated(*hosts: str, inner: Any = open_consumer) -> Any:
    return OriginValidator(router(nested("a/", inner)), hosts)


@pytest.mark.parametrize(
    ("application", "own_hosts", "expected"),
    [
        (SupportConsumer.as_asgi(), ["*"], [""]),
        (SupportConsumer.as_asgi(), ["www.example.com", "*"], [""]),
        (SupportConsumer.as_asgi(), ["www.example.com"], []),
        (SupportConsumer.as_asgi(), [".example.com"], []),
        (SupportConsumer.as_asgi(), [], []),
        (validated("*"), ["www.example.com"], ["a/"]),
        (validated("https://www.example.com"), ["*"], []),
        (validated("*", inner=SupportConsumer.as_asgi()), ["*"], ["a/"]),
        (validated("*", inner=SupportConsumer.as_asgi()), ["www.example.com"], []),
        (validated("www.example.com", inner=SupportConsumer.as_asgi()), ["*"], []),
        (OriginValidator(validated("www.example.com"), ["*"]), ["*"], []),
        (OwnValidator(open_consumer, ["*"]), ["*"], []),
        # Nothing checks this one, which is W023.
        (open_consumer, ["*"], []),
        (strange_consumer, ["*"], []),
        (circle(), ["*"], []),
    ],
)
def test_routes_with_a_wildcard(
    application: Any, own_hosts: list[str], expected: list[str]
) -> None:
    assert wildcard_routes(application, own_hosts) == expected


closed_application = router(nested("ws/<str:session_id>/", SupportConsumer.as_asgi()))


@override_settings(CHANNEL_LAYERS=REDIS_LAYER)
def test_allowed_hosts_of_any_name_are_reported_with_the_way_out() -> None:
    where = {
        "ASGI_APPLICATION": "tests.checks.test_checks_deployment.closed_application"
    }
    for hosts in (["*"], ["www.example.com", "*"]):
        with override_settings(ALLOWED_HOSTS=hosts, **where):
            (message,) = our_checks.check_deployment()
        assert message.id == "agent_sessions.W026"
        assert "'ws/<str:session_id>/'" in message.msg
        assert "ALLOWED_HOSTS" in str(message.hint)
    for hosts in (["www.example.com"], [".example.com"], []):
        with override_settings(ALLOWED_HOSTS=hosts, **where):
            assert deploy_ids() == []


@override_settings(CHANNEL_LAYERS=REDIS_LAYER, ALLOWED_HOSTS=["*"])
def test_allowed_hosts_are_looked_at_without_routes(settings: Any) -> None:
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "channels"]
    (message,) = our_checks.check_deployment()
    assert (message.id, message.msg[:19]) == (
        "agent_sessions.W026",
        "AgentConsumer takes",
    )
    settings.ALLOWED_HOSTS = ["www.example.com"]
    assert deploy_ids() == []


@override_settings(CHANNEL_LAYERS=REDIS_LAYER, ALLOWED_HOSTS=["*"])
def test_the_validator_of_allowed_hosts_is_no_better_than_they_are() -> None:
    guarded = AllowedHostsOriginValidator(router(nested("a/", open_consumer)))
    assert unguarded_routes(guarded) == []
    assert wildcard_routes(guarded, ["*"]) == ["a/"]
