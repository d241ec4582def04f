"""Items of the size and shape that a conversation has."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

_WORDS = (
    "The quick answer is that the parcel left the depot in Köln this morning, so it "
    "should be with you on Thursday. “Should” is the carrier's word, not mine… "
)


def turn(number: int) -> list[Any]:
    """Give what one turn adds: a question of 0.5 KB and an answer of 2 KB."""
    return [
        {"role": "user", "content": f"{number}: {_text(450)}"},
        {
            "id": f"msg_{number:032x}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {
                    "type": "output_text",
                    "text": _text(1_700),
                    "annotations": [],
                    "logprobs": [],
                }
            ],
        },
    ]


def history(count: int) -> list[Any]:
    """Give `count` items, whole turns as far as they go."""
    return [item for number in range((count + 1) // 2) for item in turn(number)][:count]


def _text(length: int) -> str:
    return "".join(islice(cycle(_WORDS), length))
