"""What is measured. In each round the stores take turns, and who begins changes."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from benchmarks.database import Database
from benchmarks.items import history, turn
from benchmarks.plans import LIMIT, Plan
from benchmarks.results import Results
from benchmarks.stores import OURS, Session, Store

# The first turns of a session object fill its caches.
_WARM_TURNS = 2
_CHUNK = 5_000
# A longer history is kept over the rounds, a shorter one begins anew in each.
_LONG = 1_000


@dataclass
class Bench:
    """The stores of one database, with the histories that workloads share."""

    made: Database
    stores: list[Store]
    slow_stores: list[Store]
    plan: Plan
    results: Results
    # Sessions by store and length; turns hardly change a long one.
    filled: dict[tuple[str, int], Session] = field(default_factory=dict)

    def rounds(
        self, count: int, stores: list[Store] | None = None
    ) -> Iterator[tuple[int, Store]]:
        """Return the stores round by round; negative rounds only warm up."""
        compared = self.stores if stores is None else stores
        for number in range(-1, count):
            shift = number % max(len(compared), 1)
            for store in compared[shift:] + compared[:shift]:
                yield number, store
            gc.collect()

    async def fill(self, store: Store, count: int) -> Session:
        """Make a session of `count` items."""
        session: Session = store.open(str(uuid.uuid4()))
        for start in range(0, count, _CHUNK):
            await session.add_items(history(min(count - start, _CHUNK)))
        return session

    async def kept(self, store: Store, count: int) -> Session:
        """Return the session of `count` items that later workloads use too."""
        if (store.name, count) not in self.filled:
            self.filled[store.name, count] = await self.fill(store, count)
        return self.filled[store.name, count]

    async def close(self) -> None:
        """Let go of the sessions and the stores."""
        for (name, _), session in self.filled.items():
            await next(s for s in self.stores if s.name == name).release(session)
        for store in self.stores + self.slow_stores:
            await store.close()


def at(length: int) -> str:
    """Name the turn's workload for a length of the history."""
    return f"turn at {length:,} items"


def together(count: int, *, slow: bool) -> str:
    """Name the workload of several sessions at once."""
    network = ", 2 ms of network" if slow else ""
    return f"{count} sessions at once, turns/s{network}"


def pops_of(count: int) -> str:
    """Name the workload of a history that is popped empty."""
    return f"pops/s of {count:,} items"


async def turns(bench: Bench) -> None:
    """Time `get_items(limit=50)` and `add_items` of two items, at each length."""
    plan = bench.plan
    long = [length for length in plan.lengths if length > _LONG]
    for store in bench.stores:
        for length in long:
            await bench.kept(store, length)
    await asyncio.to_thread(bench.made.settle)
    for number, store in bench.rounds(plan.rounds):
        for length in plan.lengths:
            if length in long:
                session = await bench.kept(store, length)
            else:
                session = await bench.fill(store, max(length - 2 * _WARM_TURNS, 0))
            await _time_turns(bench, (at(length), store.name), number, _turn(session))
            if length not in long:
                await store.release(session)


