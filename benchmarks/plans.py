"""How much is measured: sizes and rounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes in items, and how often each thing is done."""

    lengths: tuple[int, ...] = (10, 1_000, 100_000)
    rounds: int = 24
    # Turns that a round times, unless they take longer than `block` seconds.
    turns: int = 20
    block: float = 0.4
    together: tuple[int, ...] = (16, 64)
    # Turns that each of them has in a round.
    turns_together: int = 2
    rounds_together: int = 5
    read: int = 1_000
    popped: int = 200
    imported: int = 10_000
    imports: int = 7
    clears: int = 3
    forks: int = 5
    # What a fork adds, so that a window of LIMIT reaches over several of them.
    grown: int = 20
    few: int = 100

    @property
    def long(self) -> int:
        """The longest history."""
        return max(self.lengths)


PLANS = {
    "full": Plan(),
    "quick": Plan(
        lengths=(10, 1_000, 10_000),
        rounds=4,
        turns=10,
        rounds_together=2,
        imported=2_000,
        imports=2,
        clears=2,
    ),
    # Tries that everything works; its figures say nothing.
    "tiny": Plan(
        lengths=(10, 60),
        rounds=1,
        turns=1,
        together=(3,),
        turns_together=1,
        rounds_together=1,
        read=20,
        popped=5,
        imported=50,
        imports=1,
        clears=1,
        forks=2,
        grown=4,
        few=10,
    ),
}

LIMIT = 50
