"""Read what a client sends: run, abort and sync frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from agent_sessions.agui.content import clean

MAX_TEXT = 32_000
MAX_RUN_ID = 64
MAX_REASON = 2_000
# A message's id and a branch's name.
MAX_NAME = 255
OURS = "agentSessions"
SYNC_PREFIX = "sync:"


class FrameError(Exception):
    """A frame can't be accepted; `code` is RUN_ERROR's, `message` is for developers."""

    def __init__(self, code: str, message: str, *, run_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.run_id = run_id


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run to start, or to resume where `resume` has answers.

    `user_messages` are AG-UI messages, `resume` AG-UI resume entries, both checked and
    without unknown keys. `edit` is the id of the user's message that they replace, on a
    new branch; `regenerate` asks the last one again there, which `again` holds then.
    """

    thread_id: str
    run_id: str
    user_messages: list[dict[str, Any]] = field(default_factory=list)
    resume: list[dict[str, Any]] = field(default_factory=list)
    forwarded_props: dict[str, Any] = field(default_factory=dict)
    edit: str = ""
    regenerate: bool = False
    again: list[dict[str, Any]] = field(default_factory=list)

    @property
    def forks(self) -> bool:
        """Whether the run begins a branch."""
        return bool(self.edit) or self.regenerate

    @property
    def again_id(self) -> str:
        """The id of a message that is asked again, as this run tells it."""
        return f"{self.run_id}:again"


@dataclass(frozen=True, slots=True)
class SwitchRequest:
    """A branch to go on with."""

    thread_id: str
    run_id: str
    branch: str


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """A run to stop."""

    run_id: str
    mode: Literal["immediate", "after_turn"] = "immediate"


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """A wish to get what came after `offset`, or everything."""

    offset: str | None = None


AnyRequest = RunRequest | SwitchRequest | AbortRequest | SyncRequest


def parse_frame(text: str) -> AnyRequest:
    """Return a text frame's request. Raise FrameError if it is invalid."""
    try:
        frame = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        _refuse("The frame is not JSON.")
    return parse_request(frame)


def parse_request(frame: Any) -> AnyRequest:
    """Read a decoded frame."""
    if not isinstance(frame, dict):
        _refuse("The frame is not a JSON object.")
    kind = frame.get("type")
    if kind is None:
        return _run(frame)
    if kind == "abort":
        return _abort(frame)
    if kind == "sync":
        return _sync(frame)
    _refuse("The frame's type is none of: abort, sync; a run has no type.")


def user_items(request: RunRequest) -> list[dict[str, Any]]:
    """Turn a run's messages into input items of the SDK."""
    return request.again or [
        {"role": "user", "content": _input_content(message["content"])}
        for message in request.user_messages
    ]


def links_images(request: RunRequest) -> bool:
    """Return whether a run's messages hold addresses of images, for others to fetch."""
    return any(
        part["type"] == "image" and part["source"]["type"] == "url"
        for message in request.user_messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )


def _run(frame: dict[str, Any]) -> RunRequest | SwitchRequest:
    run_id = _run_id(frame)
    try:
        thread_id = frame.get("threadId")
        if not isinstance(thread_id, str) or not thread_id:
            _refuse("threadId must be a string.")
        resume = _resume(frame.get("resume"))
        props = frame.get("forwardedProps")
        props = props if isinstance(props, dict) else {}
        ours = _branching(props)
        if ours and resume:
            _refuse("A run that answers approvals can't leave its branch.")
        if "branch" in ours:
            return SwitchRequest(thread_id, run_id, **ours)
        said = not (resume or ours.get("regenerate"))
        return RunRequest(
            thread_id=thread_id,
            run_id=run_id,
            user_messages=_user_messages(frame.get("messages")) if said else [],
            resume=resume,
            forwarded_props=props,
            **ours,
        )
    except FrameError as error:
        raise FrameError(error.code, error.message, run_id=run_id) from None


def _branching(props: dict[str, Any]) -> dict[str, Any]:
    """Read what is asked of branches: to edit, to regenerate or to switch."""
    ours = props.get(OURS)
    if not isinstance(ours, dict | None):
        _refuse(f"{OURS} must be an object.")
    asked = {name: value for name, value in (ours or {}).items() if name in _OURS}
    if not asked:
        return {}
    [(name, value), *more] = asked.items()
    if name == "edit" and isinstance(value, dict):
        value = value.get("messageId")
    is_name = isinstance(value, str) and 0 < len(value) <= MAX_NAME
    if more or (value is not True if name == "regenerate" else not is_name):
        _refuse(
            f'{OURS} must be one of: {{"edit": {{"messageId": "…"}}}}, '
            '{"regenerate": true}, {"branch": "…"}.'
        )
    return {name: value if name == "regenerate" else clean(value)}


_OURS = frozenset({"edit", "regenerate", "branch"})


def _abort(frame: dict[str, Any]) -> AbortRequest:
    run_id, mode = _run_id(frame), frame.get("mode")
    if mode is None or mode == "immediate":
        return AbortRequest(run_id)
    if mode == "after_turn":
        return AbortRequest(run_id, "after_turn")
    _refuse("mode must be one of: immediate, after_turn.")


