"""`kill -9` of the process that has a run, at each stage; the next turn works elsewhere.

Exits with 1 where the model was sent a call without an output, a message is there twice,
a tool ran twice, words that were shown are gone, or the session wasn't usable again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

from benchmarks.live.servers import Site, answers, site
from benchmarks.stress.places import KINDS, version

STAGES = ("before", "text", "tool", "between", "approving", "resuming")
# What a tab of the process was told in the last second may not be in rows yet.
WORDS, PACE, MOST_UNWRITTEN = 60, 0.02, 50


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="of each stage")
    parser.add_argument("--database", choices=KINDS, default="postgres")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--redis", action="store_true", help="a channel layer too")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    return parser.parse_args(argv)


class Matrix:
    """The rounds, and what they have found."""

    def __init__(self, made: Site, options: argparse.Namespace) -> None:
        self.site = made
        self.options = options
        self.random = random.Random(options.seed)  # noqa: S311 - no secret
        self.problems: list[str] = []
        # Of each stage: seconds until it was usable, words that were lost.
        self.waits: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.lost: Counter[str] = Counter()

    async def run(self) -> None:
        """Kill a server in each round, and ask one that stays."""
        stays, port = self.site.start()
        await answers(stays, port)
        victim = self.site.start()
        for number in range(self.options.rounds):
            for stage in self.options.stages:
                await answers(*victim)
                following = self.site.start()
                await self._round(stage, f"{stage}{number}", victim, port)
                victim = following

    async def _round(
        self, stage: str, order: str, victim: tuple[Any, int], port: int
    ) -> None:
        from benchmarks.live.tabs import Tab, stored

        place = await new_conversation(order)
        shown = await self._kill(stage, order, victim, place)
        began = time.monotonic()
        async with Tab(port, place) as tab:
            # What waits for an approval is answered again; it may be open still.
            await tab.sync()
            end = await tab.to_end()
            asked = end.get("outcome", {}).get("interrupts")
            if asked:
                await tab.approve(f"again-{order}", asked)
                await tab.to_end()
            await tab.say(f"next-{order}", f"text 3 {order}-next")
            end = await tab.to_end()
            self.waits[stage].append(time.monotonic() - began)
        if end.get("outcome") != {"type": "success"}:
            self._problem(order, f"the next turn ended with {end}")
        self._compare(stage, order, shown, await stored(place))

    async def _kill(
        self, stage: str, order: str, victim: tuple[Any, int], place: Any
    ) -> str:
        """Bring a run to a stage and kill its process; return what was shown last."""
        from benchmarks.live.tabs import Tab

        kinds = {"tool": "tool", "between": "tool"}
        kind = "approve" if stage in {"approving", "resuming"} else kinds.get(stage)
        process, port = victim
        async with Tab(port, place) as tab:
            await tab.say(f"run-{order}", f"{kind or 'text'} {WORDS} {order}")
            if stage == "before":
                await tab.until("RUN_STARTED")
                await asyncio.sleep(self.random.uniform(0.1, 0.25))
            elif stage == "text":
                for _ in range(self.random.randint(1, 15)):
                    await tab.until("TEXT_MESSAGE_CONTENT")
            elif stage == "tool":
                await tab.until("TOOL_CALL_END")
                await asyncio.sleep(0.05 + self.random.uniform(0, 0.15))
            elif stage == "between":
                await tab.until("TOOL_CALL_RESULT")
            else:
                asked = (await tab.to_end())["outcome"]["interrupts"]
                await tab.approve(f"resume-{order}", asked)
                if stage == "resuming":
                    await tab.until("RUN_STARTED")
                    await asyncio.sleep(self.random.uniform(0.05, 0.25))
                else:
                    await asyncio.sleep(self.random.uniform(0, 0.05))
            process.kill()
            process.wait()
            said = list(tab.shown.values())
            return said[-1] if stage == "text" else ""

    def _compare(self, stage: str, order: str, shown: str, items: list[Any]) -> None:
        from benchmarks.live.tabs import texts

        said = texts(items)
        if twice := [text for text, n in Counter(said).items() if n > 1]:
            self._problem(order, f"{len(twice)} messages are there twice")
        if not any(f"{WORDS} {order}" in text for text in said):
            self._problem(order, "the message of the killed run is gone")
        if shown:
            kept = next((t for t in said if t and shown.startswith(t.rstrip())), "")
            kept = kept or next((t for t in said if t.startswith(shown)), "")
            missing = len(shown.split()) - len(kept.split())
            self.lost[stage] = max(self.lost[stage], missing)
            if missing > MOST_UNWRITTEN:
                self._problem(order, f"{missing} words that were shown are gone")
        notes = [json.loads(line) for line in self.site.log.read_text().splitlines()]
        ran = Counter(
            each["tool"]
            for each in notes
            if each["kind"] == "began" and each["order"] == order
        )
        if ran["refund"] > 1:
            self._problem(order, f"the refund ran {ran['refund']} times")
        for sent in (each["items"] for each in notes if each["kind"] == "asked"):
            calls = {i["call_id"] for i in sent if i.get("type") == "function_call"}
            outputs = {
                i["call_id"] for i in sent if i.get("type") == "function_call_output"
            }
            if calls - outputs:
                self._problem(order, "the model was sent a call without an output")
        self.site.log.write_text("")

    def _problem(self, order: str, text: str) -> None:
        self.problems.append(f"{order}: {text}")
        print(f"! {order}: {text}", flush=True)


async def new_conversation(name: str) -> tuple[Any, str]:
    """Make a user with a conversation."""
    from asgiref.sync import sync_to_async
    from django.contrib.auth import get_user_model

    from agent_sessions.runs.setup import create_conversation

    def make() -> tuple[Any, str]:
        user = get_user_model()._default_manager.create(username=name)
        return user, create_conversation(user).session_id

    return await sync_to_async(make)()


def main(argv: list[str] | None = None) -> int:
    """Run the matrix and print what it has found."""
    options = arguments(argv)
    with site(options.database, redis=options.redis, pace=PACE) as made:
        print(version(), flush=True)
        matrix = Matrix(made, options)
        asyncio.run(matrix.run())
    for stage in options.stages:
        waits = matrix.waits[stage]
        print(
            f"{stage:>9}: {len(waits)} kills; the next answer after "
            f"{max(waits):.1f} s at most; {matrix.lost[stage]} words lost at most"
        )
    print(f"{len(matrix.problems)} problems")
    return int(bool(matrix.problems))


if __name__ == "__main__":
    sys.exit(main())
