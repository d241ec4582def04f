"""Session ids: which are taken, which are refused, and that each is another."""

from __future__ import annotations

from typing import Any

import pytest

from agent_sessions.testing.contract.base import (
    ContractBase,
    each,
    message,
    messages,
    needs,
    texts,
)

ACCEPTED = {
    "one_character": "x",
    "255_characters": "x" * 255,
    "255_emoji": "👩" * 255,
    "unicode": "Gespräch-世界-שלום",
    "blanks_and_line_ends": " a b\tc\nd ",
    "separators": "a/b:c|d;e,f#g{h}i",
    "patterns": "*[ab]?%_\\",
    "quotes": "'; DROP TABLE x; --\"`",
    "path": "../../etc/passwd",
    "format": "%s %(x)s {x} $1",
}

REFUSED = {
    "empty": "",
    "256_characters": "x" * 256,
    "nul": "a\x00b",
    "lone_surrogate": "a\ud800b",
}

# Collations of databases, and key patterns of other stores, take these for the same.
PAIRS = {
    "case": ("a", "A"),
    "case_of_unicode": ("é", "É"),
    "accent": ("e", "é"),
    "trailing_blank": ("a", "a "),
    "leading_blank": ("a", " a"),
    "trailing_tab": ("a", "a\t"),
    "composed": ("\u00e9", "e\u0301"),
    "sharp_s": ("ss", "ß"),
    "width": ("a", "\uff41"),
    "emoji": ("😀", "😁"),
    "zero_width": ("a", "a\u200b"),
    "pattern": ("a*", "ab"),
    "wildcard": ("a_", "ab"),
    "prefix": ("a", "a:b"),
    "number": ("1", "01"),
}


class IdCases(ContractBase):
    @each(ACCEPTED)
    async def test_id_is_accepted(self, session_id: str) -> None:
        """Any text of 1 to 255 characters is an id, and comes back as it was."""
        session = await self.open(session_id)
        await session.clear_session()
        await session.add_items(messages(2))
        assert session.session_id == session_id
        assert len(await session.get_items()) == 2
        assert await session.pop_item() == message("item 1")
        await session.clear_session()
        assert await session.get_items() == []

    @each(REFUSED)
    async def test_id_is_refused(self, session_id: str) -> None:
        """What no database can keep raises ValueError, at the first use at latest."""
        with pytest.raises(ValueError):  # noqa: PT011 - stores word it as they like
            await self._use(session_id)

    async def _use(self, session_id: str) -> None:
        session: Any = await self.make_session(session_id)
        await session.add_items(messages(1))

    @needs("reopen")
    @each(PAIRS)
    async def test_ids_are_told_apart(self, pair: tuple[str, str]) -> None:
        """Ids are compared as they are, whatever a collation thinks of them."""
        prefix = self.new_id()
        # Both at the end, where databases pad with blanks.
        first, second = [await self.open(prefix + end) for end in pair]
        await first.add_items([message("first")])
        assert await second.get_items() == []
        await second.add_items([message("second")])
        assert texts(await first.get_items()) == ["first"]
        assert texts(await second.get_items()) == ["second"]
        await first.clear_session()
        assert await first.get_items() == []
        again = await self.open(prefix + pair[1])
        assert texts(await again.get_items()) == ["second"]
