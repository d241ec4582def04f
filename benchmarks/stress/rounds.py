"""Writers, a reader, poppers and kills: run the processes, then look at the history."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from agent_sessions import DjangoSession
from agent_sessions.models import AgentSession
from benchmarks.stress.history import (
    History,
    Token,
    await_end,
    batch,
    server_connections,
    token,
)
from benchmarks.stress.workers import work

_FILLED_AT_ONCE = 500
# Long enough for a child to connect and write, so that some are killed before it.
_LONGEST_LIFE = 0.25


@dataclass
class Outcome:
    """What was checked, in lines for people, and what was found wrong."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Children:
    """Child processes that begin at the same time, each with a pipe."""

    def __init__(self, environment: dict[str, str], seconds: float) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.stress.preload"])
        self._environment = environment
        self._deadline = time.monotonic() + seconds
        self._started: list[tuple[BaseProcess, Connection]] = []

    def start(self, role: str, *args: Any) -> Connection:
        """Make a child; it waits until release()."""
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work, args=(role, self._environment, theirs, *args), daemon=True
        )
        process.start()
        theirs.close()
        self._started.append((process, pipe))
        return pipe

    def release(self) -> list[str]:
        """Let all begin once all are ready; tell who wasn't."""
        problems = []
        for _, pipe in self._started:
            _, problem = self.result(pipe)
            problems += [problem] if problem else []
        for _, pipe in self._started:
            with contextlib.suppress(BrokenPipeError):
                pipe.send("go")
        return problems

    def result(self, pipe: Connection) -> tuple[Any, str]:
        """Wait for what a child says; its result, or why there is none."""
        if not pipe.poll(max(self._deadline - time.monotonic(), 0)):
            return None, "a child process didn't end in time"
        try:
            kind, said = pipe.recv()
        except (EOFError, ConnectionResetError):
            return None, "a child process ended without a word"
        return (None, said) if kind == "failed" else (said, "")

    def kill(self) -> None:
        """End all with SIGKILL."""
        for process, _ in self._started:
            process.kill()
        for process, _ in self._started:
            process.join()

    def close(self) -> None:
        """End what still runs and let go of the pipes."""
        self.kill()
        for process, pipe in self._started:
            process.close()
            pipe.close()
        self._started = []


def stress_writers(
    environment: dict[str, str],
    session_id: str,
    *,
    processes: int,
    writers: int,
    batches: int,
    seconds: float = 3_600,
) -> Outcome:
    """Let `writers` of some processes write to one session beside one reader."""
    outcome = Outcome()
    children = Children(environment, seconds)
    shares = [range(first, writers, processes) for first in range(processes)]
    pipes = [children.start("write", session_id, share, batches) for share in shares]
    reader = children.start("read", session_id)
    try:
        outcome.problems += children.release()
        began = time.perf_counter()
        for pipe in pipes:
            outcome.problems += filter(None, [children.result(pipe)[1]])
        spent = time.perf_counter() - began
        reader.send("stop")
        read, problem = children.result(reader)
    finally:
        children.close()
    history = History(session_id)
    history.read_on()
    history.compare_items()
    history.compare_batches(range(writers), batches)
    outcome.problems += history.problems
    looks, seen = read or (0, [])
    if problem:
        outcome.problems.append(f"the reader: {problem}")
    elif seen != history.tokens:
        outcome.problems.append("the reader saw another order than is stored")
    whole = sum(history.batches.values())
    outcome.lines += [
        f"{writers} writers in {processes} processes: {whole:,} batches, "
        f"{len(history.tokens):,} items, {history.turn:,} turns",
        f"{whole / spent:,.0f} batches/s, {len(history.tokens) / spent:,.0f} items/s "
        f"for {spent:.1f} s; beside them {looks:,} reads, {looks / spent:,.0f} /s",
    ]
    return outcome


