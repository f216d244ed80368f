"""Where a line ends: only at a newline, however late that comes, however far it is, wherever a buffer ends."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Final

import pytest

from billing_tailer.model import FRONTIER_BYTES_MAX, HEAD_BYTES_MAX
from billing_tailer.plan import ROW_BYTES_MAX
from billing_tailer.reader import LONG_LINE_CHUNK_BYTES
from tests.scenarios.outcome import assert_exactly
from tests.support.follow import following
from tests.support.logfiles import append
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, outcomes, rows


def test_half_a_line_for_an_hour(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is committed of it, nothing is said of it, and then it is a line like any other."""
    late = 0.0
    wall, steady = time.time, time.monotonic
    half = line(3)
    log.write_bytes(lines(0, 3) + half[:-20])
    with following(dsn, log.parent) as rig:
        monkeypatch.setattr(time, "time", lambda: wall() + late)
        monkeypatch.setattr(time, "monotonic", lambda: steady() + late)
        for minute in range(1, 61):
            late = 60.0 * minute
            rig.turn()
            assert not rig.health.reasons()
        assert_exactly(dsn, range(3), contents={1: log.read_bytes()})
        append(log, half[-20:])
        rig.turn()
    assert_exactly(dsn, range(4), contents={1: lines(0, 4)})


def test_a_line_dribbled_byte_by_byte_through_a_multi_byte_character_a_restart_and_a_rotation(
    dsn: str, log: Path
) -> None:
    """Restarted and renamed amid the bytes of a character; a turn of the loop after every byte."""
    account = "Zoë-账户-😀"
    text = line(1).replace(b"account-1", account.encode())
    odd = text.index(account.encode())
    ends = [*range(odd - 2, odd + len(account.encode()) + 2), *range(len(text) - 4, len(text) + 1)]
    emoji = text.index("😀".encode())
    log.write_bytes(line(0))
    written = 0
    path = log
    for part in ([end for end in ends if end <= emoji + 1], [end for end in ends if end > emoji + 1]):
        with following(dsn, log.parent) as rig:
            for end in part:
                append(path, text[written:end])
                written = end
                rig.tailer._turn()
                if end == emoji + 2:
                    path = log.rename(f"{log}.1")
                    log.write_bytes(line(2))
            rig.turn()
            assert not rig.health.reasons()
    assert_exactly(dsn, range(3), contents={1: line(0) + text, 2: line(2)})
    (fact,) = rows(dsn, "select billing_account_id from usage_facts where call_id = 'call-00000001'")
    assert fact["billing_account_id"] == account


def test_empty_lines_crlf_and_a_bom(dsn: str, log: Path) -> None:
    """Each empty line is counted; a carriage return or a byte order mark at any line changes nothing of its fact."""
    bom = b"\xef\xbb\xbf"
    content = b"".join(
        (
            b"\n\r\n",
            bom + line(0),
            b" \t \n",
            line(1)[:-1] + b"\r\n",
            bom + line(2)[:-1] + b"\r\n",
            line(3).replace(b'","', b'"\r,"', 1),  # not at its end: white space between two fields
            b"\r\r\n",
            "\u2028\n".encode(),  # no white space of JSON, and no line end
            line(4) + b"\n",
        )
    )
    log.write_bytes(content)
    with following(dsn, log.parent, batch_lines_max=2):
        pass
    separator = content.index("\u2028".encode())
    letter = (1, separator, separator + 4, "invalid_json")
    assert_exactly(dsn, range(5), contents={1: content}, letters=[letter], blank_line=5)


LINE_BYTES_MAX: Final = 3000
BATCH_BYTES: Final = 16384
"""What is read of a file at a time: half of BATCH_BYTES_MAX."""
EDGES = {
    "head": HEAD_BYTES_MAX,
    "frontier": FRONTIER_BYTES_MAX,
    "batch": BATCH_BYTES,
    "second batch": 2 * BATCH_BYTES,
    "row of tail_batches": ROW_BYTES_MAX,
}


