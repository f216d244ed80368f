"""Plans: every byte has one outcome, whatever the chunks, and nothing but a commit changes what is known."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_tailer import plan
from billing_tailer.model import (
    BatchRow,
    DeadLetter,
    DeadLetterReason,
    FactRow,
    FileState,
    FileStep,
    Outcome,
    PlacedFact,
    Position,
    Rejected,
    Skip,
    SkipReason,
)
from billing_tailer.plan import FileWork, LongLine, OpenRow, build, refused, take_lines, take_long_line, without_refused


@pytest.mark.parametrize("kind", [b"f", b"b", b"fb"])
@pytest.mark.parametrize("held_bytes_max", [1, 3000, 100_000])
def test_what_a_batch_has_in_memory_is_bounded(kind: bytes, held_bytes_max: int) -> None:
    """However small the lines are that so much comes of: there is a line in each batch, and none is left out."""
    content = b"".join(bytes([kind[number % len(kind)]]) + b"%d\n" % number for number in range(2000))
    position, lines = position_in(content), 0
    while position.committed_offset < len(content):
        chunk = read(content, position, len(content))
        work = take_lines(
            position, chunk, None, parse, lines_max=10_000, line_bytes_max=64, held_bytes_max=held_bytes_max
        )
        assert work is not None
        taken = sum(work.step.counts.values())
        assert taken == 1 or work.held_bytes < held_bytes_max + 1000
        assert work.held_bytes >= 200 * taken
        lines += taken
        position = work.step.after()
    assert lines == 2000


def batch_of(step: FileStep) -> BatchRow:
    assert step.batch is not None
    return step.batch


def row_of(work: FileWork) -> OpenRow:
    assert work.row is not None
    return work.row


@dataclass(frozen=True)
class Chunk:
    context: bytes
    data: bytes
    size: int


def parse(line: bytes) -> FactRow | Skip | Rejected:
    """By the first byte: f a fact, b a bad line, anything else a skip."""
    if line.startswith(b"f"):
        return FactRow(line.decode("latin-1"), "", 0)
    if line.startswith(b"b"):
        return Rejected(DeadLetterReason.INVALID_JSON, "bad")
    return Skip(SkipReason.NOT_LLM_ROUTE)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def position_in(content: bytes, offset: int = 0, *, file_id: int = 1, dead_letter_bytes: int = 0) -> Position:
    frontier = content[max(0, offset - 4096) : offset]
    return Position(
        file_id=file_id,
        path="/billing/audit.jsonl",
        device=1,
        inode=file_id,
        generation=1,
        previous_file_id=None,
        head=content[: min(offset, 1024)],
        committed_offset=offset,
        frontier_sha256=sha(frontier),
        frontier_bytes=len(frontier),
        size_seen=len(content),
        state=FileState.LIVE,
        dead_letter_bytes=dead_letter_bytes,
    )


def read(content: bytes, position: Position, bytes_max: int) -> Chunk:
    """What a verified read of a file with this content returns."""
    at = position.committed_offset
    context = content[at - position.frontier_bytes : at]
    assert sha(context) == position.frontier_sha256
    return Chunk(context, content[at : at + bytes_max], len(content))


def take(
    content: bytes, position: Position | None = None, row: OpenRow | None = None, *, lines: int = 10_000, line: int = 64
) -> FileWork | None:
    place = position_in(content) if position is None else position
    chunk = read(content, place, len(content))
    return take_lines(place, chunk, row, parse, lines_max=lines, line_bytes_max=line, held_bytes_max=1 << 30)


def taken(content: bytes, position: Position | None = None, row: OpenRow | None = None, *, line: int = 64) -> FileWork:
    work = take(content, position, row, line=line)
    assert work is not None
    return work


def assert_true_to(content: bytes, work: FileWork) -> None:
    """Everything a step says of a file follows from the file's content."""
    step = work.step
    start, end = step.position.committed_offset, step.end_offset
    assert content[end - 1 : end] == b"\n"
    assert step.head == content[: min(end, 1024)]
    assert step.frontier_bytes == min(end, 4096)
    assert step.frontier_sha256 == sha(content[end - step.frontier_bytes : end])
    assert step.size_seen == len(content)
    assert sum(step.counts.values()) == content[start:end].count(b"\n")
    assert step.counts.get("fact", 0) == len(work.facts)
    assert step.counts.get("dead_letter", 0) == len(work.dead_letters)
    assert 0 not in step.counts.values()
    batch = batch_of(step)
    assert batch.start_offset <= start
    assert batch.grows_from == (start if batch.start_offset < start else None)
    assert batch.end_offset == end == row_of(work).end_offset
    assert batch.sha256 == sha(content[batch.start_offset : end]) == row_of(work).hasher.digest()
    assert sum(batch.counts.values()) == content[batch.start_offset : end].count(b"\n")
    for letter in work.dead_letters:
        assert letter.sha256 == sha(content[letter.start_offset : letter.end_offset])
        assert content[letter.start_offset : letter.end_offset].startswith(letter.raw)
    for fact in work.facts:
        line = content[fact.start_offset : fact.end_offset]
        assert line.endswith(b"\n")
        assert fact.call_id == line[:-1].decode("latin-1")


