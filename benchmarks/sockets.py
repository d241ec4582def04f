"""How long a word takes to a socket: AgentConsumer beside a bare consumer with the SDK.

One process serves the sockets, several to a conversation, and a run streams on each
conversation. Each word is the time at which the model said it, so what a socket reads is
its delay; nothing may be lost. A bare consumer sends each word by itself and keeps nothing.
Printed are also the time to the first word in a session with many items, the processor's
time of each word, also without an event log, and the memory after each round (on Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

from benchmarks.processor import used

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
HOST = "127.0.0.1"
WORD = 18  # characters: a time in microseconds and a space
WAYS = ("bare", "ours", "unlogged")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=100, help="conversations, one run each"
    )
    parser.add_argument("--sockets", type=int, default=500, help="of all conversations")
    parser.add_argument("--words", type=int, default=200, help="of one answer")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds between words")
    parser.add_argument(
        "--ramp", type=float, default=10, help="seconds over which the runs start"
    )
    parser.add_argument("--items", type=int, default=5000, help="of the long session")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of both consumers, in turns"
    )
    parser.add_argument(
        "--database", choices=("sqlite", "postgresql"), default="sqlite"
    )
    parser.add_argument(
        "--max-p99", type=float, help="exit with 1 if ours is over it, in ms"
    )
    # How this module calls itself for the server.
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def configure(place: dict[str, Any]) -> None:
    """Set Django up on a database."""
    import django
    from django.conf import settings

    settings.configure(
        ALLOWED_HOSTS=[HOST],
        DATABASES={"default": place},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[
            *(f"django.contrib.{app}" for app in ("auth", "contenttypes", "sessions")),
            *("channels", "agent_sessions"),
        ],
        SECRET_KEY="only for benchmarks",  # noqa: S106
        USE_TZ=True,
    )
    django.setup()


@contextmanager
def database(kind: str) -> Iterator[dict[str, Any]]:
    """Return the settings of an empty database."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="agent-sessions-bench-") as name:
            pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
            options = {"init_command": pragmas, "transaction_mode": "IMMEDIATE"}
            file = str(Path(name) / "bench.sqlite3")
            engine = "django.db.backends.sqlite3"
            yield {"ENGINE": engine, "NAME": file, "OPTIONS": options}
        return
    from tests.servers.postgres import postgres

    with postgres() as server:
        engine = "django.db.backends.postgresql"
        where = {"HOST": server.host, "PORT": str(server.port), "USER": "postgres"}
        yield {"ENGINE": engine, "NAME": "postgres", **where}


