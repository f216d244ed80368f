"""Verified bytes of some files -> one transaction's worth of rows. Pure.

Holds EVERY_BYTE_HAS_AN_OUTCOME for its part: a step covers exactly the bytes of whole lines, and each line adds one to
exactly one count (tests/test_plan.py). Framing: only a newline ends a line, and what has none is not a line yet.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from sys import getsizeof
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from billing_tailer.model import (
    FRONTIER_BYTES_MAX,
    HEAD_BYTES_MAX,
    BatchRow,
    DeadLetter,
    DeadLetterReason,
    FactRow,
    FileStep,
    Gap,
    GapReason,
    Outcome,
    PlacedFact,
    PlacedRecord,
    PlacedSkip,
    Plan,
    Position,
    Rejected,
    Skip,
    SpendRecord,
)
from billing_tailer.rows import placed

if TYPE_CHECKING:
    from hashlib import _Hash

ROW_BYTES_MAX = 1 << 20
"""A row of `tail_batches` grows commit by commit until it covers this much."""
RAW_BYTES_MAX = 64 << 10
"""How much of a dead letter is kept; the rest is known by range and hash."""
RAW_BYTES_MAX_TOO_LONG = 4 << 10
RAW_BYTES_MAX_PER_FILE = 100 << 20
"""Beyond this a file's dead letters keep no bytes, so that a file of nothing but poison cannot fill the database."""

PIECE_BYTES = 64 << 10
"""So much of a chunk is taken apart into lines at a time."""
FACT_HELD_BYTES = 220
LETTER_HELD_BYTES = 400
RECORD_HELD_FACTOR = 2
"""What comes of a line in memory, beside its row or raw bytes; of a record, as a multiple of its line. Measured."""

Parse = Callable[[bytes], FactRow | SpendRecord | Skip | Rejected]
"""A line without its newline -> its outcome."""


@runtime_checkable
class ParseMany(Protocol):
    """A `Parse` that knows common lines without taking each of them apart (`fastlane`)."""

    def __call__(self, line: bytes, /) -> FactRow | SpendRecord | Skip | Rejected: ...
    def common(
        self, text: str, at: int, lines_max: int, line_bytes_max: int, file_id: int, offset: int
    ) -> list[PlacedFact]:
        """The facts of the common lines one behind the other from `at` on, until the first other one. text: a character
        for each byte, whole lines; it begins at `offset` of the file."""
        ...


class Bytes(Protocol):
    """What a verified read returns (`files.Chunk`)."""

    @property
    def context(self) -> bytes: ...
    @property
    def data(self) -> bytes | bytearray: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OpenRow:
    """The row of `tail_batches` that the next step of a file may grow. Known only to the process that wrote it."""

    start_offset: int
    end_offset: int
    hasher: "_Hash"
    counts: Mapping[str, int]


@dataclass(slots=True)
class LongLine:
    """A line beyond the limit: hashed and dropped as it streams by, in bounded memory.

    Scanning starts again from `start_offset` after a restart, since only whole lines are committed.
    """

    start_offset: int
    scanned: int = 0
    raw: bytes = b""
    tail: bytes = b""
    raw_max: int = RAW_BYTES_MAX_TOO_LONG
    hasher: "_Hash" = field(default_factory=hashlib.sha256)

    def feed(self, data: bytes) -> bool:
        """Take the bytes at `start_offset + scanned`, up to a newline; True once the line has ended."""
        end = data.find(b"\n") + 1
        taken = data[:end] if end else data
        self.hasher.update(taken)
        self.scanned += len(taken)
        self.raw += taken[: self.raw_max - len(self.raw)]
        self.tail = (self.tail + taken[-FRONTIER_BYTES_MAX:])[-FRONTIER_BYTES_MAX:]
        return bool(end)


@dataclass(slots=True)
class FileWork:
    """What one file contributes to a plan, and the open row to adopt once the plan is committed."""

    step: FileStep
    facts: list[PlacedFact]
    dead_letters: list[DeadLetter]
    row: OpenRow | None
    records: list[PlacedRecord] = field(default_factory=list)
    skips: list[PlacedSkip] = field(default_factory=list)
    held_bytes: int = 0
    """About what it takes in memory."""


