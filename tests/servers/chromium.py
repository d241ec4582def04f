"""Find a Chromium that Playwright can drive."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Where `tests.servers.provision` unpacks the build that npm has.
UNPACKED = Path(__file__).parents[2] / ".cache" / "chromium" / "chromium"


def executable() -> str | None:
    """Return the path of a Chromium: $CHROMIUM, the machine's or the unpacked one."""
    if named := os.environ.get("CHROMIUM"):
        return named
    for name in NAMES:
        if found := shutil.which(name):
            return found
    return str(UNPACKED) if UNPACKED.exists() else None


def missing() -> str | None:
    """Return what is missing to open a browser here, if anything."""
    if executable():
        return None
    return "Chromium is missing: apt-get install chromium, or set CHROMIUM to its path"
