"""What callers of one session were told, and what of that can't be true.

A call that failed may have done its work or not. All else is an order of time: what
ended before something began came first, and calls at the same time came in any order.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, count, groupby

from agent_sessions.exceptions import EncryptionError, StorageError

APPEND, POP, CLEAR, READ = "append", "pop", "clear", "read"


@dataclass
class Call:
    """One call, when it began and ended, and its outcome."""

    kind: str
    began: float
    # Of an append those it was given; of a pop or a read those it returned.
    names: list[str] = field(default_factory=list)
    ended: float = math.inf
    # How many items a clear says that it removed.
    count: int = 0
    # Why it failed, if it did.
    error: str = ""
    # Of a pop: the wrong key was refused, so nothing is told.
    is_refused: bool = False
    # Of a read: older items may have been left out.
    is_limited: bool = False


class Ledger:
    """All calls on one session, from one event loop."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._clock = count()

    @contextmanager
    def call(self, kind: str, names: Sequence[str] = ()) -> Iterator[Call]:
        """Write down what becomes of a call; an error of the store ends here."""
        call = Call(kind, next(self._clock), list(names))
        try:
            yield call
        except EncryptionError:
            raise
        except StorageError as exc:
            call.error = f"{type(exc).__name__}: {exc}"
        call.ended = next(self._clock)
        self.calls.append(call)

    def figures(self, rest: Sequence[str]) -> dict[str, int]:
        """Count what happened."""
        told = [call for call in self.calls if not call.error]
        return {
            "appended": sum(len(c.names) for c in told if c.kind == APPEND),
            "popped": sum(len(c.names) for c in told if c.kind == POP),
            "clears": sum(c.kind == CLEAR for c in told),
            "cleared": sum(c.count for c in told),
            "reads": sum(c.kind == READ for c in told),
            "refused": sum(c.is_refused for c in told),
            "failed": sum(bool(call.error) for call in self.calls),
            "rest": len(rest),
        }


def violations(calls: Sequence[Call], rest: Sequence[str]) -> list[str]:
    """Return what can't be true where `rest` is what is there after all calls."""
    audit = _Audit(calls, rest)
    if found := list(audit.unknown()):
        return found
    found = [*audit.doubled(), *audit.torn(), *audit.reappeared()]
    if not found:
        # These take for granted that each item is where it was seen.
        found = [*audit.passed_over(), *audit.lost(), *audit.miscounted()]
    return found