def take_lines(
    position: Position,
    chunk: Bytes,
    row: OpenRow | None,
    parse: Parse,
    *,
    lines_max: int,
    line_bytes_max: int,
    held_bytes_max: int,
) -> FileWork | None:
    """The whole lines at the beginning of a chunk, at most `lines_max`, and only up to one that begins with NUL bytes;
    None where there is none. held_bytes_max: when what comes of them takes as much in memory, there is no further
    one."""
    # one byte is found ten times as fast as two, and hardly any log has a NUL
    hole = chunk.data.find(b"\n\0") if b"\0" in chunk.data else -1
    cut = 0 if chunk.data.startswith(b"\0") else hole + 1 if hole >= 0 else chunk.data.rfind(b"\n") + 1
    if cut == 0:
        return None
    lines = _Lines(position, parse, lines_max, line_bytes_max, held_bytes_max)
    start = 0
    while start < cut and not lines.full:
        # few lines are in memory twice
        stop = chunk.data.rfind(b"\n", start, min(cut, start + PIECE_BYTES)) + 1 or chunk.data.index(b"\n", start) + 1
        lines.take(bytes(memoryview(chunk.data)[start:stop]))
        start = stop
    taken = memoryview(chunk.data)[: lines.end - position.committed_offset]
    grown = _grow(position, row, taken, lines.counts)
    head = position.head + taken[: max(0, HEAD_BYTES_MAX - len(position.head))]
    tail = bytes(taken[-FRONTIER_BYTES_MAX:])
    if len(tail) < FRONTIER_BYTES_MAX:
        tail = (chunk.context + tail)[-FRONTIER_BYTES_MAX:]
    step = _step(
        position,
        grown,
        row,
        head=head,
        tail=tail,
        size=chunk.size,
        kept_bytes=lines.kept_bytes,
        counts=lines.counts,
    )
    return FileWork(step, lines.facts, lines.letters, grown, lines.records, lines.skips, lines.held_bytes)


class _Lines:
    """What the lines behind a position are, in their order. end: where the last one ends, in the file."""

    def __init__(
        self, position: Position, parse: Parse, lines_max: int, line_bytes_max: int, held_bytes_max: int
    ) -> None:
        self._file_id = position.file_id
        self._parse = parse
        self._common = parse.common if isinstance(parse, ParseMany) else None
        self._lines_left = lines_max
        self._line_bytes_max = line_bytes_max
        self._held_bytes_max = held_bytes_max
        self.held_bytes = 0
        self.end = position.committed_offset
        self.kept_bytes = position.dead_letter_bytes
        self.counts: Counter[str] = Counter()
        self.facts: list[PlacedFact] = []
        self.letters: list[DeadLetter] = []
        self.records: list[PlacedRecord] = []
        self.skips: list[PlacedSkip] = []

    @property
    def full(self) -> bool:
        """No further line is to be taken."""
        return self._lines_left <= 0 or self.held_bytes >= self._held_bytes_max

    def take(self, piece: bytes) -> None:
        """The lines of a piece that ends with one, until it is full."""
        offset, at = self.end, 0
        # a character is a byte then
        text = "" if self._common is None else piece.decode("latin-1")
        while at < len(piece) and not self.full:
            if self._common is not None:
                facts = self._common(text, at, self._lines_left, self._line_bytes_max, self._file_id, offset)
                if facts:
                    self.facts += facts
                    self.counts[Outcome.FACT] += len(facts)
                    self.held_bytes += sum([getsizeof(fact.text) for fact in facts]) + FACT_HELD_BYTES * len(facts)
                    self._lines_left -= len(facts)
                    at = facts[-1].end_offset - offset
                    continue
            end = piece.index(b"\n", at) + 1
            self._take_line(piece[at:end], offset + at)
            self._lines_left -= 1
            at = end
        self.end = offset + at

    def _take_line(self, line: bytes, start: int) -> None:
        """line: with its newline."""
        outcome = self._parse(line[:-1]) if len(line) - 1 <= self._line_bytes_max else _too_long(line)
        if type(outcome) is FactRow:
            self.counts[Outcome.FACT] += 1
            self.facts.append(placed(outcome, self._file_id, start, start + len(line)))
            self.held_bytes += getsizeof(self.facts[-1].text) + FACT_HELD_BYTES
        elif type(outcome) is Skip:
            self.counts[outcome.reason] += 1
            if outcome.call_id is not None:
                self.skips.append(PlacedSkip(outcome.call_id, self._file_id, start))
        elif type(outcome) is SpendRecord:
            self.counts[Outcome.SPEND_RECORD] += 1
            self.records.append(PlacedRecord(outcome, self._file_id, start))
            self.held_bytes += RECORD_HELD_FACTOR * len(line)
        elif type(outcome) is Rejected:
            self.counts[Outcome.DEAD_LETTER] += 1
            self.letters.append(_dead_letter(self._file_id, start, line, outcome, self.kept_bytes))
            self.kept_bytes += len(self.letters[-1].raw)
            self.held_bytes += len(self.letters[-1].raw) + LETTER_HELD_BYTES


