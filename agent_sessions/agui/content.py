"""Turn the contents of SDK items into the plain text and the parts of AG-UI."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent_sessions.characters import cut_whole

ExposeTools = Literal["full", "names", "none"]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What leaves the server, in the stream and in snapshots alike.

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


IMAGE_NOTE = "[image]"
FILE_NOTE = "[file]"
AUDIO_NOTE = "[audio]"


def as_dict(item: Any) -> dict[str, Any]:
    """Read an SDK item, which may be a model or a mapping, as a dict."""
    if isinstance(item, Mapping):
        return dict(item)
    dump = getattr(item, "model_dump", None)
    return dump(exclude_none=True, warnings=False) if callable(dump) else {}


def clean(text: str) -> str:
    """Replace lone surrogates, which are no text and break strict JSON readers."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # Escaped pairs that arrived apart join here; what stays alone is replaced.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def string(value: Any) -> str:
    """Return a string cleaned, and anything else as the empty string."""
    return clean(value) if isinstance(value, str) else ""


def cut(text: str, limit: int) -> tuple[str, bool]:
    """Cut a text to `limit` bytes of UTF-8, at a character and with a marker."""
    if len(text) * 4 <= limit:
        return text, False
    encoded = text.encode()
    if len(encoded) <= limit:
        return text, False
    marker = f"\n[cut: {limit} of {len(encoded)} bytes shown]"
    kept = encoded[: max(limit - len(marker), 0)].decode(errors="ignore")
    # A byte's place may lie within what people see as one character.
    return (cut_whole(text, len(kept)) if kept else "") + marker, True


def dumps(value: Any) -> str:
    """Write a value as JSON for a reader; what is no JSON is written as its text."""
    try:
        return clean(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        return ""


def message_text(item: Mapping[str, Any]) -> tuple[str, bool]:
    """Join an assistant message's parts; tell whether one of them is a refusal."""
    content = item.get("content")
    if isinstance(content, str):
        return clean(content), False
    texts: list[str] = []
    refusal = False
    for part in _mappings(content):
        if part.get("type") == "refusal":
            refusal = True
            texts.append(string(part.get("refusal")))
        else:
            texts.append(string(part.get("text") or part.get("transcript")))
    return "".join(texts), refusal


def plain_text(item: Mapping[str, Any]) -> str:
    """Join the texts of a system or developer message, a line each."""
    content = item.get("content")
    if isinstance(content, str):
        return clean(content)
    return "\n".join(_texts(content))


def reasoning_text(item: Mapping[str, Any]) -> str:
    """Return the reasoning's summary, or its text where the model wrote no summary."""
    texts = _texts(item.get("summary")) or _texts(item.get("content"))
    return "\n\n".join(texts)


def output_text(item: Mapping[str, Any]) -> str:
    """Return a tool's output as text; images and files as a note of their kind."""
    value = item.get("result") if item.get("type") == "program_output" else None
    value = item.get("output") if value is None else value
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return "\n".join(filter(None, map(_output_part, value)))
    if isinstance(value, Mapping):
        return _output_part(value)
    return "" if value is None else dumps(value)


def user_content(
    item: Mapping[str, Any], options: StreamOptions
) -> str | list[dict[str, Any]]:
    """Return a user message's content: a string, or parts where it holds more."""
    content = item.get("content")
    if isinstance(content, str):
        return clean(content)
    parts = [
        made
        for part in _mappings(content)
        if (made := _user_part(part, options)) is not None
    ]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _user_part(
    part: Mapping[str, Any], options: StreamOptions
) -> dict[str, Any] | None:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": string(part.get("text"))}
    if kind == "input_audio":
        return {"type": "text", "text": string(part.get("transcript")) or AUDIO_NOTE}
    if kind == "input_image":
        source = _source(part.get("image_url"), part.get("file_id"), options)
        return _media("image", source, IMAGE_NOTE)
    if kind == "input_file":
        name = string(part.get("filename")) or FILE_NOTE
        url = part.get("file_url") or part.get("file_data")
        return _media("document", _source(url, part.get("file_id"), options), name)
    return None


def _media(kind: str, source: dict[str, Any] | None, note: str) -> dict[str, Any]:
    return (
        {"type": kind, "source": source} if source else {"type": "text", "text": note}
    )


def _source(url: Any, file_id: Any, options: StreamOptions) -> dict[str, Any] | None:
    if isinstance(url, str) and url.startswith("data:"):
        header, comma, data = url[5:].partition(",")
        mime_type, _, encoding = header.partition(";")
        if comma and encoding.endswith("base64") and len(url) <= options.media_limit:
            return {
                "type": "data",
                "value": clean(data),
                "mimeType": clean(mime_type) or "application/octet-stream",
            }
        return None
    if isinstance(url, str) and url.startswith(("https://", "http://")):
        return {"type": "url", "value": clean(url)}
    if isinstance(file_id, str) and file_id:
        return {"type": "file", "value": clean(file_id), "provider": "openai"}
    return None


def _output_part(part: Any) -> str:
    if isinstance(part, str):
        return clean(part)
    if not isinstance(part, Mapping):
        return dumps(part)
    kind = part.get("type")
    if kind in ("input_image", "computer_screenshot", "image"):
        return IMAGE_NOTE
    if kind == "input_file":
        return string(part.get("filename")) or FILE_NOTE
    if "stdout" in part or "stderr" in part:
        return "\n".join(
            filter(None, (string(part.get("stdout")), string(part.get("stderr"))))
        )
    if isinstance(part.get("text"), str):
        return clean(part["text"])
    return dumps(part)


def _texts(parts: Any) -> list[str]:
    return [text for part in _mappings(parts) if (text := string(part.get("text")))]


def _mappings(parts: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(parts, list):
        return ()
    return (part for part in parts if isinstance(part, Mapping))


def capabilities(agent: Any, options: StreamOptions) -> dict[str, Any]:
    """Return AG-UI's AgentCapabilities of an agent that is served over HTTP."""
    reasons, hands_off = options.stream_reasoning, bool(agent.handoffs)
    return {
        "identity": {"name": clean(agent.name)},
        "transport": {"streaming": True, "resumable": True},
        "tools": {"supported": options.expose_tools != "none", "clientProvided": False},
        "state": {"snapshots": False, "deltas": False, "memory": True},
        "multiAgent": {"supported": hands_off, "handoffs": hands_off},
        "reasoning": {"supported": reasons, "streaming": reasons, "encrypted": False},
        "multimodal": {"input": {"image": True}},
        "humanInTheLoop": {
            "supported": True,
            "approvals": True,
            "interrupts": True,
            "feedback": True,
            "approveWithEdits": False,
        },
    }
