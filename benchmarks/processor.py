"""What a process takes of the machine, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path


def used(pid: int) -> tuple[float, float]:
    """Return a process's seconds of the processor, and its memory in MB."""
    place = Path(f"/proc/{pid}")
    if not place.exists():
        return 0.0, 0.0
    times = (place / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
    pages = int((place / "statm").read_text().split()[1])
    seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return seconds, pages * os.sysconf("SC_PAGE_SIZE") / 2**20