def take_rest(position: Position, context: bytes, rest: bytes, parse: Parse) -> FileWork:
    """What stands behind the last newline of a file that will not grow any more: one dead letter, whatever it says.

    context: the bytes before, at most FRONTIER_BYTES_MAX.
    """
    line = LongLine(position.committed_offset, tail=context, raw_max=RAW_BYTES_MAX)
    line.feed(rest)
    outcome = parse(rest)
    words = outcome.detail if isinstance(outcome, Rejected) else "a whole line but for its newline: can be retried"
    size = position.committed_offset + len(rest)
    return _take_as_letter(position, line, size, DeadLetterReason.UNTERMINATED, words)


def take_long_line(position: Position, line: LongLine, size: int, *, ended: bool = True) -> FileWork:
    """An over-long line as one dead letter, in a row of its own. ended: with a newline."""
    detail = f"{line.scanned} bytes" if ended else f"{line.scanned} bytes, without a newline at the end of the file"
    return _take_as_letter(position, line, size, DeadLetterReason.TOO_LONG, detail)


def _take_as_letter(position: Position, line: LongLine, size: int, reason: DeadLetterReason, detail: str) -> FileWork:
    raw = line.raw[: _room(position.dead_letter_bytes)]
    end = line.start_offset + line.scanned
    letter = DeadLetter(position.file_id, line.start_offset, end, reason, detail, raw, line.hasher.digest())
    counts = Counter({str(Outcome.DEAD_LETTER): 1})
    row = OpenRow(line.start_offset, end, line.hasher, counts)
    head = position.head + line.raw[: max(0, HEAD_BYTES_MAX - len(position.head))]
    kept_bytes = position.dead_letter_bytes + len(raw)
    step = _step(position, row, None, head=head, tail=line.tail, size=size, kept_bytes=kept_bytes, counts=counts)
    return FileWork(step, [], [letter], row)


def take_hole(position: Position, context: bytes, end: int, size: int) -> FileWork:
    """NUL bytes up to `end`, where a line should begin: a gap. context: at most FRONTIER_BYTES_MAX before them."""
    nul_bytes = end - position.committed_offset
    tail = (context + bytes(min(nul_bytes, FRONTIER_BYTES_MAX)))[-FRONTIER_BYTES_MAX:]
    head = position.head + bytes(min(nul_bytes, max(0, HEAD_BYTES_MAX - len(position.head))))
    step = FileStep(
        position=position,
        end_offset=end,
        head=head,
        frontier_sha256=hashlib.sha256(tail).digest(),
        frontier_bytes=len(tail),
        size_seen=max(size, end),
        dead_letter_bytes=position.dead_letter_bytes,
        batch=None,
        counts={},
        gap=Gap(position.file_id, position.committed_offset, end, GapReason.HOLE),
    )
    return FileWork(step, [], [], None)


def build(works: Sequence[FileWork]) -> Plan:
    """One plan of the work of several files, in the order given; a file may stand in it once."""
    return _plan(
        tuple(work.step for work in works),
        tuple(fact for work in works for fact in work.facts),
        tuple(letter for work in works for letter in work.dead_letters),
        tuple(record for work in works for record in work.records),
        tuple(skip for work in works for skip in work.skips),
    )


def without_refused(plan: Plan, letters: Mapping[int, DeadLetter]) -> Plan:
    """The plan with the facts at these indexes as dead letters: one bad row costs one dead letter, not its batch."""
    refused: Counter[int] = Counter(plan.facts[index].file_id for index in letters)
    kept = {step.position.file_id: step.dead_letter_bytes for step in plan.steps}
    bounded: list[DeadLetter] = []
    for letter in letters.values():
        bounded.append(replace(letter, raw=letter.raw[: _room(kept[letter.file_id])]))
        kept[letter.file_id] += len(bounded[-1].raw)
    return _plan(
        tuple(
            replace(_recount(step, refused[step.position.file_id]), dead_letter_bytes=kept[step.position.file_id])
            for step in plan.steps
        ),
        tuple(fact for index, fact in enumerate(plan.facts) if index not in letters),
        (*plan.dead_letters, *bounded),
        plan.records,
        plan.skips,
    )


