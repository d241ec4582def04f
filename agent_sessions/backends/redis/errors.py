"""The errors of redis-py, as those of agent_sessions."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from functools import partial

from agent_sessions.backends.remote.base import (
    Advice,
    class_names,
    find_advice,
    translated,
)
from agent_sessions.exceptions import (
    LeaseLost,
    StorageError,
    StoreFull,
    StoreReadOnly,
    StoreRefused,
    StoreUnavailable,
    WrongKeyType,
)

# The first word of what the server says -> the error, and what to do.
_WORDS: dict[str, Advice] = {
    "NOAUTH": (StoreRefused, "it wants a password. Set it in the URL or the cache."),
    "WRONGPASS": (StoreRefused, "it refuses the user or password. Check both."),
    "NOPERM": (
        StoreRefused,
        "its ACL refuses {what}. Allow the keys that begin with the alias's key_prefix, "
        "and the commands that docs/redis.md names; a client that may not say HELLO "
        "needs protocol=2 among its options.",
    ),
    "READONLY": (
        StoreReadOnly,
        "it is a replica and takes no writes. Connect to the primary, or through "
        "Sentinel, which finds it.",
    ),
    "OOM": (StoreFull, "its memory is full. Raise maxmemory, or clear sessions."),
    "MISCONF": (StoreFull, "it can't save to disk. Make room there."),
    "NOREPLICAS": (StoreUnavailable, "it has too few replicas to take writes."),
    "CLUSTERDOWN": (StoreUnavailable, "its cluster is down. Try again when it is up."),
    "MASTERDOWN": (StoreUnavailable, "its primary is down. Try again later."),
    "LOADING": (StoreUnavailable, "it is still loading its data. Try again."),
    "TRYAGAIN": (StoreUnavailable, "its cluster is moving the session. Try again."),
    "WRONGTYPE": (
        WrongKeyType,
        "a session's key holds something else, which was left alone. Choose another "
        "session id or key_prefix.",
    ),
}
# And the classes of redis-py that cut the server's word off.
_ADVICE = _WORDS | {
    "AuthorizationError": _WORDS["NOPERM"],
    "NoPermissionError": _WORDS["NOPERM"],
    "ReadOnlyError": _WORDS["READONLY"],
    "OutOfMemoryError": _WORDS["OOM"],
    "BusyLoadingError": _WORDS["LOADING"],
    "MasterDownError": _WORDS["MASTERDOWN"],
    "ClusterDownError": _WORDS["CLUSTERDOWN"],
    "TryAgainError": _WORDS["TRYAGAIN"],
}


def unanswered(alias: str, seconds: float) -> StoreUnavailable:
    return StoreUnavailable(
        f"Redis of {alias!r} didn't answer within {seconds} seconds. Check that it runs "
        "and can be reached; a write has arrived whole, or not at all."
    )


def named_errors(alias: str) -> AbstractContextManager[None]:
    """Raise what redis-py raises as a StorageError that tells what to do."""
    return translated(partial(_named, alias))


def _named(alias: str, exc: Exception) -> Exception:
    from redis.exceptions import (
        AuthenticationError,
        RedisClusterException,
        RedisError,
        ResponseError,
    )

    if not isinstance(exc, RedisError | RedisClusterException | OSError):
        return exc
    text = str(exc)
    # "UNBLOCKED …", or with an older server "ERR Error running script: UNBLOCKED …".
    words = text.replace(":", " ").split()
    if "LEASELOST" in words:
        return LeaseLost()
    if isinstance(exc, AuthenticationError):
        words = ["WRONGPASS"]
    elif "ACL failure in script" in text:
        words = ["NOPERM"]
    otherwise: Advice = (
        StoreUnavailable,
        f"it doesn't answer ({type(exc).__name__}). Check that it runs and can be "
        "reached; a write has arrived whole, or not at all.",
    )
    if isinstance(exc, ResponseError):
        otherwise = StorageError, f"it refused the operation ({_told(exc)})."
    kind, advice = find_advice([*words, *class_names(exc)], _ADVICE, otherwise)
    advice = advice.replace("{what}", _refused(text))
    return kind(f"Redis of {alias!r} could not be used: {advice}")


def _refused(text: str) -> str:
    """Return what an ACL refuses, by the server's words, which name commands alone."""
    found = re.search(r"'([A-Za-z|]{1,40})' (?:command|subcommand)", text)
    if found is not None:
        return f"the command {found[1].upper()}"
    return "a key" if "key" in text else "the operation"


def _told(exc: Exception) -> str:
    """Return the server's error code, the first word; the others may quote contents."""
    code = str(exc).partition(" ")[0]
    known = code.isascii() and code.isalpha() and code.isupper() and len(code) <= 16
    return f"{type(exc).__name__}, {code}" if known else type(exc).__name__
