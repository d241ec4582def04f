"""The two agents of the demo and their tools. Importing this imports the SDK."""

from __future__ import annotations

import json
import zlib
from typing import Any

import agents
from agents import Agent, function_tool, handoff

from example_project import model_choice

SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")
STATES = ("being packed", "on its way", "delivered")


@function_tool
async def get_weather(city: str) -> str:
    """Return today's weather in a city.

    Args:
        city: The city's name.
    """
    number = zlib.crc32(city.casefold().encode())
    return json.dumps(
        {
            "city": city,
            "sky": SKIES[number % len(SKIES)],
            "celsius": 4 + number // 7 % 24,
        }
    )


@function_tool
async def order_status(order_id: int) -> str:
    """Return where an order is.

    Args:
        order_id: The order's number.
    """
    return json.dumps(
        {
            "order": order_id,
            "status": STATES[order_id % len(STATES)],
            "price": _price(order_id),
        }
    )


@function_tool(needs_approval=True)
async def refund_order(order_id: int) -> str:
    """Pay an order's price back. A person must approve each refund.

    Args:
        order_id: The order's number.
    """
    return json.dumps({"order": order_id, "refunded": _price(order_id)})


@function_tool
async def list_invoices() -> str:
    """Return the customer's last invoices."""
    return json.dumps(
        [
            {"invoice": f"2026-{number:03}", "order": order, "total": _price(order)}
            for number, order in ((17, 41), (18, 42), (19, 43))
        ]
    )


def build_support_agent() -> Agent[Any]:
    """Return the agent that the chat starts with, joined to its colleague."""
    model = model_choice.build()
    # Without OpenAI's own key there is nowhere to send traces to.
    agents.set_tracing_disabled(not model_choice.is_openai())
    billing = Agent[Any](
        name="Billing specialist",
        handoff_description="Answers questions on invoices and payments.",
        instructions=(
            "You answer questions on invoices, payments and refunds for a small shop. "
            "Hand anything else back to Support. Be brief and friendly."
        ),
        model=model,
        tools=[list_invoices, refund_order],
    )
    support = Agent[Any](
        name="Support",
        handoff_description="Helps with orders, the weather and everything else.",
        instructions=(
            "You are the support agent of a small shop. You look up orders and the "
            "weather with your tools, and refund orders when asked; each refund is "
            "approved by a person. Hand questions on invoices to the billing "
            "specialist. Be brief and friendly."
        ),
        model=model,
        tools=[get_weather, order_status, refund_order],
        handoffs=[handoff(billing)],
    )
    billing.handoffs.append(handoff(support))
    return support


def _price(order_id: int) -> str:
    return f"{5 + order_id * 37 % 90}.90 EUR"
