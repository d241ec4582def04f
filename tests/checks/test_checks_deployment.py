"""System checks of what only a server needs."""

from __future__ import annotations

from typing import Any

import pytest
from django.core import checks
from django.test import override_settings

from agent_sessions import checks as our_checks


def redis_layer(*hosts: Any) -> dict[str, Any]:
    config = {"CONFIG": {"hosts": list(hosts)}} if hosts else {}
    layer = {"BACKEND": "channels_redis.core.RedisChannelLayer", **config}
    return {"default": layer}


URL = "redis://127.0.0.1"
REDIS_LAYER = redis_layer({"address": URL, "socket_timeout": None})


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
        ASGI_APPLICATION="mysite.asgi.application", CHANNEL_LAYERS=layers
    ):
        assert deploy_ids() == expected


def test_a_project_without_websockets_is_left_alone() -> None:
    assert deploy_ids() == []


@override_settings(CHANNEL_LAYERS={})
def test_a_channels_app_is_enough_to_look_at_layers(settings: Any) -> None:
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "channels"]
    assert deploy_ids() == ["W021"]


@override_settings(
    CHANNEL_LAYERS=REDIS_LAYER, ASGI_APPLICATION="mysite.asgi.application"
)
def test_allowed_hosts_of_any_name_are_reported_with_the_way_out() -> None:
    for hosts in (["*"], ["www.example.com", "*"]):
        with override_settings(ALLOWED_HOSTS=hosts):
            (message,) = our_checks.check_deployment()
        assert message.id == "agent_sessions.W026"
        assert "ALLOWED_HOSTS" in str(message.hint)
    for hosts in (["www.example.com"], [".example.com"], []):
        with override_settings(ALLOWED_HOSTS=hosts):
            assert deploy_ids() == []
