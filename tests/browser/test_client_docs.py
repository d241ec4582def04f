"""The JavaScript of docs/client.md, against the demo: in a page, and in Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

import agent_sessions
from tests.browser.chat import Chat
from tests.browser.demo import Demo
from tests.support.documents import blocks, page

STATIC = Path(agent_sessions.__file__).parent / "static/agent_sessions"
CODE = blocks(page("docs/client.md"), "js")
PACKAGES = ("@ag-ui/client@1.0.0", "rxjs@7.8.1", "ws@8")

_TALK = """
const sessionId = await newConversation();
const events = [];
const done = new Promise((resolve) => {
  const socket = openSocket(sessionId, (event) => {
    events.push(event);
    if (event.type !== "RUN_FINISHED") return;
    if (event.runId.startsWith("sync:")) ask(socket, sessionId, "My name is Alice");
    else resolve();
  });
});
await done;
return { events, listed: await conversations(), sessionId };
"""

_NODE = """
import WebSocketOfNode from "ws";

const [origin, cookie, sessionId] = process.argv.slice(2);
globalThis.WebSocket = class extends WebSocketOfNode {
  constructor(url) { super(url, { headers: { Cookie: cookie }, origin }); }
};
const url = `${origin.replace("http", "ws")}/ws/agents/${sessionId}/`;
%s
const answered = structuredClone(agent.messages);
agent.addMessage({ id: "u-2", role: "user", content: "Tell me a story" });
await agent.runAgent({}, {
  onTextMessageContentEvent({ textMessageBuffer }) {
    if (textMessageBuffer.length > 40) agent.abortRun();
  },
});
agent.addMessage({ id: "u-3", role: "user", content: "x".repeat(40000) });
let refusal = "";
await agent.runAgent({}, { onRunErrorEvent({ event }) { refusal = event.code; } });
const again = new DjangoAgent({ url, threadId: sessionId });
await again.connectAgent();
console.log(JSON.stringify({ answered, last: agent.messages, refusal, again: again.messages }));
process.exit(0);
"""


def test_the_page_talks(chat: Chat) -> None:
    functions = "\n".join(CODE[1:5])
    assert "import" not in functions
    said: dict[str, Any] = chat.page.evaluate(f"async () => {{ {functions} {_TALK} }}")
    kinds = [event["type"] for event in said["events"]]
    assert kinds[:3] == ["RUN_STARTED", "MESSAGES_SNAPSHOT", "RUN_FINISHED"]
    text = "".join(e.get("delta", "") for e in said["events"])
    assert "Nice to meet you, Alice" in text
    assert said["listed"][0]["id"] == said["sessionId"]
    assert said["listed"][0].keys() == {"id", "title", "updatedAt", "state"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real client, from npm."""
    if shutil.which("npm") is None:
        _is_missing("npm is not here")
    directory = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *PACKAGES]
    done = subprocess.run(command, cwd=directory, capture_output=True, check=False)
    if done.returncode:
        _is_missing("npm can't install the client")
    subprocess.run(["npm", "pkg", "set", "type=module"], cwd=directory, check=True)
    return directory


def _is_missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def test_the_agent_works_with_the_client_of_ag_ui(
    demo: Demo, user: str, packages: Path
) -> None:
    shutil.copy(STATIC / "websocket-agent.js", packages)
    (packages / "talk.mjs").write_text(_NODE % CODE[5])
    session_id = demo.run("-c", _MAKE, user).strip()
    cookie = f"agent_sessions_demo={demo.cookies[user]}"
    done = subprocess.run(
        ["node", "talk.mjs", demo.url, cookie, session_id],
        cwd=packages,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    roles = [message["role"] for message in said["answered"]]
    assert roles == ["user", "assistant", "assistant", "tool", "assistant"]
    assert "29.90" in said["answered"][-1]["content"]
    story = [m for m in said["last"] if "Once upon" in str(m.get("content"))]
    assert len(story) == 1
    assert "gardener" not in story[0]["content"]
    assert said["refusal"] == "message_too_long"
    assert [m["role"] for m in said["again"]][:5] == roles


_MODULE = """
import WebSocketOfNode from "ws";
const [origin, cookie, sessionId] = process.argv.slice(2);
globalThis.WebSocket = class extends WebSocketOfNode {
  constructor(url) { super(url, { headers: { Cookie: cookie }, origin }); }
};
globalThis.CustomEvent ??= class extends Event {
  constructor(type, { detail }) { super(type); this.detail = detail; }
};
const url = `${origin.replace("http", "ws")}/ws/agents/${sessionId}/`;
const events = [], states = [];
const show = (event) => {
  events.push(event);
  if (event.type !== "RUN_FINISHED" || event.runId !== runId) return;
  client.close();
  console.log(JSON.stringify({ events, states }));
  process.exit(0);
};
const tell = (state) => states.push(state);
%s
"""


def test_the_module_needs_no_page(demo: Demo, user: str, packages: Path) -> None:
    source = (STATIC / "client.js").read_text()
    (packages / "client.js").write_text(source)
    code = CODE[0].replace("/static/agent_sessions/", "./")
    (packages / "module.mjs").write_text(_MODULE % code)
    session_id = demo.run("-c", _MAKE, user).strip()
    cookie = f"agent_sessions_demo={demo.cookies[user]}"
    done = subprocess.run(
        ["node", "module.mjs", demo.url, cookie, session_id],
        cwd=packages,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["states"] == ["connecting", "open"]
    assert said["events"][-1]["outcome"]["type"] == "interrupt"


_MAKE = """
import sys, django
django.setup()
from django.contrib.auth import get_user_model
from agent_sessions.runs.setup import create_conversation
user = get_user_model().objects.get(username=sys.argv[1])
print(create_conversation(user).session_id)
"""