async def new_objects(bench: Bench) -> None:
    """Time turns of which each makes its session object, as a web request does."""
    length = sorted(bench.plan.lengths)[len(bench.plan.lengths) // 2]
    for number, store in bench.rounds(bench.plan.rounds):
        session = await bench.fill(store, length)

        async def anew(store: Store = store, name: str = session.session_id) -> None:
            opened = store.open(name)
            await _turn(opened)()
            await store.release(opened)

        workload = f"{at(length)}, a new object each"
        await _time_turns(bench, (workload, store.name), number, anew)
        await store.release(session)


async def at_once(bench: Bench) -> None:
    """Count the turns that sessions have at once, and with a network between."""
    plan = bench.plan
    for slow, stores in ((False, bench.stores), (True, bench.slow_stores)):
        for count in plan.together:
            opened = {
                store.name: [await bench.fill(store, 2) for _ in range(count)]
                for store in stores
            }
            for number, store in bench.rounds(plan.rounds_together, stores):
                sessions = opened[store.name]
                start = time.perf_counter()
                await asyncio.gather(
                    *(_in_a_row(session, plan.turns_together) for session in sessions)
                )
                spent = time.perf_counter() - start
                if number >= 0:
                    rate = count * plan.turns_together / spent
                    bench.results.rate(together(count, slow=slow), store.name, rate)
            for store in stores:
                for session in opened[store.name]:
                    await store.release(session)


async def reads(bench: Bench) -> None:
    """Time the read of a whole history."""
    count = bench.plan.read
    opened = {store.name: await bench.fill(store, count) for store in bench.stores}
    await asyncio.to_thread(bench.made.settle)
    for number, store in bench.rounds(bench.plan.rounds):
        spent = await _timed(opened[store.name].get_items)
        if number >= 0:
            bench.results.add(f"read of {count:,} items", store.name, spent)
    for store in bench.stores:
        await store.release(opened[store.name])


async def pops(bench: Bench) -> None:
    """Count the items that one caller pops, until a short history is empty."""
    count = bench.plan.popped
    for number, store in bench.rounds(bench.plan.rounds):
        session: Any = await bench.fill(store, count)
        if not hasattr(session, "pop_item"):
            continue
        start = time.perf_counter()
        while await session.pop_item() is not None:
            pass
        spent = time.perf_counter() - start
        if number >= 0:
            bench.results.rate(pops_of(count), store.name, count / spent)
        await store.release(session)


async def imports(bench: Bench) -> None:
    """Time one `add_items` of many items."""
    count = bench.plan.imported
    items = history(count)
    await asyncio.to_thread(bench.made.settle)
    for number, store in bench.rounds(bench.plan.imports):
        session = store.open(str(uuid.uuid4()))
        spent = await _timed(partial(session.add_items, items))
        if number >= 0:
            bench.results.add(f"import of {count:,} items", store.name, spent)
        await session.clear_session()
        await store.release(session)


async def memory(bench: Bench) -> None:
    """Measure what reading 50 items of a short and of a long history takes."""
    for store in bench.stores:
        for count in (bench.plan.few, bench.plan.long):
            session = await bench.kept(store, count)
            await session.get_items(limit=LIMIT)
            gc.collect()
            tracemalloc.start()
            await session.get_items(limit=LIMIT)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            workload = f"bytes to read {LIMIT} of {count:,} items"
            bench.results.add(workload, store.name, peak)


async def forks(bench: Bench) -> None:
    """Time a fork at the end of a long history."""
    count = bench.plan.long
    for store in bench.stores:
        if not store.forks:
            continue
        session: Any = await bench.kept(store, count)
        # Where nothing is copied once would be over before it can be timed.
        for number in range(bench.plan.imports if store.name == OURS else 1):
            spent = await _timed(
                partial(session.create_branch_from_turn, count // 2, f"fork {number}")
            )
            bench.results.add(f"fork of {count:,} items", store.name, spent)
            await session.switch_to_branch("main")


async def forked_reads(bench: Bench) -> None:
    """Time reading a branch that was forked several times, and one that wasn't."""
    plan = bench.plan
    (store, *_) = bench.stores
    plain: Any = await bench.fill(store, plan.read)
    forked: Any = await bench.fill(store, plan.read - plan.forks * plan.grown)
    for number in range(plan.forks):
        last = (await forked.get_conversation_turns())[-1]["turn"]
        await forked.fork(last, f"fork {number}")
        await forked.add_items(history(plan.grown))
    await asyncio.to_thread(bench.made.settle)
    for number in range(-1, plan.rounds * 3):
        for limit in (LIMIT, None):
            shown = f"read of {limit or plan.read:,} items"
            for depth, session in ((0, plain), (plan.forks, forked)):
                spent = await _timed(partial(session.get_items, limit=limit))
                if number >= 0:
                    workload = f"{shown}, {depth} forks deep"
                    bench.results.add(workload, store.name, spent)


async def clearing(bench: Bench) -> None:
    """Time the end of long histories, the kept ones first."""
    count = bench.plan.long
    for number in range(bench.plan.clears):
        for store in bench.stores:
            session = await (bench.fill if number else bench.kept)(store, count)
            await asyncio.to_thread(bench.made.settle)
            spent = await _timed(session.clear_session)
            bench.results.add(f"clear of {count:,} items", store.name, spent)
            if number:
                await store.release(session)


# In this order: what needs the long histories goes before what ends them.
WORKLOADS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "turn": turns,
    "new-object": new_objects,
    "at-once": at_once,
    "read": reads,
    "pop": pops,
    "import": imports,
    "memory": memory,
    "fork": forks,
    "forked-read": forked_reads,
    "clear": clearing,
}


def _turn(session: Session) -> Callable[[], Awaitable[None]]:
    new = turn(1)

    async def one() -> None:
        await session.get_items(limit=LIMIT)
        await session.add_items(new)

    return one


async def _in_a_row(session: Session, count: int) -> None:
    one = _turn(session)
    for _ in range(count):
        await one()


async def _timed(work: Callable[[], Awaitable[Any]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def _time_turns(
    bench: Bench,
    name: tuple[str, str],
    number: int,
    one: Callable[[], Awaitable[None]],
) -> None:
    """Time one turn after the other, a round's worth: their median is its value."""
    for _ in range(_WARM_TURNS):
        await one()
    spent: list[float] = []
    before, begun = time.process_time(), time.perf_counter()
    while len(spent) < bench.plan.turns:
        spent.append(await _timed(one))
        if time.perf_counter() - begun > bench.plan.block:
            break
    busy = time.process_time() - before
    if number >= 0:
        workload, store = name
        bench.results.add(workload, store, median(spent))
        # Of this process, not of a server; another process can't disturb it.
        bench.results.add(f"{workload}, CPU", store, busy / len(spent))