def by_hand(content: bytes, line_bytes_max: int) -> tuple[list[tuple[int, int]], list[tuple[int, int, str, bytes]]]:
    """Facts as ranges and dead letters as (range, reason, hash) of a content, read line by line in one go."""
    facts, letters, start = [], [], 0
    for line in re.findall(rb"[^\n]*\n", content):
        end = start + len(line)
        if len(line) - 1 > line_bytes_max:
            letters.append((start, end, "too_long", sha(line)))
        elif line.startswith(b"f"):
            facts.append((start, end))
        elif line.startswith(b"b"):
            letters.append((start, end, "invalid_json", sha(line)))
        start = end
    return facts, letters


@dataclass
class Follow:
    """Follows a content to its end as the loop does: reads of given sizes, each work committed or thrown away."""

    content: bytes
    line_bytes_max: int
    reads: Iterable[int]
    lines_max: Iterable[int]
    commits: Iterable[bool]

    def run(self) -> list[FileWork]:
        position, row, works = position_in(self.content), None, []
        for bytes_max, lines_max, commit in zip(self.reads, self.lines_max, self.commits, strict=False):
            work = self._next(position, row, bytes_max, lines_max)
            if work is None and position.committed_offset + bytes_max >= len(self.content):
                break
            if work is None or not commit:
                continue
            works.append(work)
            position, row = work.step.after(), row_of(work)
        return works

    def _next(self, position: Position, row: OpenRow | None, bytes_max: int, lines_max: int) -> FileWork | None:
        chunk = read(self.content, position, bytes_max)
        work = take_lines(
            position, chunk, row, parse, lines_max=lines_max, line_bytes_max=self.line_bytes_max, held_bytes_max=1 << 30
        )
        if work is not None or len(chunk.data) <= self.line_bytes_max:
            return work
        line = LongLine(position.committed_offset, tail=chunk.context)
        for at in range(position.committed_offset, len(self.content), bytes_max):
            if line.feed(self.content[at : at + bytes_max]):
                return take_long_line(position, line, len(self.content))
        return None


# short lines and long ones, of few different bytes, so that newlines, facts and bad lines are frequent
contents = st.lists(
    st.sampled_from([b"\n", b"f", b"b", b"x", b"\0", b"f1\n", b"b\xff\n", b"{}\n", b"f" * 30, b"x" * 70 + b"\n"]),
    max_size=60,
).map(b"".join)
padded = st.tuples(st.sampled_from([b"", b"x" * 1020 + b"\n", (b"y" * 50 + b"\n") * 90]), contents).map(b"".join)
# NUL bytes at the beginning of a line are a hole: nothing is taken behind them
padded = padded.map(lambda content: re.sub(rb"(^|\n)\0", rb"\1x", content))


# --- framing ---------------------------------------------------------------------------------------------------------


def test_whole_lines_only() -> None:
    content = b"f1\nb\nskip\nhalf"
    work = taken(content)
    assert_true_to(content, work)
    assert work.step.end_offset == 10
    assert work.step.counts == {"fact": 1, "dead_letter": 1, "not_llm_route": 1}
    assert [(f.start_offset, f.end_offset) for f in work.facts] == [(0, 3)]
    assert [(d.start_offset, d.end_offset, d.raw) for d in work.dead_letters] == [(3, 5, b"b\n")]


