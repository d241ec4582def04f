"""What a transcript is made of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How an entry is to be shown."""

    MESSAGE = "message"
    SYSTEM = "system"
    REASONING = "reasoning"
    CALL = "call"
    OUTPUT = "output"
    APPROVAL = "approval"
    MARKER = "marker"
    ENCRYPTED = "encrypted"
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"


class PartKind(StrEnum):
    """How a part of an entry is to be shown."""

    TEXT = "text"
    REFUSAL = "refusal"
    CODE = "code"
    # An image in the item itself, in a format that is safe to show.
    IMAGE = "image"
    # An image that isn't shown: remote, SVG, too large, or known by its id only.
    IMAGE_LINK = "image_link"
    LINK = "link"
    FILE = "file"
    AUDIO = "audio"
    # Bytes that only the model's provider can read; `size` says how many.
    ENCRYPTED = "encrypted"
    # Parts that were left out; `size` says how many.
    MORE = "more"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an entry; everything in it is plain text.

    `text` may be cut: `size` is then the whole's length, else 0. `href` is an http
    or https address or empty, `src` a data: address of an image or empty.
    """

    kind: PartKind
    text: str = ""
    label: str = ""
    href: str = ""
    src: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One item, understood.

    `name` is what it is about: a tool, a server, an item's type. `status` is the
    item's own word; approvals have "asked", "approved" or "refused". `arguments` are
    what a call was given, `parts` what was said or came back.
    """

    kind: Kind
    type: str = ""
    role: str = ""
    name: str = ""
    server: str = ""
    id: str = ""
    call_id: str = ""
    status: str = ""
    arguments: tuple[Part, ...] = ()
    parts: tuple[Part, ...] = ()
    # Whom an output hands over to, if it is a handoff's.
    handoff: str = ""

    @property
    def preview(self) -> str:
        """The beginning of what the entry says, on one line."""
        text = next((part.text for part in self.parts if part.text.strip()), "")
        line = " ".join(text[: PREVIEW_LENGTH * 2].split())
        return line if len(line) <= PREVIEW_LENGTH else line[:PREVIEW_LENGTH] + "…"


PREVIEW_LENGTH = 120
