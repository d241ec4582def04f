"""Pages of a history as its readers see them, opened as far as the keys go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agent_sessions.backends.base import Page
from agent_sessions.encryption import Vault, is_envelope
from agent_sessions.encryption.vault import Opened
from agent_sessions.exceptions import EncryptionError
from agent_sessions.items import StoredItem, encode_batch

# Items that are looked at to find a turn's end.
_AHEAD = 50


def open_page(vault: Vault, page: Page, *, later: Callable[[int, int], Page]) -> Page:
    """Open a page's items.

    What needs an unknown key stays in its envelope, for readers to tell; what doesn't
    open with its own key has no item. `later(position, limit)` reads what follows,
    and is asked only where turns have a lifetime.
    """
    pairs = [_open(vault, stored) for stored in page.items]
    if vault.lifetime is not None:
        kept = _unexpired(vault, pairs, page, later)
        if len(kept) < len(pairs):
            return Page([stored for stored, _ in kept], False, page.has_later)
    return Page([stored for stored, _ in pairs], page.has_earlier, page.has_later)


def is_closed(page: Page) -> bool:
    """Tell whether items of an opened page are still in their envelopes."""
    return any(is_envelope(stored.item) for stored in page.items)


def assert_open(page: Page) -> None:
    """Pass where no item of an opened page is still in its envelope.

    Raises EncryptionError.
    """
    for stored in page.items:
        if stored.item is not None and is_envelope(stored.item):
            raise EncryptionError(
                "The history has items under the encryption key "
                f"{stored.item['kid']!r}, which is not configured here."
            )


def _open(vault: Vault, stored: StoredItem) -> tuple[StoredItem, Opened | None]:
    try:
        opened = vault.open(stored.item)
    except EncryptionError:
        return replace(stored, item=vault.carrier.unload(stored.item)), None
    if opened is None:
        return replace(stored, item=None), None
    text = encode_batch([opened.item]).rows[0].data
    return replace(stored, item=opened.item, raw=text), opened


def _unexpired(
    vault: Vault,
    pairs: list[tuple[StoredItem, Opened | None]],
    page: Page,
    later: Callable[[int, int], Page],
) -> list[tuple[StoredItem, Opened | None]]:
    """Leave out whole turns, as Vault.unexpired() does: by their newest item."""
    ends_turn = not page.has_later or not _goes_on(vault, pairs, later)
    for index in range(len(pairs) - 1, -1, -1):
        opened = pairs[index][1]
        if opened is None:
            continue
        if ends_turn and vault.is_over(opened):
            return pairs[index + 1 :]
        ends_turn = opened.begins_turn
    return pairs


def _goes_on(
    vault: Vault,
    pairs: list[tuple[StoredItem, Opened | None]],
    later: Callable[[int, int], Page],
) -> bool:
    """Tell whether the last turn of a page has later items whose time isn't over."""
    position = pairs[-1][0].position if pairs else 0
    while True:
        page = later(position, _AHEAD)
        for stored in page.items:
            opened = _open(vault, stored)[1]
            if opened is None:
                continue
            if opened.begins_turn:
                return False
            if not vault.is_over(opened):
                return True
        if not page.has_later or not page.items:
            return False
        position = page.items[-1].position
