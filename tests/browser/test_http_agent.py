"""Server-sent events of a real server, and the client of AG-UI that reads them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.browser.demo import Demo
from tests.browser.test_client_docs import _MAKE, packages  # noqa: F401
from tests.support.agui_validator import SequenceChecker
from tests.support.chat import text_of
from tests.support.documents import blocks, page

CSRF = "a" * 32
[CODE] = blocks(page("docs/server-sent-events.md"), "js")
_NODE = """
const [origin, cookie, sessionId, csrfToken] = process.argv.slice(2);
const plain = globalThis.fetch;
globalThis.fetch = (url, init) =>
  plain(url, { ...init, headers: { ...init.headers, Cookie: cookie } });
%s
const answered = structuredClone(agent.messages);
agent.addMessage({ id: "u-2", role: "user", content: "Tell me a story" });
let asked = false;
const stopped = {};
await agent.runAgent({ runId: "story/1" }, {
  async onTextMessageContentEvent({ textMessageBuffer }) {
    if (asked || textMessageBuffer.length < 40) return;
    asked = true;
    stopped.status = (await stop(encodeURIComponent("story/1"))).status;
  },
  onRunFinishedEvent({ event }) { stopped.outcome = event.outcome.type; },
});
agent.addMessage({ id: "u-3", role: "user", content: "x".repeat(40000) });
let refusal = "";
await agent.runAgent({}, { onRunErrorEvent({ event }) { refusal = event.code; } });
const capabilities = await (await fetch(`${address}/capabilities/`, {})).json();
console.log(JSON.stringify({
  answered, stopped, refusal, last: agent.messages, capabilities,
}));
process.exit(0);
"""


def cookies(demo: Demo, user: str) -> str:
    return f"agent_sessions_demo={demo.cookies[user]}; agent_sessions_demo_csrf={CSRF}"


def test_the_agent_of_ag_ui_works_as_it_is(
    demo: Demo,
    user: str,
    packages: Path,  # noqa: F811
) -> None:
    (packages / "http.mjs").write_text(_NODE % CODE)
    session_id = demo.run("-c", _MAKE, user).strip()
    done = subprocess.run(
        ["node", "http.mjs", demo.url, cookies(demo, user), session_id, CSRF],
        cwd=packages,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    roles = [message["role"] for message in said["answered"]]
    assert (roles[0], roles[-1], "tool" in roles) == ("user", "assistant", True), roles
    assert "29.90" in said["answered"][-1]["content"]
    assert said["stopped"] == {"status": 202, "outcome": "cancelled"}
    story = [m for m in said["last"] if "Once upon" in str(m.get("content"))]
    assert len(story) == 1
    assert "gardener" not in story[0]["content"]
    assert said["refusal"] == "message_too_long"
    assert said["capabilities"]["identity"] == {"name": "Support"}


def ask(demo: Demo, user: str, path: str, body: Any = None) -> Any:
    request = Request(
        f"{demo.url}/agents/sessions/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Cookie": cookies(demo, user),
            "X-CSRFToken": CSRF,
            "Content-Type": "application/json",
        },
    )
    return urlopen(request, timeout=30)


def told(response: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ids and events as they come."""
    event_id = ""
    for line in response:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            event_id = value
        elif name == "data":
            yield event_id, json.loads(value)


def test_a_break_in_a_stream_loses_nothing(demo: Demo, user: str) -> None:
    session_id = demo.run("-c", _MAKE, user).strip()
    message = {"id": "u-1", "role": "user", "content": "Tell me a story"}
    body = {"threadId": session_id, "runId": "r-1", "messages": [message]}
    checker, ids = SequenceChecker(), []
    with ask(demo, user, f"{session_id}/runs/", body) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        for event_id, event in told(response):
            checker.feed(event)
            ids.append(event_id)
            if event["type"] == "TEXT_MESSAGE_CONTENT":
                break
    with ask(demo, user, f"{session_id}/events/?offset={ids[-1]}") as response:
        for event_id, event in told(response):
            checker.feed(event)
            ids.append(event_id)
    checker.finish()
    assert ids == [f"r-1:{number}" for number in range(1, len(ids) + 1)]
    assert checker.events[-1]["outcome"] == {"type": "success"}
    with ask(demo, user, f"{session_id}/messages/") as response:
        stored = json.loads(response.read())["messages"]
    assert stored[-1]["content"] == text_of(checker.events)


def test_another_process_tells_the_run(demo: Demo, user: str) -> None:
    other = Demo(demo.folder)
    other.cookies = demo.cookies
    other.start()
    try:
        session_id = demo.run("-c", _MAKE, user).strip()
        message = {"id": "u-1", "role": "user", "content": "Tell me a story"}
        body = {"threadId": session_id, "runId": "r-1", "messages": [message]}
        with ask(demo, user, f"{session_id}/runs/", body) as response:
            first = told(response)
            events = [next(first)]
            # While it goes on, if this machine is fast enough.
            with ask(other, user, f"{session_id}/events/?offset=r-1:0") as joined:
                elsewhere = list(told(joined))
            events += first
        with ask(other, user, f"{session_id}/events/?offset=r-1:5") as response:
            rest = list(told(response))
    finally:
        other.end()
    assert elsewhere == events
    assert rest == events[5:]
