"""Leases, judged by the database's clock, and the processes that hold them.

Hosts that share a database don't share a clock. So leases and claims are written and
judged in statements, by the one clock that all of them see.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.db.models import BooleanField, DateTimeField, ExpressionWrapper, Func, Q

if TYPE_CHECKING:
    from agent_sessions.models import AgentSession

# A run that has been silent for longer than this has died.
RUN_SILENCE = timedelta(seconds=15)
# What the row of a run names as its process that waits for a worker, and for how long:
# its task may be lost.
QUEUED = "queued"
QUEUE_SILENCE = timedelta(minutes=5)
# Of a row that anybody may have edited, no more than this reaches the system: never a
# process group (0 and below), nor what no pid can be.
_OWNER = re.compile(r"([0-9a-f]{16}):([1-9][0-9]{0,9}):(?:([0-9]+)-)?.*")
_HIGHEST_PID = 2**31 - 1

_names: dict[int, str] = {}


class DatabaseNow(Func):
    """The moment by the database's clock, for columns that nobody is shown.

    Unlike `Now()` it depends on no connection's time zone, and is not the moment at
    which a statement began that then waited for a row.
    """

    template = "CLOCK_TIMESTAMP()"
    output_field = DateTimeField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        moment = "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW')"
        return self.as_sql(compiler, connection, template=moment, **context)

    def as_mysql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **context)


def is_silent(column: str, silence: timedelta) -> Q:
    """Return the condition that a moment is further away than `silence`, or is none.

    A moment to come counts too: a clock that was set back has left it.
    """
    return (
        Q(**{f"{column}__isnull": True})
        | Q(**{f"{column}__lt": DatabaseNow() - silence})
        | Q(**{f"{column}__gt": DatabaseNow() + silence})
    )


def is_unheard(silence: timedelta) -> Q:
    """Return the condition that a run was not heard of for too long."""
    queued = Q(run_owner=QUEUED)
    waited = is_silent("run_seen_at", QUEUE_SILENCE)
    return (queued & waited) | (~queued & is_silent("run_seen_at", silence))


def judged(rows: Any, silence: timedelta = RUN_SILENCE) -> Any:
    """Return the rows of sessions with what is_over() needs to know."""
    silent = is_unheard(silence)
    return rows.annotate(
        run_is_silent=ExpressionWrapper(silent, output_field=BooleanField())
    )


def is_over(row: Any) -> bool:
    """Return whether the run that a row of judged() names has ended without a word."""
    return bool(row.run_is_silent) or is_dead(row.run_owner)


def holds_a_run(row: AgentSession) -> bool:
    """Return whether a run that is alive holds a session, as its row says now."""
    if not row.run_id:
        return False
    rows = type(row).objects.using(row._state.db).filter(pk=row.pk)
    now = judged(rows.exclude(run_id="")).first()
    return now is not None and not is_over(now)


# -- processes ------------------------------------------------------------------------


def this_process() -> str:
    """Name this process, unlike any other: host, pid, its start and a random token."""
    pid = os.getpid()
    # Keyed by pid, so that a forked child doesn't pass for its parent.
    name = _names.get(pid)
    if name is None:
        start, _ = _look_up(pid)
        token = uuid.uuid4().hex[:12]
        name = (
            f"{_host()}:{pid}:{start}-{token}" if start else f"{_host()}:{pid}:{token}"
        )
        name = _names.setdefault(pid, name)
    return name


def is_dead(owner: str) -> bool:
    """Return whether a process is known to have ended; False if it can't be known.

    Only on Linux, and only a process of the same boot and pid namespace, can be looked
    up. Elsewhere the lease's age decides.
    """
    found = _OWNER.fullmatch(owner)
    if found is None or found[1] != _host() or int(found[2]) > _HIGHEST_PID:
        return False
    pid, start = int(found[2]), found[3]
    if pid == os.getpid():
        # Containers start with the same pid each time.
        return owner != this_process()
    try:
        # Signal 0 is sent to nobody.
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    found_start, state = _look_up(pid)
    # Another process has got its pid, or nobody has asked yet how it ended.
    return bool(start and found_start and start != found_start) or state in {"Z", "X"}


def _look_up(pid: int) -> tuple[str, str]:
    """Return when a process began (ticks since the boot) and its state, or nothing."""
    try:
        # In a pid namespace that mounts no /proc of its own, pids there are others'.
        if os.readlink("/proc/self") != str(os.getpid()):
            return "", ""
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", ""
    # The command's name stands in brackets, and may hold spaces and brackets.
    fields = text.rpartition(")")[2].split()
    return (fields[19], fields[0]) if len(fields) > 19 else ("", "")


@functools.cache
def _host(root: Path = Path("/proc")) -> str:
    """Name what all processes have in common that can look each other up.

    That is the boot and the pid namespace: containers of one image share a hostname or
    a machine id, and see none of each other's processes. A process that isn't told
    either has a name of its own, and is looked up by nobody.
    """
    try:
        boot = (root / "sys/kernel/random/boot_id").read_text().strip()
        namespace = (root / "self/ns/pid").stat().st_ino
    except OSError:
        return uuid.uuid4().hex[:16]
    text = f"{socket.gethostname()}/{boot}/{namespace}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
