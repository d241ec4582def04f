"""Tools for tests, one that just runs and one that asks first."""

from __future__ import annotations

from agents import function_tool

refunded: list[str] = []


@function_tool
def lookup(order: str) -> str:
    """Look an order up."""
    return f"order {order} is on its way"


@function_tool(needs_approval=True)
def refund(order: str) -> str:
    """Refund an order."""
    refunded.append(order)
    return f"refunded {order}"
