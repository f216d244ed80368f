"""Files that come, go and change under the tailer: each case on real files and a real Postgres, turned by hand."""

import errno
import gzip
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import follower as follower_module
from billing_tailer.errors import LedgerUnavailable
from billing_tailer.files import LogFiles
from billing_tailer.follower import SILENT_SECONDS, Follower
from billing_tailer.ledger import Ledger
from billing_tailer.model import Verdict
from tests.support.follow import Rig, following
from tests.support.logfiles import append, replaced
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes, rows


def gaps(dsn: str) -> list[tuple[Any, ...]]:
    return [
        tuple(row.values()) for row in rows(dsn, "select start_offset, end_offset, reason from log_gaps order by 1")
    ]


def states(dsn: str) -> list[str]:
    return [row["state"] for row in rows(dsn, "select state from tail_files order by file_id")]


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """From now on, one element for each call of a method of LogFiles."""
    calls: list[str] = []
    real = getattr(LogFiles, name)

    def counted(self: LogFiles, *arguments: Any) -> Any:
        calls.append(name)
        return real(self, *arguments)

    monkeypatch.setattr(LogFiles, name, counted)
    return calls


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(lines(0, 10))
    return path


def test_a_scan_that_finds_what_the_last_one_found(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is not acted on; anything else is, and each scan after positions have moved."""
    acted: list[str] = []
    real = Follower._act_on

    def act_on(self: Follower, *arguments: Any) -> None:
        acted.append("")
        real(self, *arguments)

    monkeypatch.setattr(Follower, "_act_on", act_on)

    def acts(rig: Rig) -> bool:
        acted.clear()
        rig.follower.scan_soon()
        rig.follower.scan_if_due()
        return acted != []

    with following(dsn, tmp_path) as rig:
        acts(rig)
        assert not acts(rig)
        append(log, lines(10, 10))
        assert acts(rig)
        assert not acts(rig)
        rig.tailer._round()  # commits
        assert acts(rig)
        assert not acts(rig)
        rotated = log.rename(tmp_path / "audit.jsonl.1")
        assert acts(rig)  # which makes it a rotated one
        assert acts(rig)
        assert not acts(rig)
        rotated.unlink()
        acts(rig)
        assert not acts(rig)
        rig.follower._act_again -= SILENT_SECONDS  # time decides of a file that is gone
        assert acts(rig)
    assert states(dsn) == ["rotated"]


def test_a_new_file_that_cannot_be_opened_is_tried_again(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the directories have not changed since."""
    real = LogFiles.place_at

    def place_at(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LogFiles, "place_at", place_at)
    with following(dsn, tmp_path) as rig:
        rig.turn()
        assert outcomes(dsn) == {}
        monkeypatch.setattr(LogFiles, "place_at", real)
        rig.turn()
    assert outcomes(dsn) == {"fact": 10}


def test_waiting_for_a_compressed_file_that_goes_away(dsn: str, tmp_path: Path) -> None:
    """What is in the directories then is what was there before, and nothing is waited for."""
    (tmp_path / "callbacks-0.jsonl").write_bytes(b"")
    archive = tmp_path / "audit.jsonl.1.gz"
    with following(dsn, tmp_path, start_at_end=True) as rig:
        archive.write_bytes(gzip.compress(lines(0, 10)))
        rig.follower.scan_soon()
        rig.follower.scan_if_due()
        assert rig.health.reasons()
        archive.unlink()
        rig.follower.scan_soon()
        rig.follower.scan_if_due()
        assert not rig.health.reasons()


# --- many files that are gone ----------------------------------------------------------------------------------------


def compressed(rotated: Path, archive: Path) -> None:
    (archive / f"{rotated.name}.gz").write_bytes(gzip.compress(rotated.read_bytes()))
    rotated.unlink()


def moved_away(rotated: Path, archive: Path) -> None:
    rotated.rename(archive / rotated.name)


@pytest.mark.parametrize("rid_of", [lambda rotated, _: rotated.unlink(), compressed, moved_away])
def test_more_rotations_than_descriptors(
    dsn: str, tmp_path: Path, log: Path, rid_of: Callable[[Path, Path], None]
) -> None:
    """Files that are gone and committed do not keep the live log from being opened."""
    (tmp_path / "archive").mkdir()
    with following(dsn, tmp_path, open_files_max=8) as rig:
        for n in range(1, 15):
            rotated = tmp_path / f"audit.jsonl.{n}"
            log.rename(rotated)
            log.write_bytes(lines(n * 100, 10))
            rig.turn()
            rid_of(rotated, tmp_path / "archive")
            rig.turn()
            assert len(rig.files._handles) <= 8
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 150}
    assert_sound(dsn)


