"""A line on the terminal that says how far a command is."""

from __future__ import annotations

import time
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agent_sessions.management.printing import PrintingCommand

WIDTH = 24
# Seconds between two pictures: quick enough to live, slow enough to cost nothing.
EVERY = 0.2


def add_progress(parser: ArgumentParser) -> None:
    """Add the option that shows or hides the bar."""
    parser.add_argument(
        "--progress",
        action=BooleanOptionalAction,
        help="show a progress bar (default: on a terminal)",
    )


@contextmanager
def showing(
    command: PrintingCommand,
    options: dict[str, Any],
    total: Callable[[], int | None],
) -> Iterator[Callable[[int], None]]:
    """Show a bar where the options ask for one; yield what counts the items done."""
    shown = options["progress"]
    if shown is None:
        shown = bool(options["verbosity"]) and command.stderr.isatty()
    if not shown:
        yield lambda count: None
        return
    # Not stderr itself, which ends every line and colours it.
    progress = Progress(command.stderr.stream, total())
    try:
        yield progress.add
    finally:
        progress.close()


class Progress:
    """A bar with the rate and the time that is left."""

    def __init__(self, stream: Any, total: int | None) -> None:
        self._stream = stream
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._drawn = 0.0
        self._length = 0

    def add(self, count: int) -> None:
        """Count what is done, and draw if it is time."""
        self._done += count
        now = time.monotonic()
        if now - self._drawn >= EVERY:
            self._drawn = now
            self._draw(now)

    def close(self) -> None:
        """Draw the end, and leave the line."""
        self._draw(time.monotonic())
        self._write("\n")

    def _draw(self, now: float) -> None:
        seconds = max(now - self._began, 0.001)
        rate = self._done / seconds
        text = f"{self._done:,} items, {rate:,.0f}/s"
        if self._total:
            share = min(self._done / self._total, 1)
            bar = "#" * round(share * WIDTH)
            text = (
                f"[{bar:-<{WIDTH}}] {share:4.0%} {self._done:,}/{self._total:,} items, "
                f"{rate:,.0f}/s"
            )
            if rate and self._done < self._total:
                left = round((self._total - self._done) / rate)
                text += f", {left // 60}:{left % 60:02} left"
        # Spaces wipe what a longer text left behind.
        self._write(f"\r{text:<{self._length}}")
        self._length = len(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
