"""Name this process for others, and tell whether one that was named has ended."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import sys
import uuid
from pathlib import Path

# Of a row that anybody may have edited, no more than this reaches the system: never a
# process group (0 and below), nor what no pid can be.
_OWNER = re.compile(r"([0-9a-f]{16}):([1-9][0-9]{0,9}):(?:([0-9]+)-)?.*")
_HIGHEST_PID = 2**31 - 1

_names: dict[int, str] = {}


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


def is_dead(owner: str, *, system: str = os.name) -> bool:
    """Return whether a process is known to have ended; False where it can't be known.

    Only a process of the same host and pid namespace can be looked up. Elsewhere the
    lease's age decides, and so it does on Windows, where asking would end the process.
    """
    found = _OWNER.fullmatch(owner)
    if found is None or found[1] != _host() or int(found[2]) > _HIGHEST_PID:
        return False
    pid, start = int(found[2]), found[3]
    if pid == os.getpid():
        # Containers start with the same pid each time.
        return owner != this_process()
    if system != "posix":
        return False
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
def _host() -> str:
    parts = _host_parts(sys.platform)
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _host_parts(platform: str, root: Path = Path("/proc")) -> list[str]:
    """Return what all processes have in common that can look each other up.

    On Linux that is the boot and the pid namespace: containers of one image share a
    hostname or a machine id, and see none of each other's processes.
    """
    parts = [socket.gethostname()]
    if platform == "linux":
        try:
            boot = (root / "sys/kernel/random/boot_id").read_text().strip()
            namespace = (root / "self/ns/pid").stat().st_ino
        except OSError:
            # Two sandboxes could be taken for one host: nobody is looked up.
            return [*parts, uuid.uuid4().hex]
        return [*parts, boot, str(namespace)]
    node = uuid.getnode()
    # Without a network interface it is random in each process, and has this bit.
    return parts if node >> 40 & 1 else [*parts, str(node)]
