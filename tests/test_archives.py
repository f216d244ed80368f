"""Rotated logs that are compressed: read where they were not read before, recognised where they were."""

import gzip
import os
import time
from pathlib import Path
from typing import Any

import pytest

from billing_tailer import files as files_module
from billing_tailer import follower as follower_module
from billing_tailer.files import LogFiles, read_range
from billing_tailer.gzipped import Archive
from billing_tailer.ledger import Ledger
from billing_tailer.resets import parse_request, plan_reset
from tests.support.follow import following
from tests.support.logfiles import append
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is believed to be finished, what is gone to be silent, at once."""
    monkeypatch.setattr(files_module, "ARCHIVE_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(follower_module, "SILENT_SECONDS", 0.0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(lines(0, 100))
    return path


def zipped(path: Path) -> Path:
    """As gzip does it: the times of the original, then the original is gone."""
    archive = path.with_name(path.name + ".gz")
    archive.write_bytes(gzip.compress(path.read_bytes()))
    os.utime(archive, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    path.unlink()
    return archive


def states(dsn: str) -> list[tuple[Any, ...]]:
    found = rows(dsn, "select path, state, committed_offset from tail_files order by file_id")
    return [(Path(row["path"]).name, row["state"], row["committed_offset"]) for row in found]


def test_rotated_and_compressed_while_running(dsn: str, tmp_path: Path, log: Path) -> None:
    """Final once it is seen as .gz: the descriptor is closed, nothing is read again."""
    size = log.stat().st_size
    with following(dsn, tmp_path) as rig:
        log.rename(tmp_path / "audit.jsonl.1")
        log.write_bytes(lines(100, 10))
        rig.turn()
        zipped(tmp_path / "audit.jsonl.1")
        rig.turn()
        held = [Path(f"/proc/self/fd/{handle.fd}").readlink().name for handle in rig.files._handles.values()]
        assert not [name for name in held if "deleted" in name]
        assert not rig.health.reasons()
        # logrotate's next turn renames it
        (tmp_path / "audit.jsonl.1.gz").rename(tmp_path / "audit.jsonl.2.gz")
        rig.turn()
    assert states(dsn) == [("audit.jsonl.2.gz", "final", size), ("audit.jsonl", "live", len(lines(100, 10)))]
    assert outcomes(dsn) == {"fact": 110}
    assert_sound(dsn)


def test_several_rotations_while_stopped_some_compressed_one_line_completed_after_the_rename(
    dsn: str, tmp_path: Path, log: Path
) -> None:
    whole = line(999)
    append(log, whole[:50])
    with following(dsn, tmp_path):
        pass
    append(log, whole[50:] + lines(100, 20))
    log.rename(tmp_path / "audit.jsonl.3")
    zipped(tmp_path / "audit.jsonl.3")
    (tmp_path / "audit.jsonl.2").write_bytes(lines(200, 20))
    zipped(tmp_path / "audit.jsonl.2")
    (tmp_path / "audit.jsonl.1").write_bytes(lines(300, 20))
    log.write_bytes(lines(400, 20))
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 181}
    by_name = {name: state for name, state, _ in states(dsn)}
    assert by_name == {
        "audit.jsonl": "live",
        "audit.jsonl.1": "live",
        "audit.jsonl.2.gz": "final",
        "audit.jsonl.3.gz": "final",
    }
    assert_sound(dsn)


@pytest.mark.parametrize("restarts", [False, True])
def test_the_inode_of_a_compressed_log_is_used_again(dsn: str, tmp_path: Path, log: Path, restarts: bool) -> None:
    """20 of 20 times on ext4. The old content is found in the gzip file: no gap."""
    with following(dsn, tmp_path) as rig:
        if not restarts:
            append(log, lines(100, 5))
            rig.turn()
    content = log.read_bytes()
    append(log, lines(500, 5))
    inode = log.stat().st_ino
    archive = tmp_path / "audit.jsonl.1.gz"
    archive.write_bytes(gzip.compress(log.read_bytes()))
    os.truncate(log, 0)
    append(log, lines(600, 5) + content)
    assert log.stat().st_ino == inode
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    assert rows(dsn, "select * from log_gaps") == []
    assert count(dsn, "usage_facts") == 110 + (not restarts) * 5
    assert_sound(dsn)


@pytest.mark.parametrize("rest", [b'{"half', line(77).rstrip(b"\n"), b"x" * 200_000])
def test_the_unterminated_end_of_a_compressed_file(dsn: str, tmp_path: Path, log: Path, rest: bytes) -> None:
    """It will never get its newline: a dead letter, whatever it says."""
    with following(dsn, tmp_path):
        pass
    append(log, rest)
    content = log.read_bytes()
    zipped(log)
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 100, "dead_letter": 1}
    (letter,) = rows(dsn, "select start_offset, end_offset, reason, detail from dead_letters")
    assert (letter["start_offset"], letter["end_offset"]) == (len(lines(0, 100)), len(content))
    assert letter["reason"] == ("too_long" if len(rest) > 1 << 16 else "unterminated")
    assert ("can be retried" in letter["detail"]) == rest.startswith(line(77)[:30])
    assert [state for _, state, _ in states(dsn)] == ["final"]
    assert_sound(dsn, {1: content})


def test_the_unterminated_end_of_a_file_that_was_silent_for_a_day(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(log, b"half a line")
    content = log.read_bytes()
    with following(dsn, tmp_path) as rig:
        log.unlink()
        rig.turn()
        assert outcomes(dsn) == {"fact": 100}
        monkeypatch.setattr(follower_module, "FINAL_SECONDS", 0.0)
        rig.turn()
        rig.turn()
        assert len(rig.files._handles) == 0
    assert outcomes(dsn) == {"fact": 100, "dead_letter": 1}
    assert [state for _, state, _ in states(dsn)] == ["final"]
    assert_sound(dsn, {1: content})


def test_a_gzip_file_that_is_still_written(dsn: str, tmp_path: Path, log: Path) -> None:
    """Half of it is no end, and no reason to give anything up."""
    compressed = gzip.compress(lines(100, 1000))
    with following(dsn, tmp_path) as rig:
        (tmp_path / "audit.jsonl.1.gz").write_bytes(compressed[:5000])
        rig.turn()
        assert "in the middle of the compressed data" in str(rig.health.reasons())
        append(tmp_path / "audit.jsonl.1.gz", compressed[5000:])
        rig.turn()
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 1100}
    assert_sound(dsn)


@pytest.mark.parametrize("junk", [b"", b"no gzip at all\n", gzip.compress(lines(5, 50))[:-9] + b"123456789"])
def test_a_damaged_gzip_file_harms_nobody(dsn: str, tmp_path: Path, log: Path, junk: bytes) -> None:
    (tmp_path / "audit.jsonl.9.gz").write_bytes(junk)
    with following(dsn, tmp_path) as rig:
        append(log, lines(100, 1))
        log.rename(tmp_path / "audit.jsonl.1")
        log.write_bytes(lines(200, 1))
        rig.turn()
        assert "audit.jsonl.9.gz: " in str(rig.health.reasons())
        os.truncate(log, 0)  # truncation is still noticed
        append(log, lines(300, 1))
        rig.turn()
    assert outcomes(dsn) == {"fact": 103}
    assert count(dsn, "tail_files") == 3


def test_an_empty_gzip_file(dsn: str, tmp_path: Path, log: Path) -> None:
    log.rename(tmp_path / "audit.jsonl.1")
    log.write_bytes(b"")
    with following(dsn, tmp_path) as rig:
        log.rename(tmp_path / "audit.jsonl.2")
        log.write_bytes(lines(200, 2))
        zipped(tmp_path / "audit.jsonl.2")
        rig.turn()
        assert not rig.health.reasons()
    assert count(dsn, "tail_files") == 3
    assert outcomes(dsn) == {"fact": 102}


def test_a_gzip_file_beside_its_original(dsn: str, tmp_path: Path, log: Path) -> None:
    (tmp_path / "audit.jsonl.copy.gz").write_bytes(gzip.compress(log.read_bytes()))
    with following(dsn, tmp_path) as rig:
        append(log, lines(100, 5))
        rig.turn()
        assert not rig.health.reasons()
    assert count(dsn, "usage_facts") == 105
    assert_sound(dsn)


def test_start_at_the_end_leaves_archives_out(dsn: str, tmp_path: Path, log: Path) -> None:
    log.rename(tmp_path / "audit.jsonl.1")
    zipped(tmp_path / "audit.jsonl.1")
    log.write_bytes(lines(200, 3))
    with following(dsn, tmp_path, start_at_end=True) as rig:
        append(log, lines(300, 2))
        rig.turn()
    assert outcomes(dsn) == {"fact": 2}
    gaps = rows(dsn, "select start_offset, end_offset, reason from log_gaps order by end_offset")
    assert [tuple(gap.values()) for gap in gaps] == [
        (0, len(lines(200, 3)), "start_at"),
        (0, len(lines(0, 100)), "start_at"),
    ]
    assert_sound(dsn)


def test_many_archives_need_little_memory_and_are_read_once(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(1, 12):
        (tmp_path / f"audit.jsonl.{n}").write_bytes(lines(n * 1000, 300))
        zipped(tmp_path / f"audit.jsonl.{n}")
    with following(dsn, tmp_path, batch_lines_max=50):
        pass
    assert outcomes(dsn) == {"fact": 3400}
    assert_sound(dsn)
    # nor are they read through again after a restart
    monkeypatch.delattr(Archive, "step")
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 3400}


def test_killed_in_the_middle_of_an_archive(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audit.jsonl.1").write_bytes(lines(0, 400))
    zipped(tmp_path / "audit.jsonl.1")
    real = Ledger.commit
    commits: list[int] = []

    def commit(self: Ledger, *args: Any) -> Any:
        commits.append(1)
        if len(commits) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", commit)
        with pytest.raises(KeyboardInterrupt), following(dsn, tmp_path, batch_lines_max=50):
            pass
    assert 0 < outcomes(dsn)["fact"] < 400
    with following(dsn, tmp_path):
        pass
    assert outcomes(dsn) == {"fact": 400}
    assert_sound(dsn, {1: lines(0, 400)})


def test_a_position_that_moved_while_its_archive_was_read_through(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is to be compared at an offset that nobody asked for: once more, and no new file meanwhile."""
    with following(dsn, tmp_path):
        pass
    zipped(log)
    real = Archive.step
    monkeypatch.setattr(Archive, "step", lambda self, read_at, wanted: real(self, read_at, lambda _: ()))
    with following(dsn, tmp_path) as rig:
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 100}
    assert [state for _, state, _ in states(dsn)] == ["final"]


