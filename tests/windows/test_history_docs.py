"""The examples of docs/windows.md, run as they stand."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from agent_sessions import DjangoSession
from agent_sessions import windows as history
from agent_sessions.testing.base import say, scripted
from agent_sessions.windows.tokens import ATTACHMENT_TOKENS, ENCODING, ITEM_TOKENS

PAGE = (Path(__file__).parents[2] / "docs" / "windows.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.django_db
async def test_every_example_runs() -> None:
    session = DjangoSession("s")
    agent, model = scripted([say(f"answer {n}") for n in range(len(EXAMPLES))])
    names: dict[str, Any] = {"agent": agent, "session": session}
    for number, example in enumerate(EXAMPLES):
        code = compile(
            example, "windows.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        waiting = eval(code, names)  # noqa: S307 - the page's own examples
        if inspect.isawaitable(waiting):
            await waiting
        assert names["result"].final_output == f"answer {number}"
    model.assert_complete()
    # Every question, every answer and the fact of the example, once each.
    assert len(await session.get_items()) == 2 * len(EXAMPLES) + 1


def test_every_window_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    made = {
        name
        for name in history.__all__
        if inspect.isfunction(getattr(history, name)) and "token" not in name
    }
    assert set(rows) == made | {"token_budget"}


def test_the_figures_are_those_of_the_code() -> None:
    assert f"an item costs {ITEM_TOKENS} tokens" in PAGE
    assert f"an image or file {ATTACHMENT_TOKENS:,}" in PAGE
    assert f"`{ENCODING}` counts" in PAGE
