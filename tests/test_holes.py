"""NUL bytes at the beginning of a line: waited for, declared once something follows, and never part of a line."""

import gzip
import os
import time
from pathlib import Path
from typing import Any

import pytest

from billing_tailer import files as files_module
from billing_tailer import follower as follower_module
from billing_tailer import holes as holes_module
from tests.support.follow import Rig, following
from tests.support.logfiles import append, overwrite
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows

NUL = bytes(5000)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(lines(0, 10))
    return path


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holes_module, "HOLE_SECONDS", 0.0)
    monkeypatch.setattr(files_module, "ARCHIVE_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(follower_module, "SILENT_SECONDS", 0.0)


def gaps(dsn: str) -> list[tuple[Any, ...]]:
    found = rows(dsn, "select file_id, start_offset, end_offset, reason from log_gaps order by 1, 2")
    return [tuple(row.values()) for row in found]


def turned(rig: Rig, times: int = 6) -> None:
    for _ in range(times):
        rig.follower.scan_soon()
        rig.tailer._turn()


def test_nothing_follows(dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are waited for, without work, whatever time passes; then the data comes in their place."""
    size = log.stat().st_size
    monkeypatch.setattr(holes_module, "HOLE_SECONDS", 0.0)
    with following(dsn, tmp_path) as rig:
        os.truncate(log, size + len(lines(10, 3)))
        turned(rig)
        assert not any(rig.tailer._turn() for _ in range(5))
        assert (outcomes(dsn), gaps(dsn)) == ({"fact": 10}, [])
        overwrite(log, size, lines(10, 3))
        rig.turn()
    assert (outcomes(dsn), gaps(dsn)) == ({"fact": 13}, [])
    assert_sound(dsn, {1: log.read_bytes()})


def test_bytes_that_appear_as_nul_before_they_are_data(dsn: str, tmp_path: Path, log: Path) -> None:
    """Something follows them already, but less than two seconds have passed."""
    size = log.stat().st_size
    with following(dsn, tmp_path) as rig:
        append(log, bytes(len(line(10))) + line(11))
        turned(rig)
        assert (outcomes(dsn), gaps(dsn)) == ({"fact": 10}, [])
        overwrite(log, size, line(10))
        rig.turn()
    assert (outcomes(dsn), gaps(dsn)) == ({"fact": 12}, [])
    assert_sound(dsn, {1: log.read_bytes()})


def test_a_part_of_them_becomes_data(dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look that decides is a second one, and finds an earlier end: from there it is waited for again."""
    size = log.stat().st_size
    monkeypatch.setattr(holes_module, "HOLE_SECONDS", 0.2)
    with following(dsn, tmp_path) as rig:
        append(log, NUL + line(11))
        turned(rig, 2)
        overwrite(log, size + len(NUL) - len(line(10)), line(10))
        time.sleep(0.25)
        turned(rig, 1)
        assert gaps(dsn) == []
        time.sleep(0.25)
        rig.turn()
    assert gaps(dsn) == [(1, size, size + len(NUL) - len(line(10)), "hole")]
    assert outcomes(dsn) == {"fact": 12}
    assert_sound(dsn, {1: log.read_bytes()})


def test_two_seconds(dsn: str, tmp_path: Path, log: Path) -> None:
    size = log.stat().st_size
    with following(dsn, tmp_path) as rig:
        append(log, NUL + lines(10, 2))
        turned(rig)
        started = time.monotonic()
        while not gaps(dsn):
            turned(rig, 1)
            time.sleep(0.05)
        assert 1.5 < time.monotonic() - started < 5
        rig.turn()
    assert gaps(dsn) == [(1, size, size + len(NUL), "hole")]
    assert outcomes(dsn) == {"fact": 12}
    assert_sound(dsn, {1: log.read_bytes()})


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("nul_bytes", [1, 500, 1023, 1024, 4096, 5000, 70_000, 3_000_000])
@pytest.mark.parametrize("before", [0, 1, 30])
def test_holes_of_every_size(dsn: str, tmp_path: Path, nul_bytes: int, before: int) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_bytes(lines(0, before) + bytes(nul_bytes) + lines(100, 3) + bytes(nul_bytes) + lines(200, 2))
    with following(dsn, tmp_path):
        pass
    first = len(lines(0, before))
    second = first + nul_bytes + len(lines(100, 3))
    assert gaps(dsn) == [(1, first, first + nul_bytes, "hole"), (1, second, second + nul_bytes, "hole")]
    assert outcomes(dsn) == {"fact": before + 5}
    assert_sound(dsn, {1: log.read_bytes()})
    # known again, and read on
    append(log, lines(300, 1))
    with following(dsn, tmp_path):
        pass
    assert outcomes(dsn) == {"fact": before + 6}
    assert_sound(dsn, {1: log.read_bytes()})


@pytest.mark.usefixtures("no_patience")
def test_a_writer_without_o_append_leaves_a_sparse_hole(dsn: str, tmp_path: Path, log: Path) -> None:
    """After a truncation it writes on at its old offset: gigabytes that stand nowhere on the disk."""
    far = 3 << 30
    with following(dsn, tmp_path) as rig:
        os.truncate(log, 0)
        overwrite(log, far, lines(10, 5))
        started = time.monotonic()
        rig.turn()
        assert time.monotonic() - started < 2
    assert (2, 0, far, "hole") in gaps(dsn)
    assert outcomes(dsn) == {"fact": 15}
    assert_sound(dsn)


@pytest.mark.usefixtures("no_patience")
def test_nul_bytes_inside_a_line_are_part_of_it(dsn: str, tmp_path: Path, log: Path) -> None:
    append(log, b'{"a": "\0"}\n' + b"x\0\0\n" + line(10))
    with following(dsn, tmp_path):
        pass
    assert outcomes(dsn) == {"fact": 11, "dead_letter": 2}
    assert gaps(dsn) == []
    assert_sound(dsn, {1: log.read_bytes()})


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("end", [b"", line(50)])
def test_in_a_compressed_file(dsn: str, tmp_path: Path, log: Path, end: bytes) -> None:
    """It will not change any more: also what nothing follows is a hole."""
    content = lines(20, 5) + NUL + end
    (tmp_path / "audit.jsonl.1.gz").write_bytes(gzip.compress(content))
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    (hole,) = gaps(dsn)
    assert hole[1:] == (len(lines(20, 5)), len(lines(20, 5)) + len(NUL), "hole")
    assert outcomes(dsn) == {"fact": 15 + bool(end)}
    assert [row["state"] for row in rows(dsn, "select state from tail_files where path like '%%gz'")] == ["final"]
    assert_sound(dsn)


@pytest.mark.usefixtures("no_patience")
def test_a_hole_that_is_looked_at_in_many_rounds(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes_module, "LOOK_BYTES_MAX", 1 << 20)
    append(log, bytes(5 << 20) + lines(10, 2))  # really written
    other = tmp_path / "audit-2.jsonl"
    other.write_bytes(lines(100, 2))
    with following(dsn, tmp_path) as rig:
        append(other, lines(200, 2))
        rig.turn()
    assert outcomes(dsn) == {"fact": 16}
    assert count(dsn, "log_gaps") == 1
    assert_sound(dsn)
