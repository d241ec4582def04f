"""Which model the demo talks to: its own, or a real one from the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from django.utils.translation import gettext as _

if TYPE_CHECKING:
    from agents.models.interface import Model


def is_demo() -> bool:
    """Return whether the offline demo model answers."""
    return not os.environ.get("OPENAI_API_KEY")


def is_openai() -> bool:
    """Return whether OpenAI itself answers, rather than a server that imitates it."""
    return not is_demo() and not os.environ.get("OPENAI_BASE_URL")


def label() -> str:
    """Name the model for people, without importing the SDK."""
    if is_demo():
        return _("Demo model (offline)")
    name = os.environ.get("OPENAI_MODEL") or _("the default model")
    base_url = os.environ.get("OPENAI_BASE_URL")
    host = urlsplit(base_url).hostname if base_url else "OpenAI"
    return _("%(model)s at %(host)s") % {"model": name, "host": host or base_url}


def build() -> Model:
    """Return the model that the environment chooses."""
    # Here and not above: the page's label must not pay for the SDK.
    from agents import OpenAIChatCompletionsModel, OpenAIResponsesModel
    from agents.models import get_default_model
    from openai import AsyncOpenAI

    from example_project.demo_model import DemoModel

    if is_demo():
        return DemoModel()
    client = AsyncOpenAI()
    name = os.environ.get("OPENAI_MODEL") or get_default_model()
    # Servers that imitate the API mostly speak its older half only.
    if not is_openai():
        return OpenAIChatCompletionsModel(model=name, openai_client=client)
    return OpenAIResponsesModel(model=name, openai_client=client)
