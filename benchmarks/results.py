"""What was measured, and ratios between stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

# Workload, store, one value a round.
Values = dict[str, dict[str, list[float]]]


@dataclass
class Results:
    """The values of one database's workloads, in seconds unless the name tells."""

    database: str
    reference: str
    stores: dict[str, str] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    # Workloads of which more is better.
    rates: list[str] = field(default_factory=list)

    def add(self, workload: str, store: str, value: float) -> None:
        """Keep a round's value."""
        self.values.setdefault(workload, {}).setdefault(store, []).append(value)

    def rate(self, workload: str, store: str, value: float) -> None:
        """Keep a round's value of which more is better."""
        if workload not in self.rates:
            self.rates.append(workload)
        self.add(workload, store, value)

    def middle(self, workload: str, store: str) -> float | None:
        """Return the median of the rounds."""
        found = self.values.get(workload, {}).get(store)
        return median(found) if found else None

    def best(self, workload: str, store: str) -> float | None:
        """Return the best round, which a busy machine disturbs least."""
        found = self.values.get(workload, {}).get(store)
        if not found:
            return None
        return max(found) if workload in self.rates else min(found)

    def ratio(self, workload: str, store: str, other: str) -> float | None:
        """Return the median over the rounds of one divided by the other's."""
        values = self.values.get(workload, {})
        pairs = zip(values.get(store, []), values.get(other, []), strict=False)
        ratios = [mine / theirs for mine, theirs in pairs if theirs]
        return median(ratios) if ratios else None

    def best_ratio(self, workload: str, store: str, other: str) -> float | None:
        """Return the ratio of the best rounds."""
        mine, theirs = self.best(workload, store), self.best(workload, other)
        return None if mine is None or not theirs else mine / theirs
