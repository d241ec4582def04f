"""Whatever comes in, from clients, models or storage: nothing breaks, all is legal."""

from __future__ import annotations

import json
from typing import Any

from agents import RawResponsesStreamEvent, RunItemStreamEvent
from agents.items import MessageOutputItem, ReasoningItem, ToolCallItem
from agents.testing import assistant_message, function_call
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent_sessions.agui import (
    EventMapper,
    FrameError,
    RunRequest,
    StreamOptions,
    merge,
    parse_frame,
    run_started,
    user_items,
)
from tests.agui.test_agui_frames import HELLO, frame, run
from tests.agui.test_agui_messages import messages
from tests.support.agui_runs import FULL
from tests.support.agui_samples import (
    NAMES,
    NONE,
    added,
    agent,
    completed,
    created,
    delta,
    done,
    reasoning,
    refusal,
)
from tests.support.agui_validator import SequenceChecker, validate_event

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


KEYS = st.sampled_from(
    [
        "type",
        "role",
        "id",
        "call_id",
        "name",
        "arguments",
        "content",
        "output",
        "error",
        "summary",
        "action",
        "outputs",
        "results",
        "text",
        "refusal",
        "image_url",
        "result",
    ]
)


WORDS = st.sampled_from(
    [
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        "mcp_call",
        "user",
        "web_search_call",
        "code_interpreter_call",
        "shell_call_output",
        "assistant",
        "system",
        "file_search_call",
        "input_image",
        "data:image/png;base64,AA",
        "c1",
    ]
)


PARTS = st.lists(st.dictionaries(KEYS, WORDS | JSON, max_size=4), max_size=2)
ITEMS = st.dictionaries(KEYS, WORDS | JSON | PARTS, max_size=6)
# Other suites may hold the processor meanwhile.
patient = settings(deadline=None)


@patient
@given(st.lists(ITEMS, max_size=4), st.sampled_from([FULL, NAMES, NONE]))
def test_no_stored_item_breaks_a_snapshot(
    items: list[dict[str, Any]], options: StreamOptions
) -> None:
    messages(*items, options=options)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


FIELDS = [
    "type",
    "threadId",
    "runId",
    "messages",
    "resume",
    "mode",
    "offset",
    "id",
    "role",
    "content",
    "source",
    "value",
    "mimeType",
    "text",
    "interruptId",
    "status",
    "payload",
    "approved",
    "reason",
    "forwardedProps",
]


VALUES = st.sampled_from(
    [
        "abort",
        "sync",
        "user",
        "text",
        "image",
        "url",
        "data",
        "image/png",
        "resolved",
        "cancelled",
        "https://x.test",
        "r-1",
        True,
        "\ud800",
    ]
)


NEAR = st.recursive(
    VALUES | ANYTHING,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6)
    ),
    max_leaves=25,
)


@patient
@given(st.text() | ANYTHING.map(json.dumps) | NEAR.map(json.dumps))
@example('{"a":{"a":')
@example("\x00")
def test_nothing_a_client_sends_breaks_the_parser(text: str) -> None:
    try:
        request = parse_frame(text)
    except FrameError:
        return
    if isinstance(request, RunRequest):
        started = run_started(request.thread_id, request.run_id, request.user_messages)
        json.dumps(user_items(request))
        if request.thread_id.isascii():
            validate_event(started)


@patient
@given(NEAR)
def test_a_run_of_any_content_is_refused_or_legal(content: Any) -> None:
    try:
        request = run(frame(messages=[{**HELLO, "content": content}]))
    except FrameError:
        return
    validate_event(run_started("t", "r-1", request.user_messages))
    json.dumps(user_items(request)).encode()


MESSAGE = assistant_message("Hello", item_id="msg_1")


CALL = function_call("add", "{}", call_id="c_1")


OUTPUT = [MESSAGE, CALL, reasoning("Hm"), refusal("No")]


RAW = [
    created(),
    completed(MESSAGE),
    *(
        make(item, index)
        for make in (added, done)
        for item in OUTPUT
        for index in (0, 1)
    ),
    *(delta(text, "msg_1", index) for text in ("", "x") for index in (0, 1)),
]


# Run items hold their agents weakly.
OWNER = agent()


def run_items() -> list[RunItemStreamEvent]:
    return [
        RunItemStreamEvent(
            item=MessageOutputItem(agent=OWNER, raw_item=MESSAGE),  # type: ignore[arg-type]
            name="message_output_created",
        ),
        RunItemStreamEvent(
            item=ReasoningItem(agent=OWNER, raw_item=reasoning("Hm")),
            name="reasoning_item_created",
        ),
        RunItemStreamEvent(
            item=ToolCallItem(agent=OWNER, raw_item=CALL.model_dump()),
            name="tool_called",
        ),
    ]


EVENTS = [*(RawResponsesStreamEvent(data=event) for event in RAW), *run_items()]


@patient
@given(
    st.lists(st.sampled_from(EVENTS)),
    st.sampled_from([FULL, StreamOptions(), StreamOptions(expose_tools="none")]),
    st.booleans(),
)
def test_whatever_a_model_streams_the_sequence_is_legal(
    events: list[Any], options: StreamOptions, failed: bool
) -> None:
    mapper = EventMapper(thread_id="t", run_id="r", options=options)
    checker = SequenceChecker()
    checker.feed(mapper.started())
    mapped = [made for event in events for made in mapper.map(event)]
    checker.feed_all(merge(mapped))
    checker.feed_all(mapper.error("internal", "x") if failed else mapper.finished())
    checker.finish()
