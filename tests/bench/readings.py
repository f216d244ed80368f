"""What a measurement comes to: readings, each with its rounds and the goal it stands against."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """What the project wants to hold. One of the two is given."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Whether a value keeps to it."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Reading:
    """One number. key: its name in the JSON. value: None where it could not be taken, and `note` says why. rounds: the
    numbers whose median it is."""

    key: str
    what: str
    value: float | None
    unit: str
    rounds: tuple[float, ...] = ()
    note: str = ""
    goal: Goal | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it, with the goal in words and whether it is met (null where there is none, or no value)."""
        met = self.goal.met(self.value) if self.goal is not None and self.value is not None else None
        return {**asdict(self), "goal": None if self.goal is None else str(self.goal), "met": met}


def median(
    key: str, what: str, unit: str, rounds: Sequence[float], *, note: str = "", goal: Goal | None = None
) -> Reading:
    """The median of some rounds."""
    return Reading(key, what, statistics.median(rounds), unit, tuple(rounds), note, goal)


def skipped(key: str, what: str, unit: str, why: str) -> Reading:
    """What could not be measured here, said as loudly as the others."""
    return Reading(key, what, None, unit, note=f"SKIPPED: {why}")


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round: noise that lasts longer than a round is in both."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass(slots=True)
class Delays:
    """Milliseconds, and what is told of them."""

    milliseconds: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """The value that so large a share of them does not exceed."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def delay_readings(
    rounds: Sequence[Delays], key: str, what: str, goals: tuple[Goal | None, Goal | None, Goal | None]
) -> list[Reading]:
    """Median, 99 %, longest, of each the median of the rounds; goals: of these three."""
    note = f"{len(rounds[0].milliseconds)} of them"
    return [
        median(
            f"{key}_{name}_ms", f"{what}, {words}", "ms", [one.quantile(share) for one in rounds], note=note, goal=goal
        )
        for name, words, share, goal in (
            ("p50", "median", 0.5, goals[0]),
            ("p99", "99 %", 0.99, goals[1]),
            ("max", "longest", 1.0, goals[2]),
        )
    ]