def _plan(
    steps: tuple[FileStep, ...],
    facts: tuple[PlacedFact, ...],
    dead_letters: tuple[DeadLetter, ...],
    records: tuple[PlacedRecord, ...],
    skips: tuple[PlacedSkip, ...],
) -> Plan:
    """facts: those of a file one behind the other."""
    fact_calls = frozenset([fact.call_id for fact in facts])
    earliest = {
        file_id: min([fact.second for fact in of_file])
        for file_id, of_file in groupby(facts, key=attrgetter("file_id"))
    }
    return Plan(steps, facts, dead_letters, records, skips, fact_calls, earliest)


def refused(fact: PlacedFact, line: bytes, detail: str) -> DeadLetter:
    """The dead letter of a line whose fact Postgres refused. line: its bytes with the newline."""
    rejected = Rejected(DeadLetterReason.REFUSED_BY_POSTGRES, detail)
    return _dead_letter(fact.file_id, fact.start_offset, line, rejected, 0)


def _too_long(line: bytes) -> Rejected:
    return Rejected(DeadLetterReason.TOO_LONG, f"{len(line)} bytes")


def _room(kept_bytes: int) -> int:
    """How many more bytes a file's dead letters may keep."""
    return max(0, RAW_BYTES_MAX_PER_FILE - kept_bytes)


def _dead_letter(file_id: int, start: int, line: bytes, rejected: Rejected, kept_bytes: int) -> DeadLetter:
    raw_max = RAW_BYTES_MAX_TOO_LONG if rejected.reason is DeadLetterReason.TOO_LONG else RAW_BYTES_MAX
    raw = line[: min(raw_max, _room(kept_bytes))]
    return DeadLetter(
        file_id, start, start + len(line), rejected.reason, rejected.detail, raw, hashlib.sha256(line).digest()
    )


def _grow(position: Position, row: OpenRow | None, taken: memoryview, counts: Counter[str]) -> OpenRow:
    end = position.committed_offset + len(taken)
    if not _may_grow(position, row):
        return OpenRow(position.committed_offset, end, hashlib.sha256(taken), dict(counts))
    assert row is not None
    hasher = row.hasher.copy()  # the old one stays good for the case that this plan is never committed
    hasher.update(taken)
    return OpenRow(row.start_offset, end, hasher, Counter(row.counts) + counts)


def _may_grow(position: Position, row: OpenRow | None) -> bool:
    return (
        row is not None
        and row.end_offset == position.committed_offset
        and row.end_offset - row.start_offset < ROW_BYTES_MAX
    )


def _step(
    position: Position,
    grown: OpenRow,
    row: OpenRow | None,
    *,
    head: bytes,
    tail: bytes,
    size: int,
    kept_bytes: int,
    counts: Counter[str],
) -> FileStep:
    grows_from = position.committed_offset if _may_grow(position, row) else None
    return FileStep(
        position=position,
        end_offset=grown.end_offset,
        head=head,
        frontier_sha256=hashlib.sha256(tail).digest(),
        frontier_bytes=len(tail),
        size_seen=size,
        dead_letter_bytes=kept_bytes,
        batch=BatchRow(grown.start_offset, grows_from, grown.end_offset, grown.hasher.digest(), grown.counts),
        counts=dict(counts),
    )


def _recount(step: FileStep, refused_lines: int) -> FileStep:
    if not refused_lines:
        return step
    change = {str(Outcome.FACT): -refused_lines, str(Outcome.DEAD_LETTER): refused_lines}
    return moved_counts(step, change)


def moved_counts(step: FileStep, change: Mapping[str, int]) -> FileStep:
    """The step with lines moved from one outcome to another; `change` adds up to 0."""

    def changed(counts: Mapping[str, int]) -> dict[str, int]:
        keys = {**counts, **change}
        moved = {key: counts.get(key, 0) + change.get(key, 0) for key in keys}
        return {key: count for key, count in moved.items() if count}

    batch = None if step.batch is None else replace(step.batch, counts=changed(step.batch.counts))
    return replace(step, counts=changed(step.counts), batch=batch)
