"""The one table: scenario, runs, lost, doubled, undeclared. All zeros, or the exit code is 1."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PROBLEMS_SHOWN_MAX = 5


@dataclass
class Tally:
    """What a scenario came to. lost: lines and receipts that are missing. doubled: lines, receipts or credits that are
    there more often than they should. undeclared: destroyed or refused bytes that no gap, dead letter or state tells.
    problems: whatever else was not as it must be, in words, each with what it takes to see it again."""

    scenario: str
    runs: int = 0
    lost: int = 0
    doubled: int = 0
    undeclared: int = 0
    problems: list[str] = field(default_factory=list)
    note: str = ""
    peak_rss_mb: float | None = None

    @property
    def clean(self) -> bool:
        """Nothing lost, doubled, undeclared or otherwise wrong."""
        return not (self.lost or self.doubled or self.undeclared or self.problems)

    def add(self, other: "Tally") -> None:
        """Take in another run of the same scenario."""
        self.runs += other.runs
        self.lost += other.lost
        self.doubled += other.doubled
        self.undeclared += other.undeclared
        self.problems += other.problems


TALLIES: list[Tally] = []
"""Of this pytest session, for the summary at its end."""


def table(tallies: Sequence[Tally]) -> str:
    """The table as text, with the problems below it."""
    header = ("scenario", "runs", "lost", "doubled", "undeclared", "peak RSS MB", "")
    rows = [header, *(_row(tally) for tally in tallies)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, len(header) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *_problems(tallies)])


def _row(tally: Tally) -> tuple[str, ...]:
    peak = "" if tally.peak_rss_mb is None else f"{tally.peak_rss_mb:.0f}"
    counts = (tally.runs, tally.lost, tally.doubled, tally.undeclared)
    note = tally.note if tally.clean else f"FAILED {tally.note}".strip()
    return (tally.scenario, *map(str, counts), peak, note)


def _problems(tallies: Iterable[Tally]) -> list[str]:
    lines = []
    for tally in tallies:
        lines += [f"{tally.scenario}: {problem}" for problem in tally.problems[:PROBLEMS_SHOWN_MAX]]
        if len(tally.problems) > PROBLEMS_SHOWN_MAX:
            lines.append(f"{tally.scenario}: and {len(tally.problems) - PROBLEMS_SHOWN_MAX} more")
    return lines
