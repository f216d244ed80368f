"""The proof that every committed byte has the outcome that is recorded for it, from the log itself.

Holds EVERY_BYTE_HAS_AN_OUTCOME (tests/test_verify.py::test_one_flipped_byte_is_named): the ranges of a generation tile
[0, committed_offset), each has the hash of its bytes and as many lines as it counts, and every fact, dead letter and
conflict in it stands at one whole line. Reads only, in bounded memory, up to the offset that was committed when it
began, so that the daemon may go on meanwhile.

A line has the outcome with which it was read. A dead letter stays one in the counts of its range, whatever became of it
later: a fact at the place of a dead letter was made by `dead-letters retry`, and is not counted twice.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from operator import add
from typing import TYPE_CHECKING

from billing_tailer.files import LogStream
from billing_tailer.ledger import Generation, PlacedRows, Proofs, Tile
from billing_tailer.model import FRONTIER_BYTES_MAX, Outcome, Position, SeenFile

if TYPE_CHECKING:
    from hashlib import _Hash

WINDOW_BYTES = 4 << 20
WINDOW_LINES = 20_000
"""Bounds of what is held in memory at once, but for one line, which is never held."""
LINES_MAX = 2 * WINDOW_LINES
"""Where a window has more lines than this, other bytes were committed, and only the lines that rows name are held."""
DIFFERENCES_MAX = 100
"""Most differences of one generation that are named; the others are counted."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A byte range [start_offset, end_offset) of a generation that is not as recorded. what: in words."""

    file_id: int
    path: str
    start_offset: int
    end_offset: int
    what: str


@dataclass(slots=True)
class Checked:
    """What was found of one generation. found_at: its file today, None: not on disk, so that only the tiling was
    checked. is_whole: the file ends at the committed offset."""

    position: Position
    found_at: str | None = None
    bytes_read: int = 0
    ranges: int = 0
    gaps: int = 0
    facts: int = 0
    dead_letters: int = 0
    conflicts: int = 0
    is_whole: bool = False
    differences: list[Difference] = field(default_factory=list)
    more_differences: int = 0

    def differ(self, start: int, end: int, what: str) -> None:
        """Note a difference."""
        if len(self.differences) == DIFFERENCES_MAX:
            self.more_differences += 1
            return
        place = self.found_at or self.position.path
        self.differences.append(Difference(self.position.file_id, place, start, end, what))


