from __future__ import annotations

import math
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from django.core.management.base import CommandError

from agent_sessions.backends.encrypted import EncryptedBackend
from agent_sessions.backends.encrypted.rotation import (
    Retirement,
    Rotated,
    Rotation,
    rotate_rest,
)
from agent_sessions.handler import sessions
from agent_sessions.management.options import add_options, counted
from agent_sessions.management.printing import PrintingCommand
from agent_sessions.retention import Selection

# Seconds between two looks at who writes.
_PAUSE = 0.5


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ArgumentTypeError("0 or more seconds")
    return seconds


class Job:
    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.backend = cast("EncryptedBackend", sessions[alias])
        self.retirement = Retirement(self.backend)
        self.done, self.last = Rotated(), Rotated()
        self.sessions = 0
        self.is_complete = False

    def sweep(
        self, batch_size: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """Put what is there now under the first key."""
        self.last = rotate_rest(self.backend, batch_size)
        self.sessions += self.last.keys
        for row in Selection(backends=(self.alias,)).rows():
            rotated = Rotation(self.backend, row).run(batch_size=batch_size)
            self.last.add(rotated)
            self.sessions += bool(rotated.items or rotated.texts or rotated.keys)
            if progress is not None:
                progress(row.item_count)
        self.done.add(self.last)
        self.retirement.add(self.last.older)

    def finish(self) -> None:
        """Find out whether all is under the first key, and will be."""
        # The keys may have changed meanwhile.
        first = self.backend.source.fetch().first.id
        unused = self.retirement.look(retire=False) and first == self.retirement.first
        self.is_complete = unused and not self.last.left


class Command(PrintingCommand):
    help = (
        "Encrypt what encrypted backends store under the first of their keys, also "
        "what is under older ones, and retire these: no process may write with a "
        "retired key. Sessions may be written to meanwhile; positions, turns and times "
        "stay. A call that broke off is simply given again. Exit codes: 0 all is under "
        "the first key, and stays so, 1 nothing was written, 3 something is still "
        "under another key, or may yet be written with one."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(
            parser,
            "--backend",
            help="only this encrypted alias of AGENT_SESSIONS; may be given again "
            "(default: all of them)",
        )
        add_options(parser, "--batch-size", "--progress")
        parser.add_argument(
            "--wait",
            type=_seconds,
            default=120.0,
            metavar="SECONDS",
            help="how long to wait for processes that may still write with an older "
            "key (default: %(default)g)",
        )
        parser.add_argument(
            "--reinstate",
            metavar="KEY_ID",
            help="only allow processes to write with a retired key again",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["reinstate"] is not None:
            self._reinstate(options["reinstate"])
            return
        jobs = [Job(alias) for alias in self._aliases()]
        self.begun = True
        self.stopped = partial(_stopped, jobs)
        if left := self._rotate(jobs):
            raise CommandError(
                f"Keep the older keys of {', '.join(left)}: not everything is under "
                "the first one, or stays so. Then give the same command again."
            )

    def _aliases(self) -> list[str]:
        wanted: list[str] = self.options["backend"]
        for alias in wanted:
            if not isinstance(sessions[alias], EncryptedBackend):
                raise CommandError(
                    f"{alias} is no EncryptedBackend. Nothing was written."
                )
        found = wanted or [
            alias for alias in sessions if isinstance(sessions[alias], EncryptedBackend)
        ]
        if not found:
            raise CommandError("AGENT_SESSIONS has no EncryptedBackend.")
        return found

    def _reinstate(self, key_id: str) -> None:
        for alias in self._aliases():
            backend = cast("EncryptedBackend", sessions[alias])
            rows = backend.permits.rows().filter(key_id=key_id)
            if rows.exclude(retired_at=None).update(retired_at=None):
                self.stdout.write(f"{alias}: key {key_id} writes again.")
            else:
                self.stdout.write(f"{alias}: key {key_id} was not retired.")

    def _rotate(self, jobs: list[Job]) -> list[str]:
        """Rotate aliases; give those of which something needs an older key, or may."""
        size = self.options["batch_size"]
        for job in jobs:
            total = partial(_count_items, job.alias)
            with self.progress(total) as add:
                job.sweep(size, add)
        waiting = [job for job in jobs if job.retirement.writers and not job.last.left]
        self._wait(waiting)
        for job in waiting:
            if not job.retirement.writers:
                # What was written until the older keys were retired.
                job.sweep(size)
        for job in jobs:
            job.finish()
            self._tell(job)
        return [job.alias for job in jobs if not job.is_complete]

    def _wait(self, jobs: list[Job]) -> None:
        """Wait until no process writes with older keys, or the time is over."""
        until = time.monotonic() + self.options["wait"]
        if jobs and self.options["wait"] and self.options["verbosity"]:
            names = ", ".join(job.alias for job in jobs)
            self.stdout.write(
                f"{names}: waiting for processes that may still write with older keys, "
                f"up to {self.options['wait']:g} seconds."
            )
            self.stdout.flush()
        while [job for job in jobs if not job.retirement.look()]:
            if time.monotonic() >= until:
                return
            time.sleep(_PAUSE)

    def _tell(self, job: Job) -> None:
        done, last, said = job.done, job.last, list[str]()
        for key_id, missing in sorted(last.unknown.items()):
            said.append(
                f"{counted(missing, 'row')} under key {key_id}, which is not among the "
                "keys."
            )
        if last.fixed:
            said.append(
                f"{counted(last.fixed, 'item')} under other keys, which "
                f"{type(job.backend.inner).__name__} can't rewrite. Copy the sessions "
                "to an alias of the new key with copy_agent_sessions."
            )
        if last.unreadable:
            said.append(
                f"{counted(last.unreadable, 'row')} that don't open: they were not "
                "encrypted, were changed, or moved here."
            )
        for key_id, writers in sorted(job.retirement.writers.items()):
            if holders := ", ".join(sorted(writers.holders)):
                said.append(
                    f"key {key_id} was written with meanwhile, by {holders} "
                    "(host:process). Give these the current keys, the newest first, "
                    "and restart them."
                )
            else:
                said.append(
                    f"key {key_id} may be written with for another "
                    f"{writers.left:.0f} seconds."
                )
        if self.options["verbosity"]:
            keys = f", and {counted(done.keys, 'session key')}" if done.keys else ""
            self.stdout.write(
                f"{job.alias}: {counted(done.items + done.texts, 'item')}{keys} of "
                f"{counted(job.sessions, 'session')} put under key "
                f"{job.retirement.first}."
            )
        for line in said:
            self.stderr.write(f"{job.alias}: {line}")
        if not job.is_complete or not self.options["verbosity"]:
            return
        retired = job.retirement.retired()
        for key_id in retired:
            self.stdout.write(
                f"{job.alias}: nothing is under {key_id}, and no process may "
                "write with it any more: it can be removed."
            )
        for key_id in job.backend.source.get().ids:
            if key_id not in {job.retirement.first, *retired}:
                self.stdout.write(
                    f"{job.alias}: nothing is under {key_id}, with which no process has "
                    "written. Any may: remove it from the keys if none is to."
                )


def _count_items(alias: str) -> int:
    return Selection(backends=(alias,)).totals().items


def _stopped(jobs: list[Job]) -> str:
    items = sum(job.done.items + job.done.texts for job in jobs)
    return (
        f"Stopped. Put under the first key so far: {counted(items, 'item')}. Run the "
        "same command again to go on."
    )