def filling(size: int, first_call: int) -> tuple[bytes, int]:
    """Lines of exactly `size` bytes in all; and how many they are."""
    content, number = b"", 0
    while size - len(content) > LINE_BYTES_MAX:
        content += line(first_call + number, pad="p" * (number % 97))
        number += 1
    last = line(first_call + number, pad="")
    content += line(first_call + number, pad="p" * (size - len(content) - len(last)))
    assert len(content) == size
    return content, number + 1


@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_a_newline_at_every_buffer_edge(dsn: str, log: Path, edge: int, shift: int) -> None:
    """The last byte before the edge, the first one behind it, and the one after that."""
    first, number = filling(edge + shift, 0)
    limits: dict[str, Any] = {"batch_bytes_max": 2 * BATCH_BYTES, "line_bytes_max": LINE_BYTES_MAX}
    log.write_bytes(first)
    with following(dsn, log.parent, **limits) as rig:
        append(log, lines(number, 3))
        rig.turn()
    append(log, lines(number + 3, 3))
    with following(dsn, log.parent, **limits) as rig:
        assert not rig.health.reasons()
    assert_exactly(dsn, range(number + 6), contents={1: first + lines(number, 6)})


@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_newline_of_an_over_long_line_at_every_buffer_edge(dsn: str, log: Path, pieces: int, shift: int) -> None:
    """The pieces in which it is hashed and dropped as it streams by."""
    long = b"x" * (pieces * LONG_LINE_CHUNK_BYTES - 1 + shift) + b"\n"
    content = line(0) + long + line(1)
    log.write_bytes(content)
    with following(dsn, log.parent, line_bytes_max=LINE_BYTES_MAX):
        pass
    start = len(line(0))
    assert_exactly(dsn, range(2), contents={1: content}, letters=[(1, start, start + len(long), "too_long")])
    (letter,) = rows(dsn, "select sha256 from dead_letters")
    assert letter["sha256"] == hashlib.sha256(long).digest()


@pytest.mark.parametrize("gib", [2, 4])
def test_two_and_four_gib_files(dsn: str, log: Path, gib: int) -> None:
    """Lines on both sides of the border, and one across it; a restart; a rotation; a truncation. Sparse, and begun at
    its end, so that neither disk nor time is needed (`tests/torture/memory.py` reads 2 GiB through)."""
    border = gib << 30
    begin = border - len(lines(0, 2)) - len(line(2)) // 2
    with log.open("wb") as out:
        out.write(line(99))
        out.seek(begin - 1)
        out.write(b"\n")
    with following(dsn, log.parent, start_at_end=True) as rig:
        append(log, lines(0, 5))
        rig.turn()
    append(log, lines(5, 5) + b"half")
    log.rename(f"{log}.1")
    log.write_bytes(lines(20, 5))
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    end = begin + len(lines(0, 10))
    facts = rows(dsn, "select start_offset, end_offset from usage_facts where file_id = 1 order by 1")
    assert (facts[0]["start_offset"], facts[-1]["end_offset"]) == (begin, end)
    assert facts[2]["start_offset"] < border < facts[2]["end_offset"]
    assert outcomes(dsn) == {"fact": 15}
    with Path(f"{log}.1").open("rb") as content:
        for batch in rows(dsn, "select start_offset, end_offset, sha256 from tail_batches where file_id = 1"):
            content.seek(batch["start_offset"])
            part = content.read(batch["end_offset"] - batch["start_offset"])
            assert hashlib.sha256(part).digest() == batch["sha256"]
    os.truncate(f"{log}.1", 0)
    with following(dsn, log.parent):
        pass
    assert [tuple(row.values()) for row in rows(dsn, "select start_offset, end_offset, reason from log_gaps")] == [
        (0, begin, "start_at"),
        (end, end + len(b"half"), "truncated"),
    ]
    assert rows(dsn, "select * from dead_letters") == []
    assert_sound(dsn)
