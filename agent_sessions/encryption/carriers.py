"""How envelopes lie in a store: as they are, or inside what the store takes."""

from __future__ import annotations

import json
from typing import Any

from agent_sessions.encryption.envelopes import is_envelope
from agent_sessions.items import Item, decode

# Not the user: a user's message would open a turn and give the session its title.
_ROLE = "developer"
_PART = "input_text"
# An envelope's first mark, without which a text needn't be read as JSON.
_MARK = '{"__enc__":1,'


class Carrier:
    """Envelopes as they are, for a store that takes any item."""

    def load(self, envelope: Item) -> Item:
        """Return what is stored of an envelope."""
        return envelope

    def unload(self, stored: Any) -> Any:
        """Return the envelope in what was stored; what carries none stays as it is."""
        return stored

    def again(self, stored: Item) -> Item:
        """Make what a store gave back fit to be stored there again."""
        return stored


class MessageCarrier(Carrier):
    """Envelopes as the text of messages, for a store of items of the API's types.

    What is found is the envelope, no more: whether it opens says whose it is.
    """

    def load(self, envelope: Item) -> Item:
        content = [{"type": _PART, "text": _write(envelope)}]
        return {"type": "message", "role": _ROLE, "content": content}

    def unload(self, stored: Any) -> Any:
        match stored:
            case {
                "type": "message",
                "role": role,
                "content": [{"type": part, "text": str(text)}],
            } if (role, part) == (_ROLE, _PART) and text.startswith(_MARK):
                envelope = decode(text)
                # To the letter: there is one way to write an envelope.
                if is_envelope(envelope) and _write(envelope) == text:
                    return envelope
        return stored

    def again(self, stored: Item) -> Item:
        envelope = self.unload(stored)
        if is_envelope(envelope):
            return self.load(envelope)
        # The store gives each item an id of its own.
        return {name: value for name, value in stored.items() if name != "id"}


def _write(envelope: Any) -> str:
    return json.dumps(envelope, separators=(",", ":"))


AS_IS = Carrier()
IN_MESSAGES = MessageCarrier()


def carrier_for(store: Any) -> Carrier:
    """Choose how envelopes lie in a store, by its `keeps_exactly`."""
    return AS_IS if getattr(store, "keeps_exactly", True) else IN_MESSAGES
