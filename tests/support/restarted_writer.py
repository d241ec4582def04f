"""What a process writes while its database is killed and comes back.

It prints a line for each outcome, and at its end what it was told and what is there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import django

WRITERS = 4
# So many batches of each writer are to be stored when the database is back.
AFTERWARDS = 5


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main() -> None:
    """Write until the database was away and is back."""
    from agent_sessions import get_session
    from agent_sessions.exceptions import StorageError

    session = get_session("s")
    acknowledged: list[str] = []
    failed: list[str] = []

    async def write(writer: int) -> None:
        number = since = 0
        while since < AFTERWARDS:
            name = f"{writer}.{number}"
            number += 1
            batch: list[Any] = [{"batch": name, "n": n} for n in range(4)]
            try:
                await session.add_items(batch)
            except StorageError:
                failed.append(name)
                tell("failed")
                await asyncio.sleep(0.05)
            else:
                acknowledged.append(name)
                since += bool(failed)
                tell("stored")

    await asyncio.gather(*(write(number) for number in range(WRITERS)))
    found = {"acknowledged": acknowledged, "failed": failed}
    tell(json.dumps(found | {"items": await session.get_items()}))


if __name__ == "__main__":
    django.setup()
    asyncio.run(main())
