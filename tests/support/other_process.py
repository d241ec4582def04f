"""A second server process, for tests: one tab of the same user, driven by lines.

`python -m tests.support.other_process SESSION_ID USER_PK [gated]` reads commands from standard input,
`sync`, `say RUN_ID TEXT`, `send FRAME`, `approve RUN_ID CALL_ID` and `abort RUN_ID`, and prints every
frame as a line, and the code with which the server closes. With `gated` its model waits
in the middle of an answer, for ever. With `dies` the process is killed once a run has
begun, before that has stored anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import django


async def main(session_id: str, user_pk: str, kind: str = "") -> None:
    from agents import Agent
    from agents.testing import ScriptedModel, assistant_message
    from django.contrib.auth import get_user_model

    from agent_sessions.consumers import AgentConsumer
    from tests.support.approvals import lookup, refund
    from tests.support.chat import Socket
    from tests.support.gated import gated

    user = await get_user_model()._default_manager.aget(pk=user_pk)
    model = ScriptedModel([[assistant_message("done")]])
    agent: Agent[Any] = Agent(name="cashier", model=model, tools=[refund, lookup])
    if kind == "gated":
        agent, _ = gated("one two three four")

    class Consumer(AgentConsumer):
        def get_session(self, session: Any) -> Any:
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            return session

    async with Socket(session_id, user, agent, consumer=Consumer) as tab:
        reading = asyncio.create_task(_obey(tab))
        writing = asyncio.create_task(_print(tab))
        await reading
        writing.cancel()


async def _obey(tab: Any) -> None:
    from tests.support.agui_validator import validate_event

    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *words = line.split()
        if command == "sync":
            if words:
                # What follows a number begins in the middle.
                tab.checker.feed = validate_event
            await tab.sync(*words)
        elif command == "say":
            await tab.say(words[0], " ".join(words[1:]))
        elif command == "send":
            await tab.send(line.partition(" ")[2])
        elif command == "approve":
            payload = {"approved": True}
            entry = {"interruptId": words[1], "status": "resolved", "payload": payload}
            await tab.answer(words[0], entry)
        else:
            await tab.send({"type": "abort", "runId": words[0]})


async def _print(tab: Any) -> None:
    from tests.support.chat import Closed

    while True:
        try:
            frame = await tab.frame(within=60)
        except Closed as closed:
            frame = {"closed": closed.code}
        sys.stdout.write(json.dumps(frame) + "\n")
        sys.stdout.flush()
        if "closed" in frame:
            return


if __name__ == "__main__":
    django.setup()
    asyncio.run(main(*sys.argv[1:]))
