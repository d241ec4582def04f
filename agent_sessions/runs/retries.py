"""A message that is sent again after its run failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.memory import Session


async def drop_unanswered(session: Session, items: list[dict[str, Any]]) -> None:
    """Take back the message of a failed run that is now sent again."""
    stored: list[Any] = list(await session.get_items(limit=len(items)))
    if [_said(item) for item in stored] == [_said(item) for item in items]:
        for _ in items:
            await session.pop_item()


def _said(item: Any) -> Any:
    """Return what a message says, however its store writes it.

    OpenAI's makes parts of a text, and adds an id and a status.
    """
    if item.get("role") != "user":
        return item
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    return item["role"], [
        {name: value for name, value in part.items() if value is not None}
        if isinstance(part, dict)
        else part
        for part in content or ()
    ]
