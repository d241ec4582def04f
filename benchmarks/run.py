"""One database's workloads; `python -m benchmarks` calls this once for each."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.database import Database, database
from benchmarks.plans import PLANS
from benchmarks.results import Results

if TYPE_CHECKING:
    from benchmarks.stores import Store

# The SDK reads it when it is imported; nothing is traced here, but nothing asks either.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"


async def measure(made: Database, options: argparse.Namespace, named: str) -> Results:
    """Run the workloads that were asked for."""
    from benchmarks.stores import OURS, postgresql_stores, sqlite_stores
    from benchmarks.workloads import WORKLOADS, Bench

    slow: list[Store] = []
    if made.kind == "postgresql":
        stores = await postgresql_stores(made)
        slow = await postgresql_stores(made, slow=True)
    else:
        stores = await sqlite_stores(made)
    reference = stores[1].name
    wanted = options.stores or [store.name for store in stores]
    chosen, chosen_slow = (
        [
            store
            for store in group
            if store.name in (OURS, reference)
            or any(word.lower() in store.name.lower() for word in wanted)
        ]
        for group in (stores, slow)
    )
    results = Results(named, reference)
    results.stores = {store.name: store.made_of for store in chosen}
    bench = Bench(made, chosen, chosen_slow, PLANS[options.size], results)
    for name, workload in WORKLOADS.items():
        if name in options.workloads:
            begun = time.perf_counter()
            await workload(bench)
            spent = time.perf_counter() - begun
            print(f"{made.kind}: {name}, {spent:.0f} s", file=sys.stderr, flush=True)
    await bench.close()
    for store in stores + slow:
        if store not in chosen + chosen_slow:
            await store.close()
    return results


def main(options: argparse.Namespace) -> None:
    """Measure one database and write the values to a file."""
    with database(options.database, peers=True) as made:
        # Asked here, since Django refuses to where a loop runs.
        named = made.version
        results = asyncio.run(measure(made, options, named))
    Path(options.json).write_text(json.dumps(asdict(results)))
