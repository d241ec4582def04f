"""Who owns a run, and whether that process is still there."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import uuid
from pathlib import Path

_tokens: dict[int, str] = {}


def this_process() -> str:
    """Name this process, across hosts and restarts: host, pid and a random token."""
    pid = os.getpid()
    # Keyed by pid, so that a forked child doesn't pass for its parent.
    token = _tokens.setdefault(pid, uuid.uuid4().hex[:12])
    return f"{_host()}:{pid}:{token}"


def is_dead(owner: str) -> bool:
    """Tell whether a process is known to have ended; False where it can't be known.

    Only a process of the same host and pid namespace can be looked up. Elsewhere the
    lease's age decides.
    """
    host, _, rest = owner.partition(":")
    pid_text, _, token = rest.partition(":")
    if host != _host() or not pid_text.isdigit():
        return False
    pid = int(pid_text)
    if pid == os.getpid():
        # Containers start with the same pid each time.
        return f"{host}:{pid}:{token}" != this_process()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@functools.cache
def _host() -> str:
    parts = [socket.gethostname(), str(uuid.getnode())]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts.append(boot.read_text().strip())
    namespace = Path("/proc/self/ns/pid")
    if namespace.exists():
        parts.append(str(namespace.stat().st_ino))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]