def test_what_is_gone_but_unread_is_never_let_go(dsn: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"audit-{n}.jsonl" for n in range(4)]
    for n, path in enumerate(paths):
        path.write_bytes(lines(100 + n, 1) + b"half a line")
    with following(dsn, tmp_path, open_files_max=4) as rig:
        for path in paths:
            path.unlink()
        (tmp_path / "audit.jsonl").write_bytes(lines(200, 1))
        rig.turn()
        assert len(rig.files._handles) == 4
        assert "all 4 descriptors" in str(rig.health.reasons())


def test_silent_for_a_day(dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a deleted file is final, its descriptor is closed and its space is free."""
    with following(dsn, tmp_path) as rig:
        log.unlink()
        rig.turn()
        assert states(dsn) == ["rotated"]
        assert len(rig.files._handles) == 1
        monkeypatch.setattr(follower_module, "FINAL_SECONDS", 0.0)
        rig.follower._act_again = 0.0
        rig.turn()
        assert len(rig.files._handles) == 0
        rig.turn()
    assert states(dsn) == ["final"]


def test_a_late_write_to_a_deleted_file_begins_its_day_anew(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path) as rig, log.open("ab", buffering=0) as writer:
        log.unlink()
        rig.turn()
        (before,) = rig.follower._gone.values()
        rig.turn()
        assert list(rig.follower._gone.values()) == [before]
        writer.write(lines(10, 5))
        rig.turn()
        (after,) = rig.follower._gone.values()
        assert after.since > before.since
    assert outcomes(dsn) == {"fact": 15}


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What replaced a file is believed at once, not after ten seconds of silence."""
    monkeypatch.setattr(follower_module, "SILENT_SECONDS", 0.0)


def test_atomic_replace_by_a_longer_copy(dsn: str, tmp_path: Path, log: Path) -> None:
    with following(dsn, tmp_path) as rig:
        replaced(log, lines(0, 20))
        rig.turn()
        assert outcomes(dsn) == {"fact": 10}
        assert "has more than the file it has replaced" in str(rig.health.reasons())


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("half", [b"", b"half "])
def test_atomic_replace_by_a_longer_copy_of_a_silent_file(dsn: str, tmp_path: Path, log: Path, half: bytes) -> None:
    append(log, half)
    with following(dsn, tmp_path) as rig:
        replaced(log, lines(0, 10) + half + b"a line\n" + lines(11, 9))
        rig.turn()
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 19, "dead_letter": 1}
    assert count(dsn, "tail_files") == 1
    assert_sound(dsn, {1: log.read_bytes()})


@pytest.mark.usefixtures("no_patience")
def test_a_replaced_file_that_is_written_again(dsn: str, tmp_path: Path, log: Path) -> None:
    """Its writer was not gone: what it writes is a file of its own, whose old calls are replays."""
    with following(dsn, tmp_path) as rig, log.open("ab", buffering=0) as writer:
        replaced(log, lines(0, 20))
        rig.turn()
        writer.write(lines(20, 5))
        rig.turn()
        rig.turn()
    assert outcomes(dsn) == {"fact": 25, "replayed": 10}
    assert count(dsn, "usage_facts") == 25
    assert_sound(dsn)


@pytest.mark.usefixtures("no_patience")
def test_a_volume_swapped_for_a_copy(dsn: str, tmp_path: Path) -> None:
    volume = tmp_path / "billing"
    volume.mkdir()
    log = volume / "audit.jsonl"
    log.write_bytes(lines(0, 10))
    with following(dsn, volume) as rig:
        volume.rename(tmp_path / "old")
        rig.turn()
        shutil.copytree(tmp_path / "old", volume)
        append(log, lines(10, 10))
        rig.turn()
        assert not rig.health.reasons()
    assert outcomes(dsn) == {"fact": 20}
    assert_sound(dsn, {1: log.read_bytes()})


