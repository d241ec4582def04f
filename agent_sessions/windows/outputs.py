"""A window that keeps everything but the text of old tool outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from agent_sessions.items import Item
from agent_sessions.items.kinds import KINDS, tool_name, type_and_role
from agent_sessions.windows.links import find_calls, lay_out
from agent_sessions.windows.turns import Window, check_count

MARKER = "[older tool output left out]"


def drop_old_tool_outputs(
    keep_turns: int = 1,
    *,
    keep_characters: int = 0,
    keep_tools: Collection[str] = (),
    marker: str = MARKER,
) -> Window:
    """Send a short marker instead of what tools gave in older turns.

    The newest `keep_turns` turns of the history stay whole, and so does what the tools
    named in `keep_tools` gave. `keep_characters` leaves the beginning of each output.
    Calls stay with their arguments, and an output is replaced only by a shorter one.
    """
    check_count("keep_turns", keep_turns, 0)
    check_count("keep_characters", keep_characters, 0)
    if isinstance(keep_tools, str):
        raise TypeError(f"keep_tools is {keep_tools!r}; give a list of tools' names.")
    return OldToolOutputs(keep_turns, keep_characters, frozenset(keep_tools), marker)


@dataclass(frozen=True, slots=True)
class OldToolOutputs(Window):
    """See drop_old_tool_outputs()."""

    keep_turns: int
    keep_characters: int
    keep_tools: frozenset[str]
    marker: str

    def cut(self, history: Sequence[Item], fixed: Sequence[Item]) -> list[Item]:
        """Return what stays of `history`. See Window.cut()."""
        layout = lay_out(history, fixed)
        calls = find_calls(history)
        kept = []
        for index, (item, turn) in enumerate(zip(history, layout.turns, strict=True)):
            if turn is None:
                continue
            kept.append(item)
            call = calls.get(index)
            source = item if call is None else history[call]
            if turn <= layout.last - self.keep_turns and not self._keeps(source):
                self._shorten(item)
        return kept

    def _keeps(self, call: Item) -> bool:
        names = tool_name(call, type_and_role(call)[0]), call.get("name")
        return any(isinstance(n, str) and n in self.keep_tools for n in names)

    def _shorten(self, item: Item) -> None:
        # In place: the SDK knows the history by its objects. A changed copy would be
        # new to it, and stored again in every run.
        kind = KINDS.get(type_and_role(item)[0])
        if kind is None or not kind.gave:
            return
        field = kind.gave
        value = item.get(field)
        if kind.texts:
            if isinstance(value, list):
                item[field] = [self._shorten_parts(part, kind.texts) for part in value]
        elif isinstance(value, str):
            item[field] = self._short(value)
        elif isinstance(value, list):
            item[field] = self._short_list(value)

    def _shorten_parts(self, result: Any, names: tuple[str, ...]) -> Any:
        if not isinstance(result, dict):
            return result
        changed = {
            name: self._short(result[name])
            for name in names
            if isinstance(result.get(name), str)
        }
        return result | changed

    def _short_list(self, content: list[Any]) -> Any:
        """Shorten an output of several parts; images and files go as a whole."""
        texts = [
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        text = "\n".join(texts)
        short = self._cut(text)
        only_text = len(texts) == len(content)
        return content if only_text and len(short) >= len(text) else short

    def _short(self, text: str) -> str:
        short = self._cut(text)
        return short if len(short) < len(text) else text

    def _cut(self, text: str) -> str:
        if not self.keep_characters:
            return self.marker
        return f"{text[: self.keep_characters]}\n{self.marker}"