@pytest.mark.parametrize("content", [b"", b"f", b"half a line", b"\0\0\0"])
def test_no_newline_no_work(content: bytes) -> None:
    assert take(content) is None


@pytest.mark.parametrize("separator", [b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x85", "\u2028".encode(), b"\0", b"\xff"])
def test_only_a_newline_ends_a_line(separator: bytes) -> None:
    content = b"f" + separator + b"f" + separator + b"\n"
    work = taken(content)
    assert [(f.start_offset, f.end_offset) for f in work.facts] == [(0, len(content))]


def test_empty_lines_count() -> None:
    content = b"\n\n\nf\n\n"
    work = taken(content)
    assert_true_to(content, work)
    assert work.step.counts == {"not_llm_route": 4, "fact": 1}


@pytest.mark.parametrize("lines_max", [1, 2, 3, 4, 5, 6])
def test_lines_max(lines_max: int) -> None:
    content = b"f1\nf2\n\nf4\nf5\nrest"
    work = take(content, lines=lines_max)
    assert work is not None
    assert_true_to(content, work)
    assert sum(work.step.counts.values()) == min(lines_max, 5)
    assert work.step.end_offset == [3, 6, 7, 10, 13, 13][lines_max - 1]


@given(padded, st.integers(4, 40), st.lists(st.tuples(st.integers(1, 400), st.integers(1, 9), st.booleans())))
def test_chunks_do_not_matter(content: bytes, line_bytes_max: int, turns: list[tuple[int, int, bool]]) -> None:
    """Any reads, limits and failed commits: the steps tile the file and say what one reading in one go says."""
    forever: Sequence[tuple[int, int, bool]] = [*turns, *[(line_bytes_max + 60, 3, True)] * (len(content) + 2)]
    works = Follow(content, line_bytes_max, *zip(*forever, strict=True)).run()
    at = 0
    for work in works:
        assert work.step.position.committed_offset == at
        assert_true_to(content, work)
        at = work.step.end_offset
    assert at == content.rfind(b"\n") + 1
    facts, letters = by_hand(content, line_bytes_max)
    assert [(f.start_offset, f.end_offset) for work in works for f in work.facts] == facts
    found = [(d.start_offset, d.end_offset, d.reason, d.sha256) for work in works for d in work.dead_letters]
    assert found == letters
    rows = {batch_of(work.step).start_offset: batch_of(work.step) for work in works}
    ends = itertools.accumulate((row.end_offset - row.start_offset for row in rows.values()), initial=0)
    assert list(rows) == list(ends)[:-1]
    totals: Counter[str] = sum((Counter(row.counts) for row in rows.values()), Counter())
    assert totals == sum((Counter(work.step.counts) for work in works), Counter())


@pytest.mark.parametrize("hole", [b"\0", bytes(50)])
def test_lines_are_taken_up_to_a_hole(hole: bytes) -> None:
    work = taken(b"f\nf\n" + hole + b"f\nf\n")
    assert (work.step.end_offset, len(work.facts)) == (4, 2)
    assert take(hole + b"f\n") is None


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "too_long"), [(63, False), (64, False), (65, True)])
def test_line_bytes_max(length: int, too_long: bool) -> None:
    line = b"f" * length + b"\n"
    content = b"f\n" + line + b"f\n"
    work = taken(content)
    assert_true_to(content, work)
    assert len(work.facts) == (2 if too_long else 3)
    letters = [(d.start_offset, d.end_offset, d.reason, d.raw, d.detail) for d in work.dead_letters]
    assert letters == ([(2, 2 + len(line), "too_long", line, f"{len(line)} bytes")] if too_long else [])


@pytest.mark.parametrize("edge", range(71))
def test_long_line_with_an_edge_anywhere(edge: int) -> None:
    before, line, after = b"f1\n", b"f" * 69 + b"\n", b"f2\n"
    content = before + line + after
    long_line = LongLine(len(before))
    parts = [part for part in (line[:edge], line[edge:] + after) if part]
    for number, part in enumerate(parts):
        if long_line.feed(part):
            assert number == len(parts) - 1 or part.endswith(b"\n")
            break
    else:
        pytest.fail("the line has an end")
    work = take_long_line(position_in(content, len(before)), long_line, len(content))
    (letter,) = work.dead_letters
    assert (letter.start_offset, letter.end_offset, letter.raw, letter.sha256) == (3, 73, line, sha(line))
    assert (letter.reason, letter.detail) == (DeadLetterReason.TOO_LONG, "70 bytes")
    assert work.step.counts == {"dead_letter": 1}
    assert (batch_of(work.step).start_offset, batch_of(work.step).grows_from) == (3, None)
    assert batch_of(work.step).sha256 == sha(line)