class _Audit:
    def __init__(self, calls: Sequence[Call], rest: Sequence[str]) -> None:
        self.appended = {
            name: call for call in calls if call.kind == APPEND for name in call.names
        }
        self.pops = [call for call in calls if call.kind == POP]
        self.popped = {name: call for call in self.pops for name in call.names}
        self.clears = sorted(
            (call for call in calls if call.kind == CLEAR), key=lambda call: call.began
        )
        self.reads = [call for call in calls if call.kind == READ and not call.error]
        self.reads.append(Call(READ, math.inf, list(rest)))
        self.seen = self.popped.keys() | set(rest)

    def unknown(self) -> Iterator[str]:
        """Report items that nobody had begun to append."""
        for call in (*self.pops, *self.reads):
            for name in call.names:
                append = self.appended.get(name)
                if append is None or append.began > call.ended:
                    yield f"{name}: known to a {call.kind} before it was appended"

    def doubled(self) -> Iterator[str]:
        """Report items that were popped or are there twice."""
        pops = Counter(name for call in self.pops for name in call.names)
        yield from (f"{name}: popped {n} times" for name, n in pops.items() if n > 1)
        for call in self.reads:
            for name, n in Counter(call.names).items():
                if n > 1:
                    yield f"{name}: read {n} times at once"

    def torn(self) -> Iterator[str]:
        """Report reads with a batch that isn't whole, or in a wrong place."""
        for read in self.reads:
            batches = groupby(read.names, lambda name: self.appended[name].began)
            latest = -1.0
            seen: set[float] = set()
            for began, run in batches:
                names = list(run)
                append = self.appended[names[0]]
                # Pops take a batch's last items; a limit cuts the first batch's first.
                start = append.names.index(names[0])
                if names != append.names[start : start + len(names)]:
                    yield f"{names}: in another order than they were appended"
                if start and (seen or not read.is_limited):
                    yield f"{names}: without the items before them"
                if began in seen:
                    yield f"{names}: apart from the rest of their batch"
                if append.ended < latest:
                    yield f"{names}: after items that were appended later"
                latest = max(latest, append.began)
                seen.add(began)

    def reappeared(self) -> Iterator[str]:
        """Report items that were there after they were popped or cleared."""
        done = [call for call in self.clears if not call.error]
        ends = [call.ended for call in done]
        for call in (*self.pops, *self.reads):
            place = bisect_left(ends, call.began)
            cleared = done[place - 1].began if place else -1
            for name in call.names:
                if self.appended[name].ended < cleared:
                    yield f"{name}: cleared, then known to a {call.kind}"
                pop = self.popped.get(name)
                if pop is not None and pop.ended < call.began:
                    yield f"{name}: popped, then known to a {call.kind}"

    def passed_over(self) -> Iterator[str]:
        """Report pops that left a newer item where it was, or found none at all."""
        stays = [
            (append.began, append.ended, self._gone(name), name)
            for name, append in self.appended.items()
            if name in self.seen and not append.error
        ]
        stays.sort()
        begins = [began for began, *_ in stays]
        for pop in self.pops:
            if pop.error or pop.is_refused:
                continue
            since = self.appended[pop.names[0]].ended if pop.names else -1
            newer = slice(bisect_right(begins, since), bisect_left(begins, pop.began))
            for _, ended, gone, name in stays[newer]:
                if ended < pop.began and gone > pop.ended:
                    yield f"{name}: passed over by a pop of {pop.names}"
                    break

    def _gone(self, name: str) -> float:
        pop = self.popped.get(name)
        return math.inf if pop is None else pop.began

    def lost(self) -> Iterator[str]:
        """Report items that are gone though no call can have removed them."""
        cleared = max((call.ended for call in self.clears), default=-1)
        # The last first: what may have taken it may have taken any earlier one.
        missing = sorted(
            (
                (append.began, name)
                for name, append in self.appended.items()
                if name not in self.seen and not append.error and append.began > cleared
            ),
            reverse=True,
        )
        doubtful = sorted((pop.ended for pop in self.pops if pop.error), reverse=True)
        for number, (began, name) in enumerate(missing):
            if number >= len(doubtful) or doubtful[number] < began:
                yield f"{name}: lost"

    def miscounted(self) -> Iterator[str]:
        """Report clears that removed more or less than there can have been.

        Only one clear runs at a time.
        """
        gone = sorted(
            (append for name, append in self.appended.items() if name not in self.seen),
            key=lambda append: append.began,
        )
        begins = [append.began for append in gone]
        # How far all up to here have ended.
        ends = list(accumulate((append.ended for append in gone), max))
        failed = [pop for pop in self.pops if pop.error]
        # Where a pop is sent again, a clear before takes along what it took.
        mute = [
            pop for pop in self.pops if not (pop.error or pop.names or pop.is_refused)
        ]
        previous = acknowledged = -1.0
        for clear in self.clears:
            if not clear.error:
                # What began later, no clear before can have taken.
                own = slice(
                    bisect_right(begins, previous), bisect_left(begins, clear.began)
                )
                sure = sum(not a.error and a.ended < clear.began for a in gone[own])
                sure -= sum(
                    pop.ended > previous and pop.began < clear.ended for pop in failed
                )
                sure -= sum(
                    pop.ended > clear.began and pop.began < clear.ended for pop in mute
                )
                left = slice(
                    bisect_right(ends, acknowledged), bisect_left(begins, clear.ended)
                )
                most = sum(append.ended > acknowledged for append in gone[left])
                if not sure <= clear.count <= most:
                    yield f"a clear removed {clear.count}, not {sure} to {most}"
                acknowledged = clear.began
            previous = clear.ended
