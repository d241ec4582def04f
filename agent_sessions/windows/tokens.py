"""Count the tokens of one item: with tiktoken, or by its characters."""

from __future__ import annotations

import string
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from agent_sessions.exceptions import extra
from agent_sessions.items import Item

TokenCounter = Callable[[Item], int]

ENCODING = "o200k_base"
ITEM_TOKENS = 4
ATTACHMENT_TOKENS = 1000

# Images, recordings and files cost what their content costs, not what their link or
# base64 would as text.
_ATTACHMENTS = frozenset(
    {
        "input_image",
        "input_file",
        "input_audio",
        "computer_screenshot",
        "image_generation_call",
        "image",
    }
)
# What models aren't shown as text of an item or of a part of its content.
_NOT_TEXT = frozenset(
    {
        "id",
        "type",
        "role",
        "phase",
        "status",
        "call_id",
        "caller",
        "annotations",
        "logprobs",
        "encrypted_content",
        "provider_data",
        "acknowledged_safety_checks",
        "pending_safety_checks",
    }
)
# Of tools: models are shown the names in them too, whatever these are.
_SCHEMAS = frozenset({"input_schema", "parameters", "output_schema"})
_COSTLY = dict.fromkeys(map(ord, string.digits + string.punctuation))
# tiktoken's time grows with the square of a word's length: base64 would stop a server.
_CHUNK = 4000


class Encoder(Protocol):
    """What is used of a `tiktoken.Encoding`."""

    def encode_ordinary(self, text: str, /) -> Sequence[int]:
        """Return the tokens of a text, special ones as ordinary text."""


def count_tokens(item: Item) -> int:
    """Count with tiktoken where it is ready, else estimate.

    Ready means that this process has loaded the encoding, as `tiktoken_counter()` at
    startup does: tiktoken downloads it, and a callback must not wait for a download.
    """
    registry = cast("Any", sys.modules.get("tiktoken.registry"))
    encoding = registry.ENCODINGS.get(ENCODING) if registry else None
    return TiktokenCounter(encoding)(item) if encoding else estimate_tokens(item)


def estimate_tokens(item: Item) -> int:
    """Estimate from characters: a digit or punctuation mark is half a token.

    Every other byte of UTF-8 is a quarter of one. Beside its text an item costs 4, and
    an image or file 1,000.
    """
    texts, tokens = _measure(item)
    quarters = 0
    for text in texts:
        size = len(text.encode("utf-8", "surrogatepass"))
        costly = len(text) - len(text.translate(_COSTLY))
        quarters += size + costly
    return tokens - (-quarters // 4)


def tiktoken_counter(encoding: str | Encoder = ENCODING) -> TokenCounter:
    """Make a counter of a tiktoken encoding, or of its name.

    A name loads the encoding, which tiktoken downloads unless it has it: call this
    when the process starts.
    """
    if not isinstance(encoding, str):
        return TiktokenCounter(encoding)
    with extra("tiktoken", "tiktoken", needed_by="tiktoken_counter()"):
        import tiktoken
    return TiktokenCounter(tiktoken.get_encoding(encoding))


@dataclass(frozen=True, slots=True)
class TiktokenCounter:
    """See tiktoken_counter()."""

    encoding: Encoder

    def __call__(self, item: Item) -> int:
        """Return how many tokens an item's texts have."""
        texts, tokens = _measure(item)
        for text in texts:
            for start in range(0, len(text), _CHUNK):
                # Special tokens in a text are text; encode() would raise.
                chunk = self.encoding.encode_ordinary(text[start : start + _CHUNK])
                tokens += len(chunk)
        return tokens


def _measure(item: Item) -> tuple[list[str], int]:
    """Return an item's texts, and the tokens of all else."""
    parts = list(_parts(item))
    attached = sum(part is None for part in parts)
    texts = [part for part in parts if part]
    return texts, ITEM_TOKENS + ATTACHMENT_TOKENS * attached


def _parts(value: Any) -> Iterator[str | None]:
    """Return the texts within a value, and None for every attachment."""
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and kind in _ATTACHMENTS:
            yield None
            return
        for name, inner in value.items():
            if name in _SCHEMAS and isinstance(inner, dict):
                yield str(inner)
            elif name not in _NOT_TEXT:
                yield from _parts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _parts(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None:
        yield str(value)