def test_long_line_in_one_piece_or_in_many() -> None:
    """The dead letter is the same, whether the line came in one read or streamed by."""
    content = b"x\n" + b"f" * 9000 + b"\n"
    position = position_in(content, 2)
    whole = taken(content, position, line=5000)
    long_line = LongLine(2, tail=content[:2])
    assert [long_line.feed(content[at : at + 1000]) for at in range(2, len(content), 1000)] == [False] * 9 + [True]
    streamed = take_long_line(position, long_line, len(content))
    for work in (whole, streamed):
        assert_true_to(content, work)
        assert len(work.dead_letters[0].raw) == 4096
    assert streamed.dead_letters == whole.dead_letters
    assert streamed.step == whole.step


@pytest.mark.parametrize("before", [0, 1, 100, 5000])
@pytest.mark.parametrize("length", [70, 1000, 4095, 4096, 5000])
def test_long_line_identifies_the_file(before: int, length: int) -> None:
    """Head and frontier after a long line are those of the file, also where the line is shorter than they are."""
    content = b"x" * (before - 1) + b"\n" * bool(before) + b"y" * (length - 1) + b"\n"
    position = position_in(content, before)
    line = LongLine(before, tail=read(content, position, 10).context)
    for at in range(before, len(content), 777):
        line.feed(content[at : at + 777])
    assert_true_to(content, take_long_line(position, line, len(content)))


@given(st.lists(st.binary(max_size=3000), max_size=20))
def test_long_line_in_bounded_memory(parts: list[bytes]) -> None:
    line = LongLine(0)
    fed = b""
    for part in parts:
        fed += part
        ended = line.feed(part)
        assert ended == (b"\n" in part)
        if ended:
            break
    expected = fed[: fed.find(b"\n") + 1] if b"\n" in fed else fed
    assert (line.scanned, line.hasher.digest()) == (len(expected), sha(expected))
    assert (line.raw, line.tail) == (expected[:4096], expected[-4096:])


def test_raw_bytes_of_a_dead_letter() -> None:
    content = b"b" * 70_000 + b"\n" + b"b" * 65_535 + b"\n" + b"b" * 65_536 + b"\n" + b"x" * 100_001 + b"\n"
    work = taken(content, line=100_000)
    assert_true_to(content, work)
    assert [len(letter.raw) for letter in work.dead_letters] == [65_536, 65_536, 65_536, 4096]
    assert work.step.dead_letter_bytes == 3 * 65_536 + 4096


LIMIT = 100 << 20


@pytest.mark.parametrize(
    ("kept", "lengths", "total"),
    [
        (LIMIT - 5, [5, 0, 0], LIMIT),
        (LIMIT - 6, [5, 1, 0], LIMIT),
        (LIMIT - 15, [5, 5, 5], LIMIT),
        (LIMIT, [0, 0, 0], LIMIT),
        (0, [5, 5, 5], 15),
    ],
)
def test_raw_bytes_of_a_file(kept: int, lengths: list[int], total: int) -> None:
    """Beyond 100 MiB a file's dead letters are range and hash only."""
    content = b"bad1\nbad2\nbad3\n"
    work = taken(content, position_in(content, dead_letter_bytes=kept))
    assert_true_to(content, work)
    assert [len(letter.raw) for letter in work.dead_letters] == lengths
    assert work.step.dead_letter_bytes == total
    line = LongLine(0)
    assert line.feed(content)
    long = take_long_line(position_in(content, dead_letter_bytes=kept), line, len(content))
    assert len(long.dead_letters[0].raw) == lengths[0]
    assert long.step.dead_letter_bytes == kept + lengths[0]


# --- rows of tail_batches --------------------------------------------------------------------------------------------


def follow_lines(content: bytes, sizes: Iterable[int]) -> list[FileWork]:
    position, row, works = position_in(content), None, []
    for size in sizes:
        chunk = read(content, position, size)
        work = take_lines(position, chunk, row, parse, lines_max=10_000, line_bytes_max=1 << 20, held_bytes_max=1 << 30)
        assert work is not None
        works.append(work)
        position, row = work.step.after(), row_of(work)
    return works