@pytest.mark.parametrize("first", [b"\n", lines(0, 10)])
def test_a_longer_copy_beside_its_original(dsn: str, tmp_path: Path, first: bytes) -> None:
    (tmp_path / "audit-a.jsonl").write_bytes(first)
    with following(dsn, tmp_path) as rig:
        (tmp_path / "audit-b.jsonl").write_bytes(first + lines(10, 10))
        rig.turn()
        assert not rig.health.reasons()
    assert count(dsn, "usage_facts") == 10 + (len(first) > 1) * 10
    assert_sound(dsn)


# --- bytes that were seen and destroyed ------------------------------------------------------------------------------


def test_half_a_line_rewritten_shorter_before_the_next_scan(dsn: str, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"x" * 5000)
    with following(dsn, tmp_path) as rig:
        log.write_bytes(line(1))
        rig.follower._next_scan = time.monotonic() + 60  # a scan is not due yet
        rig.tailer._round()
        rig.turn()
    assert gaps(dsn) == [(0, 5000, "truncated")]
    assert outcomes(dsn) == {"fact": 1}
    assert_sound(dsn)


@pytest.mark.parametrize("scan_due", [True, False])
def test_half_a_line_cut_away(dsn: str, tmp_path: Path, log: Path, scan_due: bool) -> None:
    """In the middle of the file: the lines before it are read again, as replays, from 0."""
    whole = log.stat().st_size
    append(log, b"x" * 5000)
    with following(dsn, tmp_path) as rig:
        os.truncate(log, whole)
        append(log, line(11))
        if not scan_due:
            rig.follower._next_scan = time.monotonic() + 60
            rig.tailer._round()
        rig.turn()
    assert gaps(dsn) == [(whole, whole + 5000, "truncated")]
    assert outcomes(dsn) == {"fact": 11, "replayed": 10}
    assert_sound(dsn, {2: log.read_bytes()})


@pytest.mark.parametrize("instead", [lines(10, 20), lines(10, 1000)])
def test_a_long_line_cut_away_while_it_streams(dsn: str, tmp_path: Path, log: Path, instead: bytes) -> None:
    """Nothing is committed of a line that is not there any more."""
    whole = log.stat().st_size
    append(log, b"x" * 500_000)
    with following(dsn, tmp_path) as rig:
        os.truncate(log, whole)
        append(log, instead)
        rig.follower._next_scan = time.monotonic() + 60
        for _ in range(5):
            rig.tailer._round()
        rig.turn()
    assert count(dsn, "dead_letters") == 0
    assert count(dsn, "usage_facts") == 10 + instead.count(b"\n")
    assert_sound(dsn, {2: log.read_bytes()})


