"""Items of the size and shape that a conversation has."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

_TEXT = (
    "answer asked before boat book carrier city Köln customer day depot early evening "
    "every flight friend garden house however invoice island journey key late letter "
    "long market Monday morning mountain never number often order parcel people please "
    "price quick question reason refund river second should silver station summer table "
    "Thursday ticket today train under value very village water week window winter year"
)
_WORDS = tuple(_TEXT.split())


def turn(number: int) -> list[Any]:
    """Return what one turn adds: a question of 0.5 KB and an answer of 2 KB."""
    return [
        {"role": "user", "content": f"{number}: {_text(450, number)}"},
        {
            "id": f"msg_{number:032x}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {
                    "type": "output_text",
                    "text": _text(1_700, -number),
                    "annotations": [],
                    "logprobs": [],
                }
            ],
        },
    ]


@lru_cache(maxsize=8)
def history(count: int) -> list[Any]:
    """Return `count` items, whole turns as far as they go."""
    return [item for number in range((count + 1) // 2) for item in turn(number)][:count]


def _text(length: int, seed: int) -> str:
    """Return words in an order of their own, so that the text packs like a real one."""
    words = random.Random(seed).choices(_WORDS, k=length // 4)  # noqa: S311
    return " ".join(words)[:length]
