"""The content of gzip files: all of it, in any steps, in bounded memory, and damage is never taken for an end."""

import gzip
import hashlib
import random
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_tailer.gzipped import CONTENT_STEP_BYTES, Archive, BrokenArchive, Content, ReadAt
from billing_tailer.model import FileState, Position, Verdict


def reading(compressed: bytes, largest: int = 1 << 30) -> ReadAt:
    """Reads that return at most `largest` bytes each."""
    return lambda offset, size: compressed[offset : offset + min(size, largest)]


def members(contents: Iterable[bytes], padding: bytes = b"") -> bytes:
    return b"".join(gzip.compress(content) for content in contents) + padding


def everything(content: Content) -> bytes:
    while not content.ended:
        content.step()
    return content.buffer


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(0, 40), st.integers(1, 50))
def test_any_members_in_any_steps(contents: list[bytes], padding: int, largest: int) -> None:
    compressed = members(contents, b"\0" * padding)
    assert everything(Content(reading(compressed, largest))) == b"".join(contents)


@pytest.mark.parametrize("size", [0, 1, CONTENT_STEP_BYTES - 1, CONTENT_STEP_BYTES, CONTENT_STEP_BYTES + 1, 3_000_000])
@pytest.mark.parametrize("make", [bytes, noise])
def test_sizes_around_a_step(size: int, make: type[bytes]) -> None:
    content = make(size)
    assert everything(Content(reading(gzip.compress(content)))) == content


def test_memory_stays_bounded() -> None:
    """A gigabyte of zeros is a megabyte of gzip."""
    made = zlib.compressobj(wbits=31)
    compressed = b"".join(made.compress(bytes(1 << 20)) for _ in range(200)) + made.flush()
    content = Content(reading(compressed))
    while not content.ended:
        content.step()
        assert len(content.buffer) <= CONTENT_STEP_BYTES
        content.drop_before(content.end)
    assert content.end == 200 << 20


@given(st.binary(max_size=500), st.data())
def test_what_is_cut_off_or_damaged_is_no_end(content: bytes, data: st.DataObject) -> None:
    compressed = gzip.compress(content, mtime=0)
    cut = data.draw(st.integers(0, len(compressed) - 1))
    with pytest.raises(BrokenArchive):
        everything(Content(reading(compressed[:cut])))
    flipped = bytearray(compressed)
    flipped[data.draw(st.integers(len(compressed) - 8, len(compressed) - 1))] ^= 1
    with pytest.raises(BrokenArchive):
        everything(Content(reading(bytes(flipped))))


@pytest.mark.parametrize("junk", [b"", b"plain text\n", b"\x1f\x8b", members([b"one"]) + b"junk"])
def test_no_gzip(junk: bytes) -> None:
    with pytest.raises(BrokenArchive):
        everything(Content(reading(junk)))


# --- archives --------------------------------------------------------------------------------------------------------


def position_at(content: bytes, offset: int, *, size_seen: int | None = None, file_id: int = 1) -> Position:
    return Position(
        file_id=file_id,
        path="log.1",
        device=1,
        inode=7,
        generation=1,
        previous_file_id=None,
        head=content[: min(1024, offset)],
        committed_offset=offset,
        frontier_sha256=hashlib.sha256(content[max(0, offset - 4096) : offset]).digest(),
        frontier_bytes=min(4096, offset),
        size_seen=offset if size_seen is None else size_seen,
        state=FileState.FINAL,
    )


def read_through(compressed: bytes, offsets: Iterable[int] = ()) -> Archive:
    archive = Archive((len(compressed), 0))
    again(archive, compressed, offsets)
    return archive


def again(archive: Archive, compressed: bytes, offsets: Iterable[int] = ()) -> None:
    while archive.is_unknown():
        archive.step(reading(compressed), lambda head: offsets)


LINES = b"".join(b"%d,%s\n" % (n, noise(60, n).hex().encode()) for n in range(9000))
OFFSETS = [0, 1, 500, 1024, 4096, 4097, 300_000, CONTENT_STEP_BYTES, len(LINES) - 1, len(LINES)]


def test_agrees_where_it_was_asked() -> None:
    archive = read_through(gzip.compress(LINES), OFFSETS)
    assert (archive.size, archive.head, archive.after_newline) == (len(LINES), LINES[:1024], len(LINES))
    for offset in OFFSETS:
        assert archive.judge(position_at(LINES, offset), own=False) is Verdict.AGREES
        other = LINES[: max(0, offset - 10)] + b"x" * 10 + LINES[offset:]
        if offset >= 10:
            assert archive.judge(position_at(other, offset), own=False) is Verdict.DIFFERS
    assert archive.judge(position_at(LINES, 500, size_seen=len(LINES) + 1), own=False) is Verdict.CUT
    longer = LINES + b"more\n"
    assert archive.judge(position_at(longer, len(longer)), own=False) is Verdict.PAST_END
    assert archive.judge(position_at(b"other" + LINES, 3000), own=False) is Verdict.DIFFERS


def test_an_offset_that_was_not_asked_for_is_looked_at_again() -> None:
    compressed = gzip.compress(LINES)
    archive = read_through(compressed, [500])
    assert archive.judge(position_at(LINES, 70_000), own=False) is Verdict.UNREADABLE
    again(archive, compressed)
    assert archive.judge(position_at(LINES, 70_000), own=False) is Verdict.AGREES
    assert archive.judge(position_at(LINES, 500), own=False) is Verdict.AGREES


def test_trusted_by_head_and_length() -> None:
    compressed = gzip.compress(LINES)
    position = position_at(LINES, len(LINES))
    archive = Archive((len(compressed), 0))
    assert archive.trust(reading(compressed), position)
    assert archive.judge(position, own=True) is Verdict.AGREES
    other = b"other" + LINES[5:]
    for wrong in (gzip.compress(LINES[:-70]), gzip.compress(other), compressed[:-1], b"", gzip.compress(b"")):
        assert not Archive((len(wrong), 0)).trust(reading(wrong), position)
    assert not Archive((len(compressed), 0)).trust(reading(compressed), position_at(LINES, 500, size_seen=len(LINES)))


def test_reading_goes_forward_in_bounded_steps() -> None:
    compressed = gzip.compress(LINES)
    archive = read_through(compressed)
    target, asked = 900_000, 0
    while (got := archive.read(reading(compressed), target, 5000, skip_bytes_max=100_000)) is None:
        asked += 1
    assert got == LINES[target : target + 5000]
    assert 1 < asked < 10
    # on from there, back to before it, and to the end
    for offset in (target + 4000, 10, len(LINES) - 100):
        read = archive.read(reading(compressed), offset, 5000, skip_bytes_max=1 << 30)
        assert read == LINES[offset : offset + 5000]


def test_damage_behind_what_was_read_through() -> None:
    """The file changed under us without another size or time: an error, never an early end."""
    compressed = gzip.compress(LINES)
    archive = read_through(compressed)
    damaged = compressed[:100_000] + bytes(100) + compressed[100_100:]
    with pytest.raises(OSError, match="damaged"):
        archive.read(reading(damaged), len(LINES) - 10, 10, skip_bytes_max=1 << 30)
