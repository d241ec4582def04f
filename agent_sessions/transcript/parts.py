"""The entries of a transcript, and the parts that the contents of items become."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agent_sessions.characters import cut_whole
from agent_sessions.items import clean_text


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
        line = " ".join(text.lstrip()[: PREVIEW_LENGTH * 2].split())
        if len(line) <= PREVIEW_LENGTH:
            return line
        return cut_whole(line, PREVIEW_LENGTH) + "…"


PREVIEW_LENGTH = 120
PART_LENGTH = 10_000
IMAGE_BYTES = 1_000_000
# More parts of one item are counted, not shown.
PARTS = 50
# No SVG: it may hold scripts.
_IMAGE = re.compile(
    r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+", re.ASCII
)
_ADDRESS = re.compile(r"https?://[^\s\x00-\x1f\x7f]+", re.IGNORECASE)

Item = Mapping[str, Any]

_length: ContextVar[int] = ContextVar("part_length", default=PART_LENGTH)


@contextmanager
def parts_up_to(length: int) -> Iterator[None]:
    """Cut parts at another length than a page's, within this context."""
    token = _length.set(length)
    try:
        yield
    finally:
        _length.reset(token)


def string(value: Any) -> str:
    """Return a string as any page can show it, and nothing for other values."""
    return clean_text(value) if isinstance(value, str) else ""


def listed(value: Any) -> list[Any]:
    """Return a list, and an empty one for other values."""
    return value if isinstance(value, list) else []


def objects(value: Any) -> Iterator[Item]:
    """Return the JSON objects of a list."""
    return (entry for entry in listed(value) if isinstance(entry, Mapping))


def text_part(value: str, kind: PartKind = PartKind.TEXT, label: str = "") -> Part:
    """Make a part of a text, cut to what a page can carry."""
    length = _length.get()
    if len(value) <= length:
        return Part(kind, clean_text(value), label)
    return Part(kind, clean_text(cut_whole(value, length)), label, size=len(value))


def pretty(value: Any) -> str:
    """Write a value as JSON in lines; stops soon after a part's length."""
    chunks: list[str] = []
    room = _length.get()
    # In steps: written at once, a deep value would end in a RecursionError.
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, default=repr)
    try:
        for chunk in encoder.iterencode(value):
            chunks.append(chunk[: room + 1])
            room -= len(chunk)
            if room < 0:
                break
    except RecursionError:
        chunks.append("…")
    return "".join(chunks)


def json_part(value: Any, label: str = "") -> Part:
    """Make a part of any value: text as it is, JSON in lines."""
    if isinstance(value, str):
        return text_part(_indented(value), PartKind.CODE, label)
    return text_part(pretty(value), PartKind.CODE, label)


def maybe_json(value: Any, label: str = "") -> tuple[Part, ...]:
    """Make a part of a value, unless it is absent or empty."""
    return () if value in (None, "", [], {}) else (json_part(value, label),)


def texts(value: Any, kind: PartKind = PartKind.TEXT) -> tuple[Part, ...]:
    """Make a part of a text, unless it is absent or empty."""
    return (text_part(value, kind),) if isinstance(value, str) and value else ()


def content_parts(content: Any) -> tuple[Part, ...]:
    """Read a message's content or a tool's output: text, or a list of parts."""
    if isinstance(content, str):
        return texts(content)
    if isinstance(content, Mapping):
        return tuple(_read(content))
    if not isinstance(content, list):
        return maybe_json(content)
    parts: list[Part] = []
    for entry in content[:PARTS]:
        if isinstance(entry, Mapping):
            parts += _read(entry)
        else:
            parts.append(json_part(entry))
    if len(content) > PARTS:
        parts.append(Part(PartKind.MORE, size=len(content) - PARTS))
    return tuple(parts)


def _read(entry: Item) -> Iterator[Part]:
    kind = string(entry.get("type"))
    if kind in {"input_text", "output_text", "text", "summary_text", "reasoning_text"}:
        yield text_part(_text(entry.get("text")))
        yield from _annotations(entry.get("annotations"))
    elif kind == "refusal":
        yield text_part(_text(entry.get("refusal")), PartKind.REFUSAL)
    elif kind in {"input_image", "computer_screenshot", "image"}:
        yield image_part(entry.get("image_url") or entry.get("url"), entry)
    elif kind == "input_file":
        yield _file(entry)
    elif kind in {"input_audio", "output_audio"}:
        # Within an object of its own, or as the Realtime API has it.
        audio = entry.get("input_audio")
        audio = audio if isinstance(audio, Mapping) else {"data": entry.get("audio")}
        size = _decoded_size(string(audio.get("data")))
        yield Part(PartKind.AUDIO, label=string(audio.get("format")), size=size)
        yield from texts(entry.get("transcript"))
    else:
        yield json_part(dict(entry), label=kind)


def image_part(url: Any, entry: Item) -> Part:
    """Show an image that is part of the item; name any other, and load nothing."""
    address = string(url)
    label = string(entry.get("file_id")) or string(entry.get("filename"))
    if not address.startswith("data:"):
        return Part(PartKind.IMAGE_LINK, address, label, href=href(address))
    size = _decoded_size(address.partition(",")[2])
    if size <= IMAGE_BYTES and _IMAGE.fullmatch(address):
        return Part(PartKind.IMAGE, label=label, src=address, size=size)
    form = address[5:].partition(",")[0].partition(";")[0][:50]
    return Part(PartKind.IMAGE_LINK, form, label, size=size)


def href(address: str) -> str:
    """Return an address that a link may lead to, else nothing."""
    return address if _ADDRESS.fullmatch(address) else ""


def link_part(address: Any, label: Any = "") -> Part:
    """Make a part of an address; only http and https become links."""
    text = string(address)
    return Part(PartKind.LINK, text, string(label), href=href(text))


def encrypted_parts(value: Any) -> tuple[Part, ...]:
    """Describe encrypted content by its size alone."""
    size = len(value) if isinstance(value, str) else 0
    return (Part(PartKind.ENCRYPTED, size=size),) if size else ()


def _annotations(value: Any) -> Iterator[Part]:
    for note in objects(value):
        kind = string(note.get("type"))
        if kind == "url_citation":
            yield link_part(note.get("url"), note.get("title"))
        elif kind in {"file_citation", "container_file_citation", "file_path"}:
            yield Part(
                PartKind.FILE,
                string(note.get("file_id")),
                label=string(note.get("filename")),
            )


def _file(entry: Item) -> Part:
    address = string(entry.get("file_url"))
    data = string(entry.get("file_data"))
    return Part(
        PartKind.FILE,
        string(entry.get("file_id")) or address,
        label=string(entry.get("filename")),
        href=href(address),
        size=_decoded_size(data.rpartition(",")[2]),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else pretty(value)


def _decoded_size(base64: str) -> int:
    return len(base64) * 3 // 4


def _indented(value: str) -> str:
    """Write JSON text in lines; any other text stays as it is."""
    if len(value) > _length.get() or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return pretty(json.loads(value))
    except (ValueError, RecursionError):
        return value