def test_rows_grow_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ROW_BYTES_MAX", 10)
    content = b"f12\n" * 8
    works = follow_lines(content, [4] * 8)
    batches = [(batch_of(w.step).start_offset, batch_of(w.step).grows_from, batch_of(w.step).end_offset) for w in works]
    # 0 to 8 is below the limit and grows once more, to 12; so does the next one
    assert batches == [
        (0, None, 4),
        (0, 4, 8),
        (0, 8, 12),
        (12, None, 16),
        (12, 16, 20),
        (12, 20, 24),
        (24, None, 28),
        (24, 28, 32),
    ]
    assert [batch_of(w.step).counts["fact"] for w in works] == [1, 2, 3, 1, 2, 3, 1, 2]
    for work in works:
        assert_true_to(content, work)


def test_row_limit_is_one_mebibyte() -> None:
    content = (b"x" * 1023 + b"\n") * 1030
    works = follow_lines(content, [1 << 19, 1 << 19, 1024, 1024])
    assert [batch_of(w.step).start_offset for w in works] == [0, 0, 1 << 20, 1 << 20]


@pytest.mark.parametrize("end", [3, 9])
def test_a_row_that_ends_elsewhere_does_not_grow(end: int) -> None:
    """After a reset, a restart or another file's turn."""
    content = b"f1\nf2\nf3\n"
    stray = OpenRow(0, end, hashlib.sha256(content[:end]), {"fact": end // 3})
    work = taken(content, position_in(content, 6), stray)
    assert_true_to(content, work)
    assert (batch_of(work.step).start_offset, batch_of(work.step).grows_from) == (6, None)


def test_uncommitted_work_leaves_no_trace() -> None:
    content = b"f1\nb2\nf3\n"
    first = take(content, lines=1)
    assert first is not None
    row, counts = row_of(first), dict(row_of(first).counts)
    before = row.hasher.digest()
    abandoned = take(content, first.step.after(), row)
    assert abandoned is not None
    assert (row.hasher.digest(), row.end_offset, dict(row.counts)) == (before, 3, counts)
    again = take(content, first.step.after(), row)
    assert again is not None
    assert_true_to(content, again)
    assert again.step == abandoned.step


def test_after_is_the_position_of_the_next_read() -> None:
    content = (b"y" * 99 + b"\n") * 100
    for work in follow_lines(content, [100, 700, 5000, 4100]):
        after = work.step.after()
        expected = position_in(content, work.step.end_offset)
        assert after == expected


def test_a_step_moves_forward_inside_the_file() -> None:
    work = taken(b"f1\n")
    with pytest.raises(AssertionError, match="does not move forward"):
        replace(work.step, size_seen=2)
    with pytest.raises(AssertionError, match="does not move forward"):
        replace(work.step, end_offset=0)


# --- whole plans -----------------------------------------------------------------------------------------------------


def test_build_of_several_files() -> None:
    one, other = b"f1\nb\n", b"f2\nx\nhalf"
    built = build([taken(one), taken(other, position_in(other, file_id=2))])
    assert [step.position.file_id for step in built.steps] == [1, 2]
    assert [(fact.file_id, fact.call_id) for fact in built.facts] == [(1, "f1"), (2, "f2")]
    assert [letter.file_id for letter in built.dead_letters] == [1]
    assert (built.lines, built.bytes, built.overlapping) == (4, 10, False)


@pytest.mark.parametrize(("one", "other", "overlapping"), [(b"f1\nf1\n", b"", True), (b"f1\n", b"f1\n", True)])
def test_overlapping(one: bytes, other: bytes, overlapping: bool) -> None:
    works = [taken(one), *([taken(other, position_in(other, file_id=2))] if other else [])]
    assert build(works).overlapping is overlapping


Refuse = Callable[[PlacedFact], DeadLetter]


def refuse(content: Mapping[int, bytes]) -> Refuse:
    return lambda fact: refused(fact, content[fact.file_id][fact.start_offset : fact.end_offset], "too big")


def test_without_refused() -> None:
    content = {1: b"f1\nf2\nb\nf3\n", 2: b"f4\n", 3: b"f5\n"}
    works = [taken(data, position_in(data, file_id=file_id)) for file_id, data in content.items()]
    built = build(works)
    letters = {index: refuse(content)(built.facts[index]) for index in (1, 3)}
    left = without_refused(built, letters)
    assert [fact.call_id for fact in left.facts] == ["f1", "f3", "f5"]
    assert [(d.file_id, d.start_offset, d.reason, d.raw) for d in left.dead_letters] == [
        (1, 6, "invalid_json", b"b\n"),
        (1, 3, "refused_by_postgres", b"f2\n"),
        (2, 0, "refused_by_postgres", b"f4\n"),
    ]
    assert [dict(step.counts) for step in left.steps] == [
        {"fact": 2, "dead_letter": 2},
        {"dead_letter": 1},
        {"fact": 1},
    ]
    assert [dict(batch_of(step).counts) for step in left.steps] == [dict(step.counts) for step in left.steps]
    assert [step.dead_letter_bytes for step in left.steps] == [5, 3, 0]
    assert (left.lines, left.bytes) == (built.lines, built.bytes)
    for before, after in zip(built.steps, left.steps, strict=True):
        assert replace(after, counts={}, batch=batch_of(before), dead_letter_bytes=0) == replace(
            before, counts={}, dead_letter_bytes=0
        )
        assert replace(batch_of(after), counts={}) == replace(batch_of(before), counts={})


def test_refused_lines_are_bounded() -> None:
    """Refused lines count towards a file's dead letter bytes, and are cut like the others."""
    content = {1: b"f1\nf2\n" + b"f" * 70_000 + b"\n"}
    built = build([taken(content[1], position_in(content[1], dead_letter_bytes=LIMIT - 4), line=100_000)])
    letters = {index: refuse(content)(fact) for index, fact in enumerate(built.facts)}
    assert [len(letter.raw) for letter in letters.values()] == [3, 3, 65_536]
    left = without_refused(built, letters)
    assert [letter.raw for letter in left.dead_letters] == [b"f1\n", b"f", b""]
    assert [step.dead_letter_bytes for step in left.steps] == [LIMIT]
    assert [d.sha256 for d in left.dead_letters] == [sha(b"f1\n"), sha(b"f2\n"), sha(content[1][6:])]


def test_refused_lines_of_a_grown_row() -> None:
    content = b"f1\nf2\nx\n"
    first, second = follow_lines(content, [3, 5])
    left = without_refused(build([second]), {0: refuse({1: content})(second.facts[0])})
    assert left.steps[0].counts == {"dead_letter": 1, "not_llm_route": 1}
    assert batch_of(left.steps[0]).counts == {"fact": 1, "dead_letter": 1, "not_llm_route": 1}
    assert batch_of(first.step).counts == {"fact": 1}


@given(contents, st.data())
def test_moved_counts_keep_their_sum(content: bytes, data: st.DataObject) -> None:
    work = take(content)
    if work is None:
        return
    moved = data.draw(st.integers(0, work.step.counts.get("fact", 0)))
    step = plan.moved_counts(work.step, {Outcome.FACT: -moved, Outcome.REPLAYED: moved})
    for counts in (step.counts, batch_of(step).counts):
        assert sum(counts.values()) == sum(work.step.counts.values())
        assert counts.get("replayed", 0) == moved
        assert all(count > 0 for count in counts.values())


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 8, 64, 1 << 16])
def test_pieces_are_not_seen(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """However much of a chunk is taken apart at a time: empty lines, lines longer than a piece, a rest behind."""
    monkeypatch.setattr(plan, "PIECE_BYTES", piece_bytes)
    data = b"\n\na\nff\n" + b"f" * 20 + b"\n\n" + b"f" * 7 + b"\nrest"
    facts = [(text, data.index(b"\n" + text + b"\n") + 1) for text in (b"ff", b"f" * 20, b"f" * 7)]
    places = [(fact.call_id.encode(), fact.start_offset, fact.end_offset) for fact in taken(data).facts]
    assert places == [(text, at, at + len(text) + 1) for text, at in facts]
    assert taken(data).step.counts == {"fact": 3, "not_llm_route": 4}
    for lines in range(1, 8):
        work = take(data, lines=lines)
        assert work is not None
        assert work.step.end_offset == len(b"\n".join(data.split(b"\n")[:lines])) + 1
