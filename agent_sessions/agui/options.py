"""What of a run its readers may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExposeTools = Literal["full", "names", "none"]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Say what leaves the server, in the stream and in snapshots alike.

    `expose_tools`: "full" shows arguments and outputs, "names" only that a tool was
    called and has finished, "none" nothing. An approval always shows its tool and its
    arguments, since a person has to decide on them.
    `expose_instructions` shows stored system and developer messages too.
    `result_limit` is in bytes of UTF-8, `media_limit` in characters of a data URL.
    """

    stream_reasoning: bool = False
    expose_tools: ExposeTools = "names"
    expose_instructions: bool = False
    result_limit: int = 16 * 1024
    media_limit: int = 256 * 1024
