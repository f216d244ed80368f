"""The chart of cost over time by model: where its rectangles stand. Pure; the template writes the SVG.

Heights are whole units of a drawing that is stretched to its place, so that no text is inside: axes and legend are
HTML. Shown to the eye only; the table below it says the same in numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from billing_tailer import pricing
from billing_tailer.activity import Summary
from billing_tailer.ledger import ORIGIN

HEIGHT = 1000
SLOT = 20
BAR = 16
NAMED_MAX = 5
"""So many models have a colour of their own."""
REST = "other models"
STEPS = tuple(map(Decimal, ("1", "1.2", "1.6", "2", "2.4", "3", "4", "5", "6", "8", "10")))
"""Upper edges that halve well."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of a bar. series: the number of its colour."""

    series: int
    x: int
    y: int
    height: int


@dataclass(frozen=True, slots=True)
class Column:
    """A bucket: its parts from the bottom up, and what they cost by series, and together."""

    start: datetime
    x: int
    costs: list[Decimal]
    total: Decimal
    parts: list[Rectangle]


@dataclass(frozen=True, slots=True)
class Chart:
    """top: the cost at the upper edge. names: of the series, with what each costs, the most expensive first."""

    bucket: timedelta
    width: int
    top: Decimal
    names: list[tuple[str, Decimal]]
    columns: list[Column]

    @property
    def ticks(self) -> list[Decimal]:
        """The labels of the axis, from the top down."""
        return [self.top, self.top / 2, Decimal(0)]

    @property
    def labels(self) -> list[datetime]:
        """Times below the chart, evenly spaced."""
        last = len(self.columns) - 1
        return [self.columns[last * step // 4].start for step in range(5)] if last >= 4 else []


def chart(summary: Summary) -> Chart | None:
    """Of a range; None where nothing was charged in it."""
    names = [name for name, _ in summary.models[:NAMED_MAX]]
    several = len(summary.models) > NAMED_MAX
    series = {name: number for number, name in enumerate(names)}
    costs: dict[datetime, list[Decimal]] = {start: [Decimal(0)] * (len(names) + several) for start in _buckets(summary)}
    for bar in summary.bars:
        column = costs[bar.start]
        number = series.get(bar.model, len(names))
        column[number] = pricing.total([column[number], bar.charged.cost_usd])
    totals = {start: pricing.total(parts) for start, parts in costs.items()}
    largest = max(totals.values(), default=Decimal(0))
    if largest <= 0:
        return None
    top = _round_up(largest)
    sums = [pricing.total(parts[number] for parts in costs.values()) for number in range(len(names) + several)]
    labels = [name or "unknown" for name in names] + [REST] * several
    columns = [
        Column(start, index * SLOT, parts, totals[start], list(_stack(index * SLOT, parts, top)))
        for index, (start, parts) in enumerate(costs.items())
    ]
    return Chart(summary.range.bucket, SLOT * len(columns), top, list(zip(labels, sums, strict=True)), columns)


def _buckets(summary: Summary) -> Iterator[datetime]:
    bucket = summary.range.bucket
    start = ORIGIN + (summary.range.start - ORIGIN) // bucket * bucket
    while start < summary.range.end:
        yield start
        start += bucket


def _stack(x: int, costs: Sequence[Decimal], top: Decimal) -> Iterator[Rectangle]:
    below = Decimal(0)
    for number, cost in enumerate(costs):
        if cost <= 0:  # given back: the table says so
            continue
        upper = _scaled(below + cost, top)
        height = max(upper - _scaled(below, top), 1)
        yield Rectangle(number, x, HEIGHT - upper, height)
        below += cost


def _scaled(cost: Decimal, top: Decimal) -> int:
    return min(HEIGHT, int(cost * HEIGHT / top))


def _round_up(cost: Decimal) -> Decimal:
    """To the next of the STEPS times a power of ten."""
    power = Decimal(1).scaleb(cost.adjusted())
    return next(step * power for step in STEPS if cost <= step * power)