def _sync(frame: dict[str, Any]) -> SyncRequest:
    offset = frame.get("offset")
    if offset is not None and not isinstance(offset, str):
        _refuse("offset must be a string.")
    return SyncRequest(offset or None)


def _run_id(frame: dict[str, Any]) -> str:
    run_id = frame.get("runId")
    if (
        not isinstance(run_id, str)
        or not 0 < len(run_id) <= MAX_RUN_ID
        or not run_id.isprintable()
        or run_id.startswith(SYNC_PREFIX)
    ):
        _refuse(f"runId must be 1 to {MAX_RUN_ID} printable characters.")
    return run_id


def _user_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the user messages at the end; the session has all before them."""
    if not isinstance(messages, list):
        _refuse("messages must be a list.")
    trailing: list[dict[str, Any]] = []
    for message in reversed(messages):
        if not isinstance(message, dict) or message.get("role") != "user":
            break
        trailing.append(_user_message(message))
    if not trailing:
        _refuse("The last message must be the user's.")
    trailing.reverse()
    if sum(map(_text_length, trailing)) > MAX_TEXT:
        raise FrameError(
            "message_too_long", f"The text is longer than {MAX_TEXT} characters."
        )
    return trailing


def _user_message(message: dict[str, Any]) -> dict[str, Any]:
    message_id = message.get("id")
    if not isinstance(message_id, str) or not message_id:
        _refuse("A message's id must be a string.")
    content = message.get("content")
    if isinstance(content, str):
        content = clean(content)
        empty = not content.strip()
    elif isinstance(content, list):
        content = [_part(part) for part in content]
        empty = not any(
            part["type"] != "text" or part["text"].strip() for part in content
        )
    else:
        _refuse("A message's content must be a string or a list of parts.")
    if empty:
        _refuse("A message is empty.")
    return {"id": clean(message_id), "role": "user", "content": content}


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": clean(part["text"])}
    if kind == "image" and isinstance(part.get("source"), dict):
        return {"type": "image", "source": _image_source(part["source"])}
    _refuse("A part of a message must be a text or an image.")


def _image_source(source: dict[str, Any]) -> dict[str, Any]:
    value, mime_type = source.get("value"), source.get("mimeType")
    if not isinstance(value, str) or not isinstance(mime_type, str | None):
        _refuse("An image's source must have a value.")
    if source.get("type") == "url" and value.startswith(("https://", "http://")):
        made = {"type": "url", "value": clean(value)}
        return {**made, "mimeType": clean(mime_type)} if mime_type else made
    if source.get("type") == "data" and _is_image_type(mime_type) and value.isascii():
        return {"type": "data", "value": value, "mimeType": mime_type}
    _refuse("An image's source must be an http(s) URL or data of an image type.")


def _is_image_type(mime_type: str | None) -> bool:
    kind, _, name = (mime_type or "").partition("/")
    return kind == "image" and name.replace("+", "").replace("-", "").isalnum()


def _resume(entries: Any) -> list[dict[str, Any]]:
    if entries is None:
        return []
    if not isinstance(entries, list):
        _refuse("resume must be a list.")
    made = [_resume_entry(entry) for entry in entries]
    if len({entry["interruptId"] for entry in made}) != len(made):
        _refuse("resume answers an interrupt twice.")
    return made


def _resume_entry(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        _refuse("An entry of resume must be an object.")
    interrupt_id, status = entry.get("interruptId"), entry.get("status")
    if not isinstance(interrupt_id, str) or not interrupt_id:
        _refuse("interruptId must be a string.")
    if status == "cancelled":
        return {"interruptId": interrupt_id, "status": status}
    if status != "resolved":
        _refuse("An answer's status must be one of: resolved, cancelled.")
    payload = _payload(entry.get("payload"))
    return {"interruptId": interrupt_id, "status": status, "payload": payload}


def _payload(payload: Any) -> dict[str, Any]:
    """Read a decision; one that isn't plain is refused, since it can't be undone."""
    if not isinstance(payload, dict) or not isinstance(payload.get("approved"), bool):
        _refuse('An answer\'s payload must be {"approved": true or false}.')
    if payload.get("editedArgs") is not None:
        _refuse("editedArgs is not offered: approve or refuse the call as it is.")
    reason = payload.get("reason")
    if not isinstance(reason, str | None) or len(reason or "") > MAX_REASON:
        _refuse(f"reason must be a string of up to {MAX_REASON} characters.")
    always = payload.get("always")
    if not isinstance(always, bool | None):
        _refuse("always must be true or false.")
    made: dict[str, Any] = {"approved": payload["approved"]}
    if always:
        made["always"] = True
    if reason and reason.strip():
        made["reason"] = clean(reason)
    return made


def _input_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [_input_part(part) for part in content]


def _input_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "input_text", "text": part["text"]}
    source = part["source"]
    url = source["value"]
    if source["type"] == "data":
        url = f"data:{source['mimeType']};base64,{url}"
    return {"type": "input_image", "image_url": url, "detail": "auto"}


def _text_length(message: dict[str, Any]) -> int:
    content = message["content"]
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text", "")) for part in content)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse(message: str) -> NoReturn:
    raise FrameError("bad_request", message)
