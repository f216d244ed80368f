"""What a scenario must have come to: these facts, dead letters and gaps, no others, and the proof of tests/support."""

from collections.abc import Collection, Mapping
from pathlib import Path

from tests.support.proof import assert_sound, outcomes, rows

Letter = tuple[int, int, int, str]
"""file_id, start_offset, end_offset, reason."""
Gap = tuple[int, int, int | None, str]
"""The same; an end of None is one that nobody knows."""


def assert_exactly(
    dsn: str,
    calls: Collection[int],
    *,
    contents: Mapping[int, bytes],
    letters: Collection[Letter] = (),
    gaps: Collection[Gap] = (),
    **others: int,
) -> None:
    """calls: the numbers of the calls that have a fact. contents: file_id -> the bytes which that generation had, for
    every generation there is. others: lines of any other outcome, such as `replayed=3`."""
    found = [row["call_id"] for row in rows(dsn, "select call_id from usage_facts order by 1")]
    assert found == [f"call-{number:08d}" for number in sorted(calls)]
    expected = {"fact": len(calls), "dead_letter": len(letters), **others}
    assert outcomes(dsn) == {outcome: number for outcome, number in expected.items() if number}
    assert _ranges(dsn, "dead_letters") == sorted(letters)
    assert _ranges(dsn, "log_gaps") == sorted(gaps, key=lambda gap: gap[:2])
    assert {row["file_id"] for row in rows(dsn, "select file_id from tail_files")} == contents.keys()
    assert_sound(dsn, contents)


def _ranges(dsn: str, table: str) -> list[tuple[int, int, int | None, str]]:
    found = rows(dsn, f"select file_id, start_offset, end_offset, reason from {table} order by 1, 2")
    return [(row["file_id"], row["start_offset"], row["end_offset"], row["reason"]) for row in found]


def states(dsn: str) -> list[tuple[str, str, str | None]]:
    """Name, state and the reason of a block of every generation, oldest first."""
    found = rows(dsn, "select path, state, blocked_reason from tail_files order by file_id")
    return [(Path(row["path"]).name, row["state"], row["blocked_reason"]) for row in found]
