"""Reloads, second tabs and stops at random moments, on random processes.

Some conversations at once; in each, runs follow each other, and tabs come, go and reload
through a proxy that knows nothing of them. At the end of a run each tab must show what is
stored. Exits with 1 where one doesn't, or where a stop takes longer than a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from benchmarks.live.crashes import new_conversation
from benchmarks.live.servers import answers, proxy, site
from benchmarks.stress.places import KINDS, version

PACE = 0.02


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="runs, 4 tabs at each")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=4, help="at the same time")
    parser.add_argument("--words", type=int, default=100, help="of each answer")
    parser.add_argument("--database", choices=KINDS, default="postgres")
    parser.add_argument("--redis", action="store_true", help="a channel layer too")
    parser.add_argument(
        "--max-stop", type=float, default=1.0, help="seconds that a stop may take"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Reloads:
    """The rounds, and what they have found."""

    def __init__(self, port: int, options: argparse.Namespace) -> None:
        self.port = port
        self.options = options
        self.random = random.Random(options.seed)  # noqa: S311 - no secret
        self.left = options.rounds
        self.tabs = self.reloads = 0
        self.stops: list[float] = []
        self.problems: list[str] = []

    async def converse(self, name: str) -> None:
        """Take rounds in one conversation as long as there are any."""
        place = await new_conversation(name)
        while self.left > 0:
            self.left -= 1
            await self._round(f"{name}-{self.left}", place)

    async def _round(self, order: str, place: Any) -> None:
        from benchmarks.live.tabs import Tab, stored, texts

        lasts = self.options.words * PACE
        async with Tab(self.port, place) as asking:
            await asking.say(order, f"text {self.options.words} {order}")
            await asking.until("RUN_STARTED")
            moments = [self.random.uniform(0, lasts) for _ in range(3)]
            work = [self._visit(order, place, moment) for moment in moments]
            if self.random.random() < 1 / 3:
                work.append(self._stop(order, place, self.random.uniform(0, lasts)))
            visits = asyncio.gather(*work)
            await asking.to_end()
            shown = [list(asking.shown.values()), *await visits]
        wanted = texts(await stored(place))
        for told in shown:
            self.tabs += 1
            # A tab has all that was there when it came, or a part of it that fits.
            if told != wanted[-len(told) :] or not told:
                self._problem(f"{order}: a tab shows {told[-2:]}, not {wanted[-2:]}")

    async def _visit(self, order: str, place: Any, moment: float) -> list[str]:
        """Open a tab, reload it or lose its connection, and stay to the end."""
        from benchmarks.live.tabs import Tab

        await asyncio.sleep(moment)
        offset, shown = "", dict[str, str]()
        if self.random.random() < 0.7:
            self.reloads += 1
            async with Tab(self.port, place) as first:
                await first.sync()
                for _ in range(self.random.randint(1, 20)):
                    await first.until("TEXT_MESSAGE_CONTENT", "RUN_FINISHED")
                    if first.last:
                        break
                if self.random.random() < 0.5 and first.run_id == order:
                    offset, shown = first.frame_id, first.shown
        async with Tab(self.port, place) as tab:
            tab.goes_on(offset, shown)
            await tab.sync(offset)
            if not (offset and first.last):
                await tab.to_end()
            return list(tab.shown.values())

    async def _stop(self, order: str, place: Any, moment: float) -> list[str]:
        from benchmarks.live.tabs import Tab

        await asyncio.sleep(moment)
        async with Tab(self.port, place) as tab:
            await tab.sync()
            await tab.until("MESSAGES_SNAPSHOT")
            began = time.monotonic()
            await tab.send(type="abort", runId=order)
            await tab.to_end()
            self.stops.append(time.monotonic() - began)
            if self.stops[-1] > self.options.max_stop:
                self._problem(f"{order}: a stop took {self.stops[-1]:.1f} s")
            return list(tab.shown.values())

    def _problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"! {text}", flush=True)


async def _run(made: Any, options: argparse.Namespace) -> Reloads:
    servers = [made.start() for _ in range(options.processes)]
    for server in servers:
        await answers(*server)
    async with proxy([port for _, port in servers]) as port:
        found = Reloads(port, options)
        names = [f"c{number}" for number in range(options.conversations)]
        await asyncio.gather(*(found.converse(name) for name in names))
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the rounds and print what they have found."""
    options = arguments(argv)
    with site(options.database, redis=options.redis, pace=PACE) as made:
        layer = "with" if options.redis else "without"
        print(f"{version()}, {options.processes} processes, {layer} Redis", flush=True)
        found = asyncio.run(_run(made, options))
    print(
        f"{options.rounds} runs, {found.tabs} tabs, {found.reloads} reloads and gaps; "
        f"{len(found.stops)} stops, the longest {max(found.stops, default=0):.2f} s; "
        f"{len(found.problems)} problems"
    )
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