def test_copied_and_truncated_between_listing_and_comparison(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is younger than the listing: no gap for what stands in it."""
    with following(dsn, tmp_path) as rig:
        append(log, lines(10, 10))
        real = LogFiles.scan

        def scan(self: LogFiles, *wanted: Any) -> Any:
            seen = real(self, *wanted)
            if not (tmp_path / "audit.jsonl.1").exists():
                shutil.copyfile(log, tmp_path / "audit.jsonl.1")
                os.truncate(log, 0)
            return seen

        monkeypatch.setattr(LogFiles, "scan", scan)
        rig.turn()
    assert gaps(dsn) == []
    assert outcomes(dsn) == {"fact": 20}
    assert_sound(dsn)


def test_a_copy_that_lacks_the_last_lines(dsn: str, tmp_path: Path, log: Path) -> None:
    """copytruncate loses what is written between the copy and the truncation: exactly that is declared."""
    with following(dsn, tmp_path) as rig:
        append(log, lines(10, 5))
        shutil.copyfile(log, tmp_path / "audit.jsonl.1")
        copied = log.stat().st_size
        append(log, b"half a line that only the original had")
        seen = log.stat().st_size
        rig.turn()
        os.truncate(log, 0)
        rig.turn()
    assert gaps(dsn) == [(copied, seen, "truncated")]
    assert count(dsn, "usage_facts") == 15
    assert_sound(dsn)


def test_deleted_while_postgres_is_away(dsn: str, tmp_path: Path, log: Path) -> None:
    """What was seen is held open: three rotations, each deleted, before Postgres is back."""
    with following(dsn, tmp_path) as rig:
        rig.ledger.close()
        for n in (1, 2, 3):
            log.rename(tmp_path / f"audit.jsonl.{n}")
            log.write_bytes(lines(n * 10, 10))
            rig.follower.show(time.time(), waiting=True)
            (tmp_path / f"audit.jsonl.{n}").unlink()
        rig.ledger.lost(LedgerUnavailable("away"))
        while rig.tailer._turn():
            pass
        rig.turn()
    assert outcomes(dsn) == {"fact": 40}
    assert gaps(dsn) == []
    assert_sound(dsn)


# --- what the operating system refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_held_file_that_cannot_be_looked_at(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, elsewhere = os.fstat, tmp_path / "elsewhere"
    elsewhere.mkdir()
    with following(dsn, tmp_path) as rig:
        held = {handle.fd for handle in rig.files._handles.values()}

        def fstat(fd: int) -> os.stat_result:
            if fd in held:
                raise OSError(code, os.strerror(code))
            return real(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", fstat)
            append(log, lines(10, 1))
            rig.tailer._turn()
            log.rename(elsewhere / "audit.jsonl")
            rig.follower.scan_soon()
            rig.tailer._turn()
            assert os.strerror(code) in str(rig.health.reasons())
        (elsewhere / "audit.jsonl").rename(log)
        rig.turn()
    assert outcomes(dsn) == {"fact": 11}
    assert states(dsn) == ["live"]


def failing_at(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """A bad sector: the kernel returns what it read before it, and says why only to the next read."""
    real, real_vector = os.pread, os.preadv

    def readable(offset: int) -> int:
        if offset >= bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return bad - offset

    def pread(fd: int, size: int, offset: int) -> bytes:
        return real(fd, min(size, readable(offset)), offset)

    def preadv(fd: int, buffers: Sequence[bytearray], offset: int) -> int:
        left = readable(offset)
        first, second = (memoryview(buffer) for buffer in buffers)
        return real_vector(fd, [first[:left], second[: max(0, left - len(first))]], offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("line_bytes_max", [1 << 16, 1024])
def test_a_bad_sector(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, line_bytes_max: int
) -> None:
    """Everything before it is committed, and /readyz says where it stops; nobody spins."""
    append(log, lines(10, 90) + b"y" * 5000 + b"\n" + lines(100, 100))
    with monkeypatch.context() as patch:
        failing_at(patch, len(lines(0, 100)) + 3000)
        with following(dsn, tmp_path, line_bytes_max=line_bytes_max) as rig:
            assert "cannot be read" in str(rig.health.reasons())
            assert outcomes(dsn) == {"fact": 100}
            assert not any(rig.tailer._turn() for _ in range(5))
    with following(dsn, tmp_path):
        pass
    assert outcomes(dsn) == {"fact": 200, "dead_letter": 1}
    assert_sound(dsn, {1: log.read_bytes()})


def test_an_unreadable_file_does_not_make_every_round_scan(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "audit-bad.jsonl"
    bad.write_bytes(lines(1000, 1))
    with following(dsn, tmp_path) as rig:
        real = LogFiles.read

        def read(self: LogFiles, position: Any, *rest: Any) -> Any:
            return Verdict.UNREADABLE if position.path == str(bad) else real(self, position, *rest)

        monkeypatch.setattr(LogFiles, "read", read)
        scans = calls_of(monkeypatch, "scan")
        append(bad, lines(1001, 1))
        for n in range(100):
            append(log, lines(10 + n, 1))
            rig.tailer._turn()
        assert outcomes(dsn) == {"fact": 111}
        assert len(scans) < 20


def test_a_path_longer_than_an_index_entry(dsn: str, tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*(os.urandom(100).hex() for _ in range(15)))
    directory.mkdir(parents=True)
    (directory / "audit.jsonl").write_bytes(lines(0, 10))
    with following(dsn, directory):
        pass
    assert outcomes(dsn) == {"fact": 10}


# --- the loop around it ----------------------------------------------------------------------------------------------


def test_many_known_and_many_new_files(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files that begin alike are compared, whatever their number."""
    for n in range(300):
        (tmp_path / f"audit-{n}.jsonl").write_bytes(lines(n * 10, 2))
    with following(dsn, tmp_path) as rig:
        looks = calls_of(monkeypatch, "judge")
        for n in range(300, 600):
            (tmp_path / f"audit-{n}.jsonl").write_bytes(lines(n * 10, 2))
        rig.follower.scan_soon()
        rig.follower.scan_if_due()
        assert len(looks) <= 300
        rig.turn()
    assert outcomes(dsn) == {"fact": 1200}


def test_more_new_files_than_one_transaction_takes(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower_module, "NEW_FILES_MAX", 7)
    for n in range(30):
        (tmp_path / f"audit-{n}.jsonl").write_bytes(lines(n * 10, 2))
    with following(dsn, tmp_path):
        pass
    assert outcomes(dsn) == {"fact": 60}


def test_more_files_to_begin_at_their_ends_than_one_transaction_takes(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "NEW_FILES_MAX", 7)
    for n in range(30):
        (tmp_path / f"audit-{n}.jsonl").write_bytes(lines(n * 10, 2))
    with following(dsn, tmp_path, start_at_end=True):
        pass
    assert outcomes(dsn) == {}
    assert len(gaps(dsn)) == 30


def test_a_long_scan_ticks(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(50):
        (tmp_path / f"audit-{n}.jsonl").write_bytes(lines(n * 10, 2))
    with following(dsn, tmp_path) as rig:
        ticks: list[int] = []
        monkeypatch.setattr(rig.health, "tick", lambda: ticks.append(1))
        rig.follower.scan_soon()
        rig.follower.scan_if_due()
        assert len(ticks) >= 50


def test_connecting_works_and_writing_does_not(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica, a full disk: the loop waits longer and longer instead of connecting a hundred times a second."""
    with following(dsn, tmp_path) as rig:
        waits: list[float] = []
        real_wait, real_commit = rig.tailer._stop.wait, Ledger.commit

        def wait(seconds: float | None = None) -> bool:
            waits.append(seconds or 0)
            return real_wait(0)

        def commit(self: Ledger, *args: Any) -> Any:
            if len(waits) >= 8:
                return real_commit(self, *args)
            raise LedgerUnavailable("cannot execute INSERT in a read-only transaction")

        monkeypatch.setattr(rig.tailer._stop, "wait", wait)
        monkeypatch.setattr(Ledger, "commit", commit)
        append(log, lines(10, 10))
        while rig.tailer._turn():
            pass
        assert waits[:4] == [0.05, 0.1, 0.2, 0.4]
        assert max(waits) == 1.0
    assert outcomes(dsn) == {"fact": 20}


def test_a_count_of_dead_letters_that_takes_too_long(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log comes first."""

    def slow(_: Ledger) -> int:
        time.sleep(0.3)
        raise LedgerUnavailable("canceling statement due to statement timeout")

    monkeypatch.setattr("billing_tailer.tailer.CHECK_SECONDS", 0.25)
    with following(dsn, tmp_path) as rig:
        monkeypatch.setattr(Ledger, "open_dead_letters", slow)
        append(log, lines(10, 10))
        rig.tailer._next_check = 0
        for _ in range(20):
            rig.tailer._turn()
    assert outcomes(dsn) == {"fact": 20}


def test_a_refused_row_of_a_line_that_is_gone(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no line to make a dead letter of: the file is looked at again."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("alter table billing.usage_facts add check (run_id <> 'poison')")
    with following(dsn, tmp_path) as rig:
        append(log, line(10) + line(11, run_id="poison") + line(12))
        size = log.stat().st_size
        real = Ledger.find_refused

        def find_refused(self: Ledger, plan: Any) -> dict[int, str]:
            found = real(self, plan)
            log.write_bytes(b"")
            return found

        monkeypatch.setattr(Ledger, "find_refused", find_refused)
        rig.turn()
    assert gaps(dsn) == [(len(lines(0, 10)), size, "truncated")]
    assert outcomes(dsn) == {"fact": 10}
    assert_sound(dsn)


def test_half_a_line_is_not_read_again_and_again(
    dsn: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(log, line(10)[:-20])
    with following(dsn, tmp_path) as rig:
        reads = calls_of(monkeypatch, "read")
        for _ in range(10):
            rig.tailer._turn()
        assert len(reads) <= 1
        append(log, line(10)[-20:])
        rig.turn()
    assert outcomes(dsn) == {"fact": 11}
    assert_sound(dsn, {1: log.read_bytes()})