def test_the_live_log_does_not_wait_for_archives(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path) as rig:
        (tmp_path / "audit.jsonl.1").write_bytes(b"\n" * 30_000_000)
        zipped(tmp_path / "audit.jsonl.1")
        rig.follower.scan_soon()
        longest, turns = 0.0, 0
        append(log, lines(100, 1))
        while count(dsn, "usage_facts") < 101 or turns < 20:
            started = time.monotonic()
            rig.tailer._turn()
            longest, turns = max(longest, time.monotonic() - started), turns + 1
        assert turns < 25
        assert longest < 0.5


def test_a_compressed_file_is_read_again_if_an_operator_wants_it(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path):
        pass
    zipped(log)
    with following(dsn, tmp_path) as rig:
        (position,) = rig.follower.positions.values()
        assert position.path.endswith(".gz")
        own = LogFiles((f"{tmp_path}/audit*",), 4)
        request = parse_request(f"{position.path}=beginning")
        words = {"reset_id": "again", "source": "cli", "reason": "to see it again"}
        rig.ledger.reset(plan_reset(request, position, own, rig.ledger.range_start, **words))
        own.close()
        rig.tailer._load()
        rig.turn()
    assert outcomes(dsn) == {"replayed": 100}
    assert [state for _, state, _ in states(dsn)] == ["final"]


def test_the_line_of_a_call_is_shown_from_a_compressed_file(tmp_path: Path) -> None:
    content = lines(0, 3000)
    archive = tmp_path / "audit.jsonl.1.gz"
    archive.write_bytes(gzip.compress(content))
    locator = (archive.stat().st_dev, archive.stat().st_ino)
    start = len(lines(0, 2500))
    shown = read_range(str(archive), locator, content[:1024], start, start + len(line(2500)))
    assert shown == line(2500)
    assert "another one" in str(read_range(str(archive), locator, b"other", start, start + 10))
    assert "ends before" in str(read_range(str(archive), locator, content[:10], len(content) - 5, len(content) + 5))
    archive.write_bytes(gzip.compress(content)[:-100])
    assert "in the middle" in str(read_range(str(archive), locator, content[:1024], len(content) - 5, len(content)))
