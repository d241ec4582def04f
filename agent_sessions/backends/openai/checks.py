"""What can be wrong with the options of OpenAIConversationsBackend."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from django.core import checks

from agent_sessions.backends.options import (
    ENCODE,
    is_address,
    is_misread,
    is_printable,
)

_LOCAL = {"localhost", "127.0.0.1", "::1"}


def check_options(alias: str, options: dict[str, Any]) -> list[checks.CheckMessage]:
    """Report wrong options, each with a hint; nothing is asked of the network."""
    setting = f"AGENT_SESSIONS[{alias!r}]['OPTIONS']"
    messages: list[checks.CheckMessage] = []
    api_key = options["api_key"] or os.environ.get("OPENAI_API_KEY")
    if api_key and isinstance(api_key, str) and not is_printable(api_key):
        messages.append(
            checks.Error(
                f"{setting}['api_key'], or OPENAI_API_KEY, holds a character that can't "
                "be sent: a blank, a line's end or a letter that is not ASCII.",
                hint="Copy the key again, without what stands around it.",
                id="agent_sessions.E018",
            )
        )
    if not api_key:
        messages.append(
            checks.Warning(
                f"{setting} has no 'api_key', and OPENAI_API_KEY is not set.",
                hint="Set OPENAI_API_KEY in the environment of the server; the key "
                "needs the permission to write conversations.",
                id="agent_sessions.W010",
            )
        )
    if (base_url := options["base_url"]) is not None:
        messages += _check_url(setting, base_url)
    for name, least in (("timeout", 0.001), ("max_retries", 0)):
        value = options[name]
        kinds = int if name == "max_retries" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
            messages.append(
                checks.Error(
                    f"{setting}[{name!r}] is not a number of {least:g} or more.",
                    hint="Give seconds, such as 60."
                    if name == "timeout"
                    else "Give a whole number, such as 2.",
                    id="agent_sessions.E018",
                )
            )
    return messages


def _check_url(setting: str, base_url: Any) -> list[checks.CheckMessage]:
    if is_address(base_url) and is_misread(base_url):
        return [
            checks.Error(
                f"{setting}['base_url'] has characters that are taken for something "
                "else.",
                hint=ENCODE,
                id="agent_sessions.E018",
            )
        ]
    url = urlsplit(base_url) if is_address(base_url) else None
    if url is None or url.scheme not in {"http", "https"} or not url.hostname:
        return [
            checks.Error(
                f"{setting}['base_url'] is no address.",
                hint='Write it as "https://api.openai.com/v1".',
                id="agent_sessions.E018",
            )
        ]
    if url.scheme == "http" and url.hostname not in _LOCAL:
        return [
            checks.Warning(
                f"{setting}['base_url'] is not encrypted: the API key and all "
                "conversations can be read on the way.",
                hint="Use https.",
                id="agent_sessions.W010",
            )
        ]
    return []