@dataclass(slots=True)
class _Open:
    """A committed range that is being read."""

    tile: Tile
    hasher: "_Hash" = field(default_factory=hashlib.sha256)
    lines: int = 0
    last_byte: int = 0
    facts: int = 0
    retried: int = 0
    letters: int = 0
    conflicts: int = 0
    retried_conflicts: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one range, small enough to be held in memory."""

    tile: Tile
    start: int
    end: int


Progress = Callable[[int], None]
"""Told how many bytes of the log were read since it was told before."""


def verify(
    generation: Generation, file: SeenFile | None, ledger: Proofs, progress: Progress = lambda _: None
) -> Checked:
    """Check one generation, against its file where there is one. Raises LedgerUnavailable."""
    result = Checked(generation.position, None if file is None else file.path)
    _check_beyond(generation, result)
    tiles = _contiguous(ledger.tiles(generation), result)
    if file is None:
        for _ in tiles:
            pass
        return result
    reading = _Reading(generation, result, ledger, progress)
    try:
        with LogStream(file.path) as stream:
            reading.run(stream, tiles)
    except OSError as error:
        at = generation.position.committed_offset
        result.differ(min(reading.at, at), at, f"cannot be read from here on: {error.strerror}")
    return result


def _check_beyond(generation: Generation, result: Checked) -> None:
    at = generation.position.committed_offset
    if generation.batch_beyond is not None:
        result.differ(at, at, f"the range from byte {generation.batch_beyond} ends behind the committed offset")
    if generation.fact_beyond is not None and generation.rewound_to is None:
        result.differ(at, at, f"a fact at byte {generation.fact_beyond}, behind the committed offset")


def _contiguous(tiles: Iterable[Tile], result: Checked) -> Iterator[Tile]:
    """The tiles, looked at whether they cover [0, committed_offset) once; what lies beyond a hole is still read."""
    at, committed = 0, result.position.committed_offset
    for tile in tiles:
        end = tile.end_offset if tile.end_offset is not None and tile.end_offset <= committed else committed
        if tile.start_offset > at:
            result.differ(at, tile.start_offset, "neither a range nor a gap covers these bytes")
        elif tile.start_offset < at:
            result.differ(tile.start_offset, min(at, end), "two ranges or gaps cover these bytes")
        if tile.end_offset != end:
            result.differ(tile.start_offset, end, "a range or gap that does not end at the committed offset or before")
        result.gaps, result.ranges = result.gaps + (tile.sha256 is None), result.ranges + (tile.sha256 is not None)
        if tile.start_offset >= at:  # bytes are read once, forward
            yield Tile(tile.start_offset, end, tile.sha256, tile.counts)
        at = max(at, end)
    if at != committed:
        result.differ(at, committed, "neither a range nor a gap covers these bytes")


class _Reading:
    """One pass through the bytes of a generation."""

    def __init__(self, generation: Generation, result: Checked, ledger: Proofs, progress: Progress) -> None:
        self._generation = generation
        self._position = generation.position
        self._result = result
        self._ledger = ledger
        self._progress = progress
        self._open: _Open | None = None
        self._line_start = 0
        self._unfinished: hashlib._Hash = hashlib.sha256()
        self._waiting = _Rows()
        self._head = b""
        self._tail = b""
        self.at = 0

    def run(self, stream: LogStream, tiles: Iterable[Tile]) -> None:
        """Read to the committed offset, or as far as the file goes."""
        for group in _groups(tiles):
            if not isinstance(group, list):
                self._pass_gap(stream, group)
            elif not self._take(stream, group):
                self._result.differ(self.at, self._position.committed_offset, f"the file ends at byte {self.at}")
                return
        self._end_line()
        self._close()
        self._check_identity()
        self._result.is_whole = not stream.read(1)

    def _pass_gap(self, stream: LogStream, gap: Tile) -> None:
        """Bytes that were not read; nothing stands in them, unless it was read before an operator moved the offset."""
        self._end_line()
        self._close()
        assert gap.end_offset is not None
        if self._generation.rewound_to is None:
            rows = self._ledger.placed(self._position.file_id, gap.start_offset, gap.start_offset + WINDOW_BYTES)
            if rows.fact_starts and rows.fact_starts[0] < gap.end_offset:
                self._result.differ(gap.start_offset, gap.end_offset, "a fact inside of a gap")
        for start in range(gap.start_offset, gap.end_offset, WINDOW_BYTES):
            # head and frontier may lie in a gap, as with START_AT=end
            near = start < len(self._position.head) or start + WINDOW_BYTES + FRONTIER_BYTES_MAX > gap.end_offset
            end = min(start + WINDOW_BYTES, gap.end_offset)
            if near:
                self._remember(stream.read(end - start))
            stream.skip_to(end)
        self.at = self._line_start = gap.end_offset

    def _take(self, stream: LogStream, pieces: Sequence[_Piece]) -> bool:
        """The bytes of some pieces that follow each other; False where the file ends within them."""
        start, end = pieces[0].start, pieces[-1].end
        if start != self.at:  # behind a hole
            self._end_line()
            stream.skip_to(start)
            self.at = self._line_start = start
        data = stream.read(end - start)
        self._progress(len(data))
        self._result.bytes_read += len(data)
        if len(data) < end - start:
            self.at += len(data)
            return False
        self._remember(data)
        placed = self._ledger.placed(self._position.file_id, start, end)
        for piece in pieces:
            self._count(piece, memoryview(data)[piece.start - start : piece.end - start], placed)
        rows = self._waiting + _Rows.of(placed)
        many = data.count(b"\n") > LINES_MAX
        lines = self._named_lines(data, rows) if many else self._lines(data)
        rows, self._waiting = rows.split(self._line_start)
        self._check_rows(rows, lines)
        self._check_hashes(rows, lines, data)
        self.at = end
        return True

    def _remember(self, data: bytes) -> None:
        if len(self._head) < len(self._position.head):
            self._head += data[: len(self._position.head) - len(self._head)]
        self._tail = (self._tail + data[-FRONTIER_BYTES_MAX:])[-FRONTIER_BYTES_MAX:]

    # --- lines

    def _lines(self, data: bytes) -> dict[int, int]:
        """Where each line that ends in these bytes starts and ends."""
        lengths = list(map(len, data.split(b"\n")))
        lengths.pop()
        ends = list(map(add, accumulate(lengths), count(self.at + 1)))
        if not ends:
            return {}
        lines = dict(zip([self._line_start, *ends[:-1]], ends, strict=True))
        self._line_start = ends[-1]
        return lines

    def _named_lines(self, data: bytes, rows: "_Rows") -> dict[int, int]:
        """As `_lines`, but only the first one and those at whose beginning a row stands."""
        lines: dict[int, int] = {}
        named = {*rows.fact_starts, *(row[0] for row in rows.letters), *(row[0] for row in rows.conflicts)}
        for start in (self._line_start, *sorted(named - {self._line_start})):
            at = max(0, start - self.at)
            if start == self._line_start or data[at - 1 : at] == b"\n":
                end = data.find(b"\n", at) + 1
                if end:
                    lines[start] = self.at + end
        self._line_start = self.at + data.rfind(b"\n") + 1
        return lines

    def _end_line(self) -> None:
        """What has no newline before the end or a gap: a line that will never be ended."""
        if self._line_start < self.at:
            self._check_rows(self._waiting, {self._line_start: self.at})
            self._check_letters(self._waiting, {self._line_start: self._unfinished.digest()})
        self._waiting, self._unfinished = _Rows(), hashlib.sha256()

    def _check_rows(self, rows: "_Rows", lines: dict[int, int]) -> None:
        """Facts, dead letters and conflicts stand at one whole line each."""
        self._result.facts += len(rows.fact_starts)
        self._result.dead_letters += len(rows.letters)
        self._result.conflicts += len(rows.conflicts)
        if list(map(lines.get, rows.fact_starts)) != rows.fact_ends:
            for start, end in zip(rows.fact_starts, rows.fact_ends, strict=True):
                if lines.get(start) != end:
                    self._result.differ(start, end, "a fact where no line is")
        for start, end, _ in rows.letters:
            if lines.get(start) != end:
                self._result.differ(start, end, "a dead letter where no line is")
        for start, end in rows.conflicts:
            if lines.get(start) != end:
                self._result.differ(start, end, "a conflict where no line is")

    def _check_hashes(self, rows: "_Rows", lines: dict[int, int], data: bytes) -> None:
        """The lines whose own hash is recorded: dead letters, with the newline, and facts without a request id."""
        if not lines:
            self._unfinished.update(data)
            return
        first, first_end = next(iter(lines.items()))
        self._unfinished.update(data[: first_end - self.at - 1])  # it may have begun in the bytes before
        facts = {first: self._unfinished.digest()}
        self._unfinished.update(b"\n")
        letters = {first: self._unfinished.digest()}
        for start in rows.hashes.keys() & lines.keys() - {first}:
            facts[start] = hashlib.sha256(data[start - self.at : lines[start] - self.at - 1]).digest()
        for start, end, _ in rows.letters:
            if start != first and lines.get(start) == end:
                letters[start] = hashlib.sha256(data[start - self.at : end - self.at]).digest()
        self._check_letters(rows, letters)
        for start, digest in rows.hashes.items():
            if start in facts and facts[start] != digest:
                self._result.differ(start, lines[start], "a fact with another hash than this line")
        self._unfinished = hashlib.sha256(data[self._line_start - self.at :])

    def _check_letters(self, rows: "_Rows", digests: dict[int, bytes]) -> None:
        for start, end, digest in rows.letters:
            if start in digests and digests[start] != digest:
                self._result.differ(start, end, "a dead letter with another hash than these bytes")

    # --- ranges

    def _count(self, piece: _Piece, part: memoryview, placed: PlacedRows) -> None:
        if self._open is not None and self._open.tile is not piece.tile:
            self._close()
        if self._open is None:
            self._open = _Open(piece.tile)
        one = self._open
        one.hasher.update(part)
        one.lines += bytes(part).count(b"\n")
        one.last_byte = part[-1]
        letters = {start for start, *_ in placed.letters if piece.start <= start < piece.end}
        facts = bisect_left(placed.fact_starts, piece.end) - bisect_left(placed.fact_starts, piece.start)
        retried = sum(_contains(placed.fact_starts, start) for start in letters)
        one.facts += facts - retried
        one.retried += retried
        one.letters += len(letters)
        conflicts = [start for start, _ in placed.conflicts if piece.start <= start < piece.end]
        one.retried_conflicts += len(letters.intersection(conflicts))
        one.conflicts += len(conflicts) - len(letters.intersection(conflicts))

    def _close(self) -> None:
        """Compare a range that was read to its end with its row."""
        one, self._open = self._open, None
        if one is None:
            return
        start, end, counts = one.tile.start_offset, one.tile.end_offset, one.tile.counts
        assert end is not None
        assert counts is not None
        if one.hasher.digest() != one.tile.sha256:
            self._result.differ(start, end, "other bytes than were committed: the hash differs")
        lines = one.lines + (one.last_byte != ord("\n"))
        if sum(counts.values()) != lines:
            self._result.differ(start, end, f"{sum(counts.values())} lines are counted, {lines} are there")
        # what is read again after a rewind is counted as what it is then; its rows are those of the first time
        rewound = self._generation.rewound_to is not None and end > self._generation.rewound_to
        for outcome, rows in (
            (Outcome.FACT, one.facts + (one.retried if rewound else 0)),
            (Outcome.DEAD_LETTER, one.letters),
            (Outcome.CONFLICT, one.conflicts + (one.retried_conflicts if rewound else 0)),
        ):
            counted = counts.get(outcome, 0)
            if not counted <= rows <= (lines if rewound else counted):
                self._result.differ(start, end, f"{counted} lines are counted as {outcome}, {rows} rows are there")

    def _check_identity(self) -> None:
        position = self._position
        if self._head != position.head:
            self._result.differ(0, len(position.head), "another beginning than the recorded head")
        frontier = self._tail[len(self._tail) - position.frontier_bytes :]
        if hashlib.sha256(frontier).digest() != position.frontier_sha256:
            start = position.committed_offset - position.frontier_bytes
            self._result.differ(start, position.committed_offset, "another end than the recorded frontier")


@dataclass(slots=True)
class _Rows:
    """Rows of some lines, ordered by place. Those of a line that has not ended yet wait for its end."""

    fact_starts: list[int] = field(default_factory=list)
    fact_ends: list[int] = field(default_factory=list)
    hashes: dict[int, bytes] = field(default_factory=dict)
    letters: list[tuple[int, int, bytes]] = field(default_factory=list)
    conflicts: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, placed: PlacedRows) -> "_Rows":
        """As they were read."""
        facts = list(placed.fact_starts), list(placed.fact_ends)
        return cls(*facts, dict(placed.hashes), placed.letters, placed.conflicts)

    def __add__(self, later: "_Rows") -> "_Rows":
        return _Rows(
            self.fact_starts + later.fact_starts,
            self.fact_ends + later.fact_ends,
            self.hashes | later.hashes,
            self.letters + later.letters,
            self.conflicts + later.conflicts,
        )

    def split(self, offset: int) -> "tuple[_Rows, _Rows]":
        """Rows of lines that begin before an offset, and the others."""
        cut = bisect_left(self.fact_starts, offset)
        letters = bisect_left(self.letters, offset, key=lambda row: row[0])
        conflicts = bisect_left(self.conflicts, offset, key=lambda row: row[0])
        return (
            _Rows(
                self.fact_starts[:cut],
                self.fact_ends[:cut],
                {start: digest for start, digest in self.hashes.items() if start < offset},
                self.letters[:letters],
                self.conflicts[:conflicts],
            ),
            _Rows(
                self.fact_starts[cut:],
                self.fact_ends[cut:],
                {start: digest for start, digest in self.hashes.items() if start >= offset},
                self.letters[letters:],
                self.conflicts[conflicts:],
            ),
        )


def _contains(ordered: Sequence[int], value: int) -> bool:
    at = bisect_left(ordered, value)
    return at < len(ordered) and ordered[at] == value


def _groups(tiles: Iterable[Tile]) -> Iterator[list[_Piece] | Tile]:
    """Gaps, and between them as many pieces of ranges at once as may be held in memory."""
    group: list[_Piece] = []
    lines_held = 0.0
    for tile in tiles:
        pieces = _pieces(tile) if tile.counts is not None else []
        for piece, lines in pieces:
            full = bool(group) and (
                piece.end - group[0].start > WINDOW_BYTES
                or lines_held + lines > WINDOW_LINES
                or piece.start != group[-1].end
            )
            if full:
                yield group
                group, lines_held = [], 0.0
            group.append(piece)
            lines_held += lines
        if tile.counts is None:
            if group:
                yield group
                group, lines_held = [], 0.0
            yield tile
    if group:
        yield group


def _pieces(tile: Tile) -> Iterator[tuple[_Piece, float]]:
    """A range in pieces, each with its share of the lines that the range counts."""
    assert tile.end_offset is not None
    assert tile.counts is not None
    length, lines = tile.end_offset - tile.start_offset, sum(tile.counts.values())
    step = min(WINDOW_BYTES, max(1, length * WINDOW_LINES // max(1, lines)))
    for start in range(tile.start_offset, tile.end_offset, step):
        end = min(start + step, tile.end_offset)
        yield _Piece(tile, start, end), lines * (end - start) / length
