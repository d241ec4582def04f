"""The audit of a storm tells each fault from what may happen."""

from __future__ import annotations

import pytest

from agent_sessions.exceptions import StoreUnavailable, UnknownEncryptionKey
from tests.support.ledger import APPEND, CLEAR, POP, READ, Call, Ledger, violations


def append(began: int, ended: int, *names: str, error: str = "") -> Call:
    return Call(APPEND, began, list(names), ended, error=error)


def pop(began: int, ended: int, *names: str, error: str = "") -> Call:
    return Call(POP, began, list(names), ended, error=error)


def clear(began: int, ended: int, count: int, error: str = "") -> Call:
    return Call(CLEAR, began, [], ended, count, error=error)


def read(began: int, ended: int, *names: str, is_limited: bool = False) -> Call:
    return Call(READ, began, list(names), ended, is_limited=is_limited)


A, B = append(0, 1, "a1", "a2"), append(2, 3, "b1", "b2")

POSSIBLE = {
    "all is there": ([A, B], ["a1", "a2", "b1", "b2"]),
    "appends at the same time": (
        [append(0, 3, "a"), append(1, 2, "b")],
        ["b", "a"],
    ),
    "what failed is there": ([append(0, 1, "a", error="cut")], ["a"]),
    "what failed isn't there": ([append(0, 1, "a", error="cut")], []),
    "the newest was popped": ([A, B, pop(4, 5, "b2")], ["a1", "a2", "b1"]),
    "a failed pop took one": ([A, pop(2, 3, error="cut")], ["a1"]),
    "a failed pop took none": ([A, pop(2, 3, error="cut")], ["a1", "a2"]),
    "cleared": ([A, clear(4, 5, 2), append(6, 7, "c")], ["c"]),
    "cleared at the same time": ([append(0, 2, "a"), clear(1, 3, 0)], ["a"]),
    "a failed clear": ([A, clear(4, 5, 0, error="cut")], []),
    "a failed clear took what a later one doesn't count": (
        [A, clear(4, 5, 0, error="cut"), clear(6, 7, 0)],
        [],
    ),
    "a failed pop took what a clear doesn't count": (
        [A, pop(4, 5, error="cut"), clear(6, 7, 1)],
        [],
    ),
    "a clear takes along what a pop took": ([A, pop(3, 6), clear(4, 5, 1)], []),
    "none is found after a clear": ([A, clear(4, 5, 2), pop(6, 7)], []),
    "none is found before an append": ([pop(0, 2), append(1, 3, "a")], ["a"]),
    "a limited read": (
        [A, B, read(4, 5, "a2", "b1", "b2", is_limited=True)],
        ["a1", "a2", "b1", "b2"],
    ),
}

IMPOSSIBLE = {
    "lost": ([A], ["a1"], "a2: lost"),
    "two lost by one failed pop": ([A, pop(2, 3, error="cut")], [], "a1: lost"),
    "lost after a failed pop": ([pop(0, 1, error="cut"), B], ["b1"], "b2: lost"),
    "lost after a clear": ([clear(0, 1, 0), B], ["b1"], "b2: lost"),
    "popped twice": (
        [A, pop(2, 3, "a2"), pop(2, 3, "a2")],
        ["a1"],
        "a2: popped 2 times",
    ),
    "there twice": ([A], ["a1", "a2", "a1", "a2"], "a1: read 2 times at once"),
    "popped and there": (
        [A, pop(2, 3, "a2")],
        ["a1", "a2"],
        "a2: popped, then known to a read",
    ),
    "read after it was popped": (
        [A, pop(2, 3, "a2"), read(4, 5, "a1", "a2")],
        ["a1"],
        "a2: popped, then known to a read",
    ),
    "read after it was cleared": (
        [A, clear(2, 3, 2)],
        ["a1", "a2"],
        "a1: cleared, then known to a read",
    ),
    "popped after it was cleared": (
        [A, clear(2, 3, 2), pop(4, 5, "a2")],
        [],
        "a2: cleared, then known to a pop",
    ),
    "never appended": ([A], ["a1", "a2", "x"], "x: known to a read before"),
    "read before its append": (
        [read(0, 1, "b1"), B],
        ["b1", "b2"],
        "b1: known to a read before",
    ),
    "batches in the wrong order": (
        [A, B],
        ["b1", "b2", "a1", "a2"],
        "after items that were appended later",
    ),
    "a batch in the wrong order": ([A], ["a2", "a1"], "in another order"),
    "a batch without its first": (
        [A, pop(2, 3, error="cut")],
        ["a2"],
        "without the items before them",
    ),
    "a batch apart": (
        [append(0, 3, "a1", "a2"), append(1, 2, "b")],
        ["a1", "b", "a2"],
        "apart from the rest of their batch",
    ),
    "an older one was popped": (
        [A, B, pop(4, 5, "a2")],
        ["a1", "b1", "b2"],
        "passed over by a pop of ['a2']",
    ),
    "none was found": ([A, pop(2, 3)], ["a1", "a2"], "passed over by a pop of []"),
    "a clear counts too few": ([A, clear(4, 5, 1)], [], "removed 1, not 2 to 2"),
    "a clear counts too few before a pop": (
        [A, clear(4, 5, 1), pop(6, 7)],
        [],
        "removed 1, not 2 to 2",
    ),
    "a clear counts too many": ([A, clear(4, 5, 3)], [], "removed 3, not 2 to 2"),
    "two clears count the same": (
        [A, clear(4, 5, 2), clear(6, 7, 2)],
        [],
        "removed 2, not 0 to 0",
    ),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_may_happen(name: str) -> None:
    """No violation is told."""
    assert violations(*POSSIBLE[name]) == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_must_not_happen(name: str) -> None:
    """The violation is told."""
    calls, rest, told = IMPOSSIBLE[name]
    assert told in "\n".join(violations(calls, rest))


def test_a_ledger_keeps_failures_and_passes_a_wrong_key_on() -> None:
    """A store that is away leaves a call open; a wrong key is an error of the test."""
    ledger = Ledger()
    with ledger.call(APPEND, ["a"]):
        fail(StoreUnavailable("away"))
    with ledger.call(POP) as call:
        call.is_refused = True
    with pytest.raises(UnknownEncryptionKey), ledger.call(READ):
        fail(UnknownEncryptionKey("s", "x", ["y"]))
    assert [call.error for call in ledger.calls] == ["StoreUnavailable: away", ""]
    figures = ledger.figures([])
    assert (figures["appended"], figures["failed"], figures["refused"]) == (0, 1, 1)


def fail(error: Exception) -> None:
    raise error