def stress_poppers(
    environment: dict[str, str],
    session_id: str,
    *,
    poppers: int,
    batches: int,
    seconds: float = 3_600,
) -> Outcome:
    """Let processes pop one session empty."""
    outcome = Outcome()
    wanted = _fill(session_id, batches)
    children = Children(environment, seconds)
    pipes = [children.start("pop", session_id) for _ in range(poppers)]
    popped: list[list[Token]] = []
    try:
        outcome.problems += children.release()
        began = time.perf_counter()
        for pipe in pipes:
            result, problem = children.result(pipe)
            outcome.problems += [problem] if problem else []
            popped.append(result or [])
        spent = time.perf_counter() - began
    finally:
        children.close()
    found = Counter(one for mine in popped for one in mine)
    twice = sum(found.values()) - len(found)
    missed, foreign = len(set(wanted) - set(found)), len(set(found) - set(wanted))
    if twice or missed or foreign:
        outcome.problems.append(
            f"{twice} items were popped twice, {missed} never, {foreign} are unknown"
        )
    if any(mine != sorted(mine, reverse=True) for mine in popped):
        outcome.problems.append("a popper got an older item before a newer one")
    row = AgentSession.objects.select_related("branch").get(session_id=session_id)
    assert row.branch is not None
    rest = (row.item_count, row.branch.turn, DjangoSession(session_id).sync.get_items())
    if rest != (0, 0, []):
        outcome.problems.append(f"(item_count, turn, items) is {rest}, not (0, 0, [])")
    outcome.lines += [
        f"{poppers} poppers in processes of their own: {len(found):,} items once each; "
        f"{min(map(len, popped)):,} to {max(map(len, popped)):,} a process",
        f"{len(found) / spent:,.0f} pops/s for {spent:.1f} s",
    ]
    return outcome


def stress_kills(
    environment: dict[str, str], session_id: str, *, kills: int, seed: int = 0
) -> Outcome:
    """Kill one writing process after the other, on one session."""
    outcome = Outcome()
    chance = random.Random(seed)  # noqa: S311
    history = History(session_id)
    acknowledged = unasked = unborn = 0
    for number in range(kills):
        life = chance.uniform(0, _LONGEST_LIFE)
        said, problems = _killed_after(life, environment, session_id, number)
        history.read_on()
        there = history.batches[number]
        if there not in (said, said + 1):
            problems.append(f"{said} batches were acknowledged, {there} are there")
        outcome.problems += [f"kill {number}: {text}" for text in problems]
        acknowledged += said
        unasked += there - said
        unborn += not there
    history.compare_items()
    outcome.problems += history.problems
    outcome.lines += [
        f"{kills} kills: {acknowledged:,} batches acknowledged, all there; after "
        f"{unasked} kills one more was there whole, after {kills - unasked} none",
        f"{len(history.tokens):,} items; {unborn} were killed before their first batch",
    ]
    return outcome


def _killed_after(
    seconds: float, environment: dict[str, str], session_id: str, writer: int
) -> tuple[int, list[str]]:
    """Let a child append for a while and kill it; give how much it acknowledged."""
    before = server_connections()
    children = Children(environment, 120)
    pipe = children.start("append", session_id, writer)
    try:
        problems = children.release()
        time.sleep(seconds)
        children.kill()
        said = b""
        # A socket: what was sent before the end is still in it.
        with contextlib.suppress(ConnectionResetError):
            while part := os.read(pipe.fileno(), 65_536):
                said += part
    finally:
        children.close()
    rest = said.lstrip(b"+")
    if rest:
        problems.append(rest.decode(errors="replace"))
    if not await_end(before):
        problems.append("the server still holds the killed process's connection")
    return len(said) - len(rest), problems


def _fill(session_id: str, batches: int) -> list[Token]:
    items = [item for number in range(batches) for item in batch(0, number)]
    session = DjangoSession(session_id)
    for start in range(0, len(items), _FILLED_AT_ONCE):
        session.sync.add_items(items[start : start + _FILLED_AT_ONCE])
    return [token(item) for item in items]
