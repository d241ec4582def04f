"""Bar charts as the numbers of an SVG: pure functions, the template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 600
HEIGHT = 120
# The part of a bar's place that stays empty.
_GAP = 0.2


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, in the SVG's units as it wants them: with a point, whatever the language.

    `layer` is 0 for the lower part of a stacked bar and 1 for the upper.
    """

    x: str
    y: str
    width: str
    height: str
    layer: int
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A row of bars; `highest` is what the tallest of them stands for."""

    bars: tuple[Bar, ...]
    highest: int


def bar_chart(values: Sequence[tuple[int, ...]], labels: Sequence[str]) -> Chart:
    """Lay bars out, one for each label; several values of one are stacked."""
    highest = max((sum(stack) for stack in values), default=0)
    place = WIDTH / max(len(values), 1)
    bars: list[Bar] = []
    for index, (stack, label) in enumerate(zip(values, labels, strict=True)):
        below = 0
        for layer, value in enumerate(stack):
            below += value
            if value:
                bars.append(
                    Bar(
                        _number(index * place + place * _GAP / 2),
                        _number(HEIGHT - HEIGHT * below / highest),
                        _number(place * (1 - _GAP)),
                        _number(HEIGHT * value / highest),
                        layer,
                        label,
                    )
                )
    return Chart(tuple(bars), highest)


def _number(value: float) -> str:
    return f"{value:.2f}"
