"""Pages of a history as its readers see them, opened as far as the keys go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent_sessions.backends.base import Page
from agent_sessions.encryption import Vault
from agent_sessions.encryption.reading import Steps
from agent_sessions.encryption.vault import Opened
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import StoredItem, encode_texts

# Items that are looked at to find a turn's end.
_AHEAD = 50
# Items of a step back, to find the originals of copies.
_BACK = 500


def open_page(vault: Vault, page: Page) -> Steps[Page]:
    """Open a page's items.

    What needs an unknown key stays in its envelope, for readers to tell; what doesn't
    open with its own key, or is a copy, has no item. Other pages are asked for, by the
    arguments of page(), where turns have a lifetime or copies may be there.
    """
    seen = yield from _originals(vault, page)
    pairs = [_open(vault, stored, seen) for stored in page.items]
    if vault.lifetime is not None:
        goes_on = page.has_later and (yield from _goes_on(vault, pairs))
        hidden = vault.count_hidden([each for _, each in pairs], goes_on=goes_on)
        if hidden:
            return Page([stored for stored, _ in pairs[hidden:]], False, page.has_later)
    return Page([stored for stored, _ in pairs], page.has_earlier, page.has_later)


def is_closed(page: Page) -> bool:
    """Return whether items of an opened page are still in their envelopes."""
    return any(stored.is_closed and stored.item is not None for stored in page.items)


def _originals(vault: Vault, page: Page) -> Steps[set[str]]:
    """Return the ids of a page's envelopes that lie before it, as far as may be."""
    wanted = {vault.id_of(stored.item) for stored in page.items} - {""}
    found: list[Any] = [stored.item for stored in page.items]
    seen: set[str] = set()
    while page.has_earlier and page.items and vault.may_have_copies(found):
        page = yield {"before": page.items[0].position, "limit": _BACK}
        items = [stored.item for stored in page.items]
        found = [*items, *found]
        # What opens nowhere is no original.
        originals = (each for each in items if vault.id_of(each) in wanted)
        seen |= {vault.id_of(each) for each in originals if _opens(vault, each)}
    return seen


def _opens(vault: Vault, stored: Any) -> bool:
    try:
        return vault.open(stored) is not None
    except EncryptionError:
        return False


def _open(
    vault: Vault, stored: StoredItem, seen: set[str]
) -> tuple[StoredItem, Opened | None]:
    try:
        opened = vault.open(stored.item)
    except EncryptionError:
        envelope = vault.carrier.unload(stored.item)
        key_id = envelope["kid"]
        return replace(stored, item=envelope, is_closed=True, missing_key=key_id), None
    if opened is None or opened.envelope_id in seen:
        return replace(stored, item=None, is_closed=True), None
    seen.add(opened.envelope_id)
    opened_item = replace(
        stored,
        item=opened.item,
        raw=encode_texts([opened.item])[0],
        envelope_id=opened.envelope_id,
    )
    return opened_item, opened


def _goes_on(
    vault: Vault, pairs: list[tuple[StoredItem, Opened | None]]
) -> Steps[bool]:
    """Return whether the last turn of a page has later items whose time isn't over."""
    position = pairs[-1][0].position if pairs else 0
    seen = {opened.envelope_id for _, opened in pairs if opened is not None}
    while True:
        page = yield {"after": position, "limit": _AHEAD}
        for stored in page.items:
            opened = _open(vault, stored, seen)[1]
            if opened is None:
                continue
            if opened.begins_turn:
                return False
            if not vault.is_over(opened):
                return True
        if not page.has_later or not page.items:
            return False
        position = page.items[-1].position