def fill(runs: int, items: int) -> list[tuple[int, str]]:
    """Make a user with a conversation for each run, and one of the long session."""
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    from agent_sessions import get_session
    from agent_sessions.runs.setup import create_conversation

    call_command("migrate", verbosity=0)
    made = []
    for number in range(runs + 1):
        user = get_user_model().objects.create(username=f"user{number}")
        made.append((user.pk, create_conversation(user).session_id))
    pk, session_id = made[-1]
    session = get_session(session_id, user=get_user_model().objects.get(pk=pk))
    text = "x" * 400
    said = [{"role": role, "content": text} for role in ("user", "assistant")]
    session.sync.add_items(said * (items // 2))  # type: ignore[arg-type]
    return made


# -- the server ------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> None:
    """Serve both consumers until the process is ended."""
    import uvicorn

    configure(json.loads(options.serve))
    _leave_out_logs()
    config = uvicorn.Config(application(options), host=HOST, port=0, log_level="error")
    server = uvicorn.Server(config)

    async def main() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await task

    asyncio.run(main())


def _leave_out_logs() -> None:
    """Write no event log of the runs that are called so."""
    from agent_sessions.runs import event_rows

    write = event_rows.write

    def leave_out(using: str, found: Any) -> list[bool]:
        logged = [run for run in found if not run.run.run_id.startswith("unlogged")]
        return write(using, logged) if logged else [True] * len(found)

    event_rows.write = leave_out


def application(options: argparse.Namespace) -> Any:
    from agents import Agent, Runner
    from channels.generic.websocket import AsyncWebsocketConsumer
    from channels.routing import URLRouter
    from django.contrib.auth import get_user_model
    from django.urls import path

    from agent_sessions import get_session
    from agent_sessions.consumers import AgentConsumer

    paced: Any = Agent(name="paced", model=_model(options.words, options.pace))
    quick: Any = Agent(name="quick", model=_model(1, 0))
    open_sockets: dict[str, list[AsyncWebsocketConsumer]] = {}

    class Bare(AsyncWebsocketConsumer):
        async def connect(self) -> None:
            self.name = self.scope["url_route"]["kwargs"]["session_id"]
            open_sockets.setdefault(self.name, []).append(self)
            await self.accept()

        async def disconnect(self, code: int) -> None:
            open_sockets[self.name].remove(self)

        async def receive(self, text_data: Any = None, bytes_data: Any = None) -> None:
            self.task = asyncio.create_task(self.run_agent())

        async def run_agent(self) -> None:
            session = get_session(self.name, user=self.scope["user"])
            result = Runner.run_streamed(paced, "Hello", session=session)
            async for event in result.stream_events():
                if event.type != "raw_response_event":
                    continue
                if event.data.type == "response.output_text.delta":
                    text = json.dumps({"delta": event.data.delta})
                    for each in open_sockets[self.name]:
                        await each.send(text_data=text)

    def ours(agent: Any, **more: Any) -> Any:
        # The limits of a user would end the rounds.
        return AgentConsumer.as_asgi(agent=agent, max_runs_per_minute=10_000, **more)

    routes: list[Any] = [
        path("ours/<str:session_id>/", ours(paced)),
        path("unlogged/<str:session_id>/", ours(paced)),
        path("bare/<str:session_id>/", cast("Any", Bare.as_asgi())),
        path("window/<str:session_id>/", ours(quick)),
        path("whole/<str:session_id>/", ours(quick, window=None)),
    ]
    router: Any = URLRouter(routes)

    async def with_user(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            pk = scope["query_string"].decode()
            scope["user"] = await get_user_model().objects.aget(pk=pk)
            await router(scope, receive, send)

    return with_user


def _model(words: int, pace: float) -> Any:
    from agents import Model
    from agents.testing import assistant_message
    from openai.types.responses import ResponseUsage

    from example_project.demo_stream import stream

    usage = ResponseUsage.model_validate(
        {
            "input_tokens": 1,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 1,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 2,
        }
    )

    class Paced(Model):
        async def get_response(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        async def stream_response(
            self, *args: Any, **kwargs: Any
        ) -> AsyncIterator[Any]:
            text = " ".join(["word"] * words)
            due = time.monotonic()
            for event in list(stream([assistant_message(text)], usage)):
                if event.type == "response.output_text.delta":
                    due += pace
                    await asyncio.sleep(max(due - time.monotonic(), 0))
                    event.delta = f"{time.time():.6f} ".rjust(WORD)
                yield event

    return Paced()


# -- the clients -----------------------------------------------------------------------


def run_frame(session_id: str, run_id: str) -> str:
    message = {"id": f"u-{run_id}", "role": "user", "content": "Hello"}
    return json.dumps({"threadId": session_id, "runId": run_id, "messages": [message]})


async def crowd(
    url: str, way: str, made: Any, options: argparse.Namespace
) -> list[float]:
    """Open all sockets, start all runs; return the delay of every word, in ms."""
    from websockets.asyncio.client import connect

    each = options.sockets // options.runs
    delays: list[float] = []
    async with AsyncExitStack() as stack:
        groups = []
        for pk, session_id in made:
            place = f"{url}/{way}/{session_id}/?{pk}"
            opened = [
                await stack.enter_async_context(connect(place, max_queue=None))
                for _ in range(each)
            ]
            groups.append((session_id, opened))
        if way != "bare":
            for _, opened in groups:
                for socket in opened:
                    await socket.send('{"type":"sync"}')
                    while "RUN_FINISHED" not in await socket.recv():
                        pass
        listening = [
            asyncio.create_task(_listen(socket, options.words, delays))
            for _, opened in groups
            for socket in opened
        ]
        for number, (session_id, opened) in enumerate(groups):
            await opened[0].send(
                run_frame(session_id, f"{way}-{time.time_ns()}-{number}")
            )
            await asyncio.sleep(options.ramp / options.runs)
        async with asyncio.timeout(options.words * options.pace * 5 + 60):
            await asyncio.gather(*listening)
        if way != "bare":
            # The row is closed before the next round begins.
            await asyncio.sleep(0.5)
    return delays


async def _listen(socket: Any, words: int, delays: list[float]) -> None:
    heard = 0
    while heard < words:
        frame = json.loads(await socket.recv())
        now = time.time()
        event = frame.get("chunk", frame)
        if event.get("type") == "RUN_ERROR":
            raise RuntimeError(f"a run failed: {event['code']}")
        said = [float(word) for word in event.get("delta", "").split()]
        heard += len(said)
        delays.extend((now - when) * 1000 for when in said)


async def first_word(url: str, way: str, place: Any, rounds: int) -> float:
    """Return the median time from a message to the first word of its answer, in ms."""
    from websockets.asyncio.client import connect

    pk, session_id = place
    times = []
    async with connect(f"{url}/{way}/{session_id}/?{pk}") as socket:
        for number in range(rounds):
            began = time.perf_counter()
            await socket.send(run_frame(session_id, f"{way}-{number}-{time.time_ns()}"))
            while "TEXT_MESSAGE_CONTENT" not in (frame := await socket.recv()):
                if "RUN_ERROR" in frame:
                    raise RuntimeError(f"a run failed: {frame!r}")
            times.append((time.perf_counter() - began) * 1000)
            while "RUN_FINISHED" not in await socket.recv():
                pass
    return median(times[1:] or times)


async def measure(
    url: str, pid: int, made: Any, options: argparse.Namespace
) -> dict[str, Any]:
    # First, so that the server has imported all that the others need.
    ways = ("window", "whole")
    firsts = {way: await first_word(url, way, made[-1], 15) for way in ways}
    delays: dict[str, list[float]] = {way: [] for way in WAYS}
    took, memory = dict.fromkeys(WAYS, 0.0), []
    for number in range(options.rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            before, _ = used(pid)
            delays[way] += await crowd(url, way, made[:-1], options)
            after, resident = used(pid)
            took[way] += after - before
        memory.append(resident)
    return {"delays": delays, "firsts": firsts, "took": took, "memory": memory}


def report(found: dict[str, Any], options: argparse.Namespace) -> int:
    """Print what was measured; return 1 where words are missing, or p99 is too long."""
    words = options.words * options.runs * options.rounds
    wanted = words * (options.sockets // options.runs)
    print(f"{options.sockets} sockets, {options.runs} runs, {options.database}")
    worst = 0.0
    for way, delays in found["delays"].items():
        cuts = quantiles(delays, n=100)
        worst = cuts[98] if way == "ours" else worst
        print(
            f"{way:>8}: {len(delays):,} of {wanted:,} words; delay p50 {cuts[49]:.0f} ms, "
            f"p99 {cuts[98]:.0f} ms, longest {max(delays):.0f} ms"
        )
    took = {way: seconds / words * 1000 for way, seconds in found["took"].items()}
    print(", ".join(f"{way} {ms:.3f} ms" for way, ms in took.items()), "CPU a word")
    share = (took["ours"] - took["unlogged"]) / (took["bare"] or 1)
    print(f"the event log takes {share:.0%} of what the bare consumer takes")
    print("MB after each round:", *(f"{mb:.0f}" for mb in found["memory"]))
    print(
        f"first word on {options.items:,} items: {found['firsts']['window']:.0f} ms with "
        f"the default window, {found['firsts']['whole']:.0f} ms with none"
    )
    lost = any(len(delays) != wanted for delays in found["delays"].values())
    return int(lost or worst > (options.max_p99 or float("inf")))


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.serve:
        serve(options)
        return 0
    with database(options.database) as place:
        configure(place)
        made = fill(options.runs, options.items)
        numbers = [f"--words={options.words}", f"--pace={options.pace}"]
        command = [sys.executable, "-m", "benchmarks.sockets", *numbers]
        with subprocess.Popen(
            [*command, f"--serve={json.dumps(place)}"],
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            url = f"ws://{HOST}:{int(server.stdout.readline())}"
            try:
                found = asyncio.run(measure(url, server.pid, made, options))
            finally:
                server.terminate()
    return report(found, options)


if __name__ == "__main__":
    sys.exit(main())
