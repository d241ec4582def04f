"""What is promised, and whether it was reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.plans import LIMIT, Plan
from benchmarks.results import Results
from benchmarks.stores import OURS
from benchmarks.workloads import at, pops_of, together

_ALCHEMY = "SQLAlchemySession, asyncpg"

# Gives a figure of the medians and one of the best rounds.
_Measure = Callable[[Results], tuple[float | None, float | None]]


@dataclass(frozen=True)
class Bar:
    """A figure that has to be at most, or at least, so much."""

    name: str
    limit: float
    measure: _Measure
    at_least: bool = False
    unit: str = "x"

    @property
    def wanted(self) -> str:
        """Return what is promised."""
        return f"{'≥' if self.at_least else '≤'} {self.shown(self.limit)}"

    def shown(self, value: float | None) -> str:
        """Write a figure with its unit."""
        return "" if value is None else f"{value:.2f} {self.unit}"

    def reached(self, value: float | None) -> bool:
        """Return whether a figure is good enough."""
        if value is None:
            return False
        return value >= self.limit if self.at_least else value <= self.limit


def _against(workload: str, other: str) -> _Measure:
    return lambda results: (
        results.ratio(workload, OURS, other),
        results.best_ratio(workload, OURS, other),
    )


def _grown(workload: str, base: str) -> _Measure:
    """Compare one of our workloads with another of ours."""

    def measure(results: Results) -> tuple[float | None, float | None]:
        pairs = [
            (find(workload, OURS), find(base, OURS))
            for find in (results.middle, results.best)
        ]
        middle, best = (
            None if mine is None or not theirs else mine / theirs
            for mine, theirs in pairs
        )
        return middle, best

    return measure


def _seconds(workload: str, factor: float = 1) -> _Measure:
    def measure(results: Results) -> tuple[float | None, float | None]:
        middle, best = results.middle(workload, OURS), results.best(workload, OURS)
        return (
            None if middle is None else middle * factor,
            None if best is None else best * factor,
        )

    return measure


def bars(results: Results, plan: Plan) -> list[Bar]:
    """Return what is promised of a database."""
    own = _postgresql(plan) if results.reference == _ALCHEMY else _sqlite(results, plan)
    short, long = min(plan.lengths), plan.long
    return [
        *own,
        Bar(f"{at(long)}, to {short:,}", 1.3, _grown(at(long), at(short))),
        Bar(
            f"fork of {long:,} items",
            10,
            _seconds(f"fork of {long:,} items", 1_000),
            unit="ms",
        ),
        *(
            Bar(
                f"read of {count:,} items, {plan.forks} forks deep, to unforked",
                1.5,
                _grown(
                    f"read of {count:,} items, {plan.forks} forks deep",
                    f"read of {count:,} items, 0 forks deep",
                ),
            )
            for count in (LIMIT, plan.read)
        ),
        Bar(
            f"clear of {long:,} items",
            1,
            _seconds(f"clear of {long:,} items"),
            unit="s",
        ),
        Bar(
            f"memory of {LIMIT} of {long:,} items, to {plan.few}",
            1.1,
            _grown(
                f"bytes to read {LIMIT} of {long:,} items",
                f"bytes to read {LIMIT} of {plan.few:,} items",
            ),
        ),
    ]


def _postgresql(plan: Plan) -> list[Bar]:
    read, imported = (
        f"read of {plan.read:,} items",
        f"import of {plan.imported:,} items",
    )
    popped = pops_of(plan.popped)
    return [
        *(
            Bar(f"{at(length)}, to {other}", limit, _against(at(length), other))
            for length in plan.lengths
            for other, limit in ((_ALCHEMY, 0.42), ("asyncpg alone", 1.6))
        ),
        *(
            Bar(
                f"{together(count, slow=slow)}, to {_ALCHEMY}",
                2.6,
                _against(together(count, slow=slow), _ALCHEMY),
                at_least=True,
            )
            for slow in (False, True)
            for count in plan.together
        ),
        Bar(f"{read}, to {_ALCHEMY}", 0.9, _against(read, _ALCHEMY)),
        Bar(f"{imported}, to {_ALCHEMY}", 0.8, _against(imported, _ALCHEMY)),
        Bar(f"{popped}, to {_ALCHEMY}", 0.9, _against(popped, _ALCHEMY), at_least=True),
    ]


def _sqlite(results: Results, plan: Plan) -> list[Bar]:
    others = [
        store
        for store in results.stores
        if not store.startswith(OURS) and not store.endswith("alone")
    ]
    return [
        *(
            Bar(
                f"{at(length)}, to {results.reference}",
                0.9,
                _against(at(length), results.reference),
            )
            for length in plan.lengths
        ),
        *(
            Bar(
                f"{together(count, slow=False)}, to {other}",
                1.15 if other == results.reference else 1.5,
                _against(together(count, slow=False), other),
                at_least=True,
            )
            for count in plan.together
            for other in others
        ),
    ]
