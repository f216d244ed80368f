"""Copies, replacements and cuts of followed files: nothing that is there stays unread in silence, nothing that was
seen is lost in silence, and what is gone does not keep the live log from being opened."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from billing_tailer import follower as follower_module
from billing_tailer import tailer as tailer_module
from tests.support.follow import following
from tests.support.logfiles import append, replaced
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(lines(0, 10))
    return path


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a file must be silent before what replaced it is believed: not at all, or a little."""
    seconds = float(getattr(request, "param", 0.0))
    monkeypatch.setattr(follower_module, "SILENT_SECONDS", seconds)
    return seconds


GAPS = "select start_offset, end_offset, reason from log_gaps order by 1"


def gaps(dsn: str) -> list[tuple[Any, ...]]:
    return [
        tuple(row.values()) for row in rows(dsn, "select start_offset, end_offset, reason from log_gaps order by 1")
    ]


def nameless(directory: Path) -> int:
    """Descriptors of this process on deleted files of a directory."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        found += target.startswith(str(directory)) and target.endswith("(deleted)")
    return found


@pytest.mark.parametrize("patience", [0.3], indirect=True)
def test_a_mirror_that_is_renewed_faster_than_the_silence(dsn: str, tmp_path: Path, log: Path, patience: float) -> None:
    with following(dsn, tmp_path, open_files_max=8) as rig:
        for n in range(2, 15):
            replaced(log, lines(0, 10 * n))
            rig.turn()
        time.sleep(patience)
        rig.turn()
        assert not rig.health.reasons()
        assert len(rig.files._handles) <= 5
    assert count(dsn, "usage_facts") == 140
    assert_sound(dsn)


@pytest.mark.parametrize("torn", [b'{"torn": "by a kill of nginx', b"x" * 5000])
@pytest.mark.parametrize("more", [1, 50])
def test_a_torn_end_is_removed_with_an_editor(dsn: str, tmp_path: Path, log: Path, torn: bytes, more: int) -> None:
    """`sed -i '$d'`: the new file is shorter than the old one, or goes on otherwise."""
    append(log, torn)
    with following(dsn, tmp_path) as rig:
        replaced(log, lines(0, 10))
        rig.turn()
        append(log, lines(10, more))
        rig.turn()
        assert not rig.health.reasons()
    assert count(dsn, "usage_facts") == 10 + more
    assert_sound(dsn)


def test_two_files_go_on_from_one_that_is_gone(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path) as rig:
        shutil.copyfile(log, tmp_path / "audit-b.jsonl")
        append(tmp_path / "audit-b.jsonl", lines(100, 5))
        replaced(log, lines(0, 10) + lines(200, 5))
        rig.turn()
        rig.turn()
    assert count(dsn, "usage_facts") == 20
    assert_sound(dsn)


def test_backups_that_come_and_go(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path, open_files_max=8) as rig:
        for n in range(12):
            copy = tmp_path / f"audit.jsonl.bak{n}"
            shutil.copyfile(log, copy)
            rig.turn()
            copy.unlink()
            rig.turn()
        assert nameless(tmp_path) == 0
        log.rename(tmp_path / "audit.jsonl.1")
        log.write_bytes(lines(100, 10))
        rig.turn()
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 20}


def test_a_copy_that_is_being_made(dsn: str, tmp_path: Path, log: Path) -> None:
    """As copytruncate does it, slowly: it is not read beside its original, and goes on from it afterwards."""
    append(log, b"poison\n" + lines(10, 5))
    content, copy = log.read_bytes(), tmp_path / "audit.jsonl.1"
    with following(dsn, tmp_path) as rig:
        copy.write_bytes(content[:-100])
        rig.turn()
        copy.write_bytes(content)
        rig.turn()
        os.truncate(log, 0)
        append(log, lines(100, 3))
        rig.turn()
    assert outcomes(dsn) == {"fact": 18, "dead_letter": 1}
    assert gaps(dsn) == []
    assert_sound(dsn, {1: content})


def test_a_file_of_its_own_that_begins_like_a_longer_one(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path) as rig:
        (tmp_path / "audit-b.jsonl").write_bytes(lines(0, 3) + lines(500, 2))
        rig.turn()
    assert count(dsn, "usage_facts") == 12


@pytest.mark.parametrize("whole_lines", [True, False])
def test_a_copy_that_went_its_own_way_hides_no_loss(dsn: str, tmp_path: Path, log: Path, whole_lines: bool) -> None:
    size = log.stat().st_size
    with following(dsn, tmp_path) as rig:
        (tmp_path / "audit-b.jsonl").write_bytes(lines(0, 10) + lines(500, 30))
        rig.turn()
        append(log, lines(10, 5) if whole_lines else b"h" * 400)
        seen = log.stat().st_size
        rig.follower.scan_soon()
        rig.follower.scan_if_due()
        os.truncate(log, 0)
        rig.turn()
    assert gaps(dsn) == [(size, seen, "truncated")]


def test_what_was_cut_does_not_come_back_by_growing(dsn: str, tmp_path: Path, log: Path) -> None:
    """The bytes that stand there now are others: the gap stays."""
    size = log.stat().st_size
    with following(dsn, tmp_path) as rig:
        append(log, b"x" * 50)
        rig.turn()
        os.truncate(log, size)
        rig.turn()
        append(log, lines(10, 10) + b"y" * 50)
        rig.turn()
        os.truncate(log, log.stat().st_size - 50)
        rig.turn()
    assert (size, size + 50, "truncated") in gaps(dsn)
    assert len(gaps(dsn)) == 2
    assert_sound(dsn)


def test_half_a_line_that_was_read_between_two_scans_and_cut(dsn: str, tmp_path: Path, log: Path) -> None:
    size = log.stat().st_size
    with following(dsn, tmp_path) as rig:
        append(log, b"x" * 5000)
        for _ in range(2):
            rig.follower._next_scan = time.monotonic() + 60
            rig.tailer._round()
            os.truncate(log, size)
        rig.turn()
    assert gaps(dsn) == [(size, size + 5000, "truncated")]


def test_the_last_byte_of_a_line_comes_without_a_change_of_size(dsn: str, tmp_path: Path, log: Path) -> None:
    """As where the size is written before the data."""
    size, whole = log.stat().st_size, line(10)
    with following(dsn, tmp_path) as rig:
        append(log, whole[:-1] + b" ")
        rig.turn()
        with log.open("r+b") as out:
            out.seek(size + len(whole) - 1)
            out.write(b"\n")
        rig.turn()
    assert outcomes(dsn) == {"fact": 11}
    assert_sound(dsn, {1: log.read_bytes()})


def test_new_files_that_cannot_be_opened_keep_nobody_out(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "NEW_FILES_MAX", 3)
    real = os.open

    def refusing(path: Any, *rest: Any, **more: Any) -> int:
        if b"audit-a" in os.fsencode(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **more)

    for n in range(3):
        (tmp_path / f"audit-a{n}.jsonl").write_bytes(lines(100 + n * 10, 2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        with following(dsn, tmp_path) as rig:
            assert "Permission denied" in str(rig.health.reasons())
    assert outcomes(dsn) == {"fact": 10}


def test_a_standby_does_not_hold_what_the_active_tailer_has_read(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailer_module, "SHOW_SECONDS", 0.01)
    monkeypatch.setattr(follower_module, "FINAL_SECONDS", 0.0)
    monkeypatch.setattr("billing_tailer.ledger.writer.STANDBY_POLL_SECONDS", 0.02)

    def stand_by() -> None:
        with following(dsn, tmp_path, open_files_max=8):
            pass

    with following(dsn, tmp_path, open_files_max=8) as rig:
        other = threading.Thread(target=stand_by)
        other.start()
        time.sleep(0.3)
        for n in range(1, 8):
            rotated = tmp_path / f"audit.jsonl.{n}"
            log.rename(rotated)
            log.write_bytes(lines(n * 100, 10))
            rig.turn()
            time.sleep(0.1)
            rotated.unlink()
            rig.turn()
        rig.turn()
        held = nameless(tmp_path)
    other.join()
    assert held <= 1
    assert outcomes(dsn) == {"fact": 80}


def test_the_newest_generation_says_whether_a_file_is_committed(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path) as rig:
        assert rig.follower.is_committed(os.fsencode(log), log.stat().st_size)
        log.write_bytes(b"half a line")
        rig.turn()
        assert not rig.follower.is_committed(os.fsencode(log), log.stat().st_size)
