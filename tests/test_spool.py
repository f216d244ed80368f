import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from billing_tailer import spend
from billing_tailer.errors import ConfigError
from billing_tailer.files import LogFiles
from billing_tailer.spool import TORN, Spool, SpoolError

ROOM = 1 << 30
WAIT_SECONDS = 5.0
DAY = 86400.0


class Desk:
    """A spool under test, with what it reported."""

    def __init__(self, directory: Path, bytes_max: int = ROOM, **options: int) -> None:
        self.reports: list[str | None] = []
        self.spool = Spool(directory, bytes_max, self.reports.append, **options)
        self.spool.start()

    def put(self, *lines: str) -> None:
        self.spool.append("".join(f"{line}\n" for line in lines).encode()).result(WAIT_SECONDS)

    def refuse(self, data: bytes = b"{}\n") -> str:
        with pytest.raises(SpoolError) as caught:
            self.spool.append(data).result(WAIT_SECONDS)
        return caught.value.message


@pytest.fixture
def open_desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(directory: Path = tmp_path, bytes_max: int = ROOM, **options: int) -> Desk:
        desks.append(Desk(directory, bytes_max, **options))
        return desks[-1]

    yield make
    for desk in desks:
        desk.spool.stop()


def spooled(directory: Path) -> list[Path]:
    return sorted(directory.glob("callbacks-*.jsonl"))


def lines_of(directory: Path) -> list[bytes]:
    return [line for path in spooled(directory) for line in path.read_bytes().splitlines(keepends=True)]


def numbers(directory: Path) -> list[int]:
    """What every whole line holds; torn ones are left out, any other line fails."""
    return [json.loads(line) for line in lines_of(directory) if not line.endswith(TORN + b"\n")]


def dead_file(directory: Path, content: bytes, number: int = 0) -> Path:
    path = directory / f"callbacks-{'ab' * 16}-{number:06d}.jsonl"
    path.write_bytes(content)
    return path


@pytest.fixture
def keeping_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing_tailer.spool.KEEPING_SECONDS", 0.01)


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- writing


def test_what_is_acknowledged_is_in_the_file(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    desk = open_desk()
    desk.put("1", "2")
    desk.put("3")
    assert lines_of(tmp_path) == [b"1\n", b"2\n", b"3\n"]
    (path,) = spooled(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert desk.reports == []


def test_the_reader_and_the_writer_mean_the_same_mark() -> None:
    assert spend.TORN_BYTE == TORN


def test_one_fsync_serves_all_who_wait(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_desk()
    slow, syncs = threading.Event(), 0
    real = os.fsync

    def fsync(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        assert slow.wait(WAIT_SECONDS)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    first = desk.spool.append(b"0\n")
    while syncs == 0:
        time.sleep(0.001)
    others = [desk.spool.append(f"{number}\n".encode()) for number in range(1, 300)]
    assert not first.done()
    assert not any(other.done() for other in others)
    slow.set()
    for future in (first, *others):
        future.result(WAIT_SECONDS)
    assert syncs == 2
    assert numbers(tmp_path) == list(range(300))


def test_many_threads_lose_nothing_and_mix_nothing(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(file_bytes_max=3000)

    def write(first: int) -> None:
        for number in range(first, first + 50):
            desk.put(str(number))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 1000, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(tmp_path)) == list(range(1000))
    assert len(spooled(tmp_path)) > 1


def test_the_next_file_begins_at_the_size_limit(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(file_bytes_max=10)
    for number in range(6):
        desk.put(f"{number:04d}".replace("0", "1"))
    assert [path.stat().st_size for path in spooled(tmp_path)] == [10, 10, 10]
    assert [path.name[-12:-6] for path in spooled(tmp_path)] == ["000000", "000001", "000002"]


def test_a_caller_who_stops_waiting_does_not_hurt_the_others(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    desk = open_desk()
    left: Future[None] = desk.spool.append(b"1\n")
    assert not left.cancel()
    desk.put("2")
    assert numbers(tmp_path) == [1, 2]
    assert desk.spool.alive()


def test_stop_writes_what_waits_and_removes_an_empty_file(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    waiting = [desk.spool.append(f"{number}\n".encode()) for number in range(100)]
    desk.spool.stop()
    assert all(future.done() and future.exception() is None for future in waiting)
    assert numbers(tmp_path) == list(range(100))
    assert desk.refuse() == "the spool is closed"
    assert not desk.spool.alive()
    Desk(tmp_path / "other").spool.stop()
    assert spooled(tmp_path / "other") == []


def test_nobody_waits_for_a_thread_that_failed(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_desk()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fail(_: int) -> None:
        raise RuntimeError

    monkeypatch.setattr(os, "fsync", fail)
    waiting = [desk.spool.append(b"1\n") for _ in range(10)]
    for future in waiting:
        assert isinstance(future.exception(WAIT_SECONDS), SpoolError)
    assert "failed" in str(desk.reports[-1])
    desk.spool._thread.join(WAIT_SECONDS)
    assert not desk.spool.alive()
    assert desk.refuse() == "the spool is closed"


# --- trouble


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("the disk that gets full is a tmpfs, and this user may not mount one")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_refuses_everyone_and_recovers(tiny_disk: Path, open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(tiny_disk)
    filler = tiny_disk / "filler"
    acknowledged: list[int] = []
    refused: list[str] = []
    for number in range(10**6, 10**6 + 300):
        if number == 10**6 + 200:
            filler.unlink()
        elif number == 10**6 + 100:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
        try:
            desk.put(*[str(number)] * 100)
            acknowledged.append(number)
        except SpoolError as error:
            refused.append(error.message)
    assert len(refused) >= 50
    assert set(refused) == {f"{tiny_disk}: No space left on device"}
    assert acknowledged[:100] == list(range(10**6, 10**6 + 100))
    assert acknowledged[-100:] == list(range(10**6 + 200, 10**6 + 300))
    found = numbers(tiny_disk)
    assert [number for number in sorted(set(found)) if found.count(number) == 100] == acknowledged
    assert len(spooled(tiny_disk)) <= 2
    assert desk.reports[-1] is None
    assert len(desk.reports) == 2, "told once that it is full, once that it is well"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failure_in_the_middle_refuses_all_who_wait(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    desk = open_desk()
    desk.put("1")
    real_write, real_fsync = os.write, os.fsync
    broken = threading.Event()
    broken.set()

    def write(fd: int, data: bytes) -> int:
        if broken.is_set() and call == "write":
            if len(data) > 2:
                return real_write(fd, bytes(data)[:2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, data)

    def fsync(fd: int) -> None:
        if broken.is_set() and call == "fsync":
            raise OSError(errno.EIO, "Input/output error")
        real_fsync(fd)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(5):
        waiting = [desk.spool.append(b"2\n3\n4") for _ in range(20)]
        errors = [future.exception(WAIT_SECONDS) for future in waiting]
        assert all(isinstance(error, SpoolError) for error in errors)
        assert len(set(map(id, errors))) == len(errors)
    assert len(desk.reports) == 1
    broken.clear()
    desk.put("5")
    assert desk.reports[-1] is None
    assert len(spooled(tmp_path)) <= 2, "a sick disk does not get a file per attempt"
    assert lines_of(tmp_path)[0] == b"1\n"
    assert lines_of(tmp_path)[-1] == b"5\n"
    assert all(path.read_bytes()[-1:] == b"\n" for path in spooled(tmp_path))


@pytest.mark.usefixtures("keeping_often")
def test_bytes_max_counts_everybodys_files(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    dead_file(tmp_path, b"x" * 60 + b"\n")
    desk = open_desk(bytes_max=100)
    desk.put("1" * 29)
    assert "full (100 bytes)" in desk.refuse(b"1" * 29 + b"\n")
    assert desk.reports == [f"{tmp_path}: the spool is full (100 bytes)"]
    time.sleep(0.1)
    assert len(desk.reports) == 1, "there is room, but not for what was refused"
    assert desk.spool.janitor(lambda _path, _size: True, 0, time.time() + 1) != ()
    wait_for(lambda: desk.reports[-1] is None)
    desk.put("1" * 29)
    assert len(desk.reports) == 2


def test_a_vanished_directory_is_not_made_anew(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    directory = tmp_path / "spool"
    desk = open_desk(directory)
    desk.put("1")
    directory.rename(tmp_path / "away")
    assert "No such file" in desk.refuse()
    assert not directory.exists(), "it may be a mount that is gone for a moment"
    (tmp_path / "away").rename(directory)
    desk.put("2")
    assert numbers(directory) == [1, 2]


def test_nothing_goes_into_a_file_that_was_removed(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    desk = open_desk()
    desk.put("1")
    spooled(tmp_path)[0].unlink()
    desk.put("2")
    assert numbers(tmp_path) == [2]


def test_a_directory_that_cannot_be_used_is_misconfiguration(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"BILLING_TAILER_SPOOL_DIR=.*/file"):
        Desk(tmp_path / "file")


def test_a_disk_that_is_full_at_the_start_is_none(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        desk = open_desk()
        assert "No space left" in desk.refuse()
    desk.put("1")
    assert numbers(tmp_path) == [1]
    assert desk.reports == [f"{tmp_path}: No space left on device", None]


# --- who reads what


def test_two_living_processes_side_by_side(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    ours, theirs = open_desk(file_bytes_max=10), open_desk()
    ours.put("1")
    theirs.put("2")
    (our_file,) = [path for path in spooled(tmp_path) if path.read_bytes() == b"1\n"]
    (their_file,) = [path for path in spooled(tmp_path) if path.read_bytes() == b"2\n"]
    assert ours.spool.readable_bytes(bytes(our_file))
    assert theirs.spool.readable_bytes(bytes(their_file))
    assert not ours.spool.readable_bytes(bytes(their_file))
    assert not theirs.spool.readable_bytes(bytes(our_file))
    ours.put("123456789")
    ours.put("3")
    assert theirs.spool.readable_bytes(bytes(our_file)), "it is finished"
    ours.spool.stop()
    assert all(theirs.spool.readable_bytes(bytes(path)) for path in spooled(tmp_path))


@pytest.mark.parametrize("name", ["audit.jsonl", "callbacks-x.jsonl", f"callbacks-{'ab' * 16}-000009.jsonl"])
def test_other_and_missing_files_are_not_ours(tmp_path: Path, open_desk: Callable[..., Desk], name: str) -> None:
    assert not open_desk().spool.readable_bytes(bytes(tmp_path / name))


def test_a_dead_writers_torn_end_is_marked_once(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    torn, whole, empty = (
        dead_file(tmp_path, content, number) for number, content in enumerate([b"1\n{tor", b"2\n", b""])
    )
    for _ in range(2):
        desk = open_desk()
        for _ in range(2):
            assert all(desk.spool.readable_bytes(bytes(path)) for path in (torn, whole, empty))
    assert [path.read_bytes() for path in (torn, whole, empty)] == [b"1\n{tor\x18\n", b"2\n", b""]


def test_a_torn_file_that_cannot_be_marked_is_reported_and_tried_again(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dead_file(tmp_path, b"{tor")
    desk = open_desk()

    def write(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert not desk.spool.readable_bytes(bytes(path))
    assert desk.reports == [f"{path}: Read-only file system"]
    desk.put("1")
    assert desk.reports[-1] is not None, "writing well does not heal it"
    assert desk.spool.readable_bytes(bytes(path))
    assert desk.reports[-1] is None


def test_no_file_is_seen_before_it_is_locked(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Path]] = []
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        seen.append(spooled(tmp_path))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    open_desk()
    assert seen == [[]]
    assert len(spooled(tmp_path)) == 1


WRITER = """
import sys
from pathlib import Path
from billing_tailer.spool import Spool
spool = Spool(Path(sys.argv[1]), 1 << 30, print)
spool.start()
waiting = []
for number in range(int(sys.argv[2]), 10**7):
    waiting.append((number, spool.append(b"%d" % number * 50 + b"\\n")))
    if len(waiting) >= 20:
        number, future = waiting.pop(0)
        future.result()
        print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    acknowledged: list[int] = []
    for start in (10**6, 2 * 10**6, 3 * 10**6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(start)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _, line in zip(range(200), process.stdout, strict=False):
            acknowledged.append(int(line))
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().splitlines()]
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    with (spooled(tmp_path)[0]).open("ab") as file:
        file.write(b"123")  # a write that came half way: SIGKILL alone rarely tears one
    desk = open_desk()
    assert all(desk.spool.readable_bytes(bytes(path)) is not None for path in spooled(tmp_path))
    lines = [line for line in lines_of(tmp_path) if not line.endswith(TORN + b"\n")]
    assert all(len(line) == 351 for line in lines)
    found = [int(line[:7]) for line in lines]
    assert len(acknowledged) >= 600
    assert len(set(acknowledged)) == len(acknowledged)
    assert {number for number in acknowledged if found.count(number) != 1} == set()


def test_nothing_is_read_before_it_is_on_disk(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could be committed, and be gone after a power cut: the position would lie behind the end."""
    desk = open_desk()
    desk.put("1")
    files = LogFiles([desk.spool.glob], 8, desk.spool.readable_bytes)
    (seen,) = files.scan().files
    assert files.read_at(seen, 0, 100) == b"1\n"
    go, entered = threading.Event(), threading.Event()
    real = os.fsync

    def fsync(fd: int) -> None:
        entered.set()
        assert go.wait(WAIT_SECONDS)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    waiting = desk.spool.append(b"2\n")
    assert entered.wait(WAIT_SECONDS)
    assert spooled(tmp_path)[0].read_bytes() == b"1\n2\n"
    assert files.read_at(seen, 0, 100) == b"1\n"
    assert files.held_size(seen.locator) == 2
    assert files.scan().files[0].size == 2
    go.set()
    waiting.result(WAIT_SECONDS)
    assert files.read_at(seen, 0, 100) == b"1\n2\n"
    assert files.held_size(seen.locator) == 4
    files.close()


# --- a standby


def handed_over(directory: Path) -> list[Path]:
    return sorted(directory.glob("handed-over-*"))


@pytest.mark.usefixtures("keeping_often")
def test_a_standby_hands_over_what_it_took(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    standby = open_desk()
    standby.spool.committer = lambda: "another"
    for number in range(5):
        standby.put(str(number))
        wait_for(lambda: spooled(tmp_path) == [])
    assert len(handed_over(tmp_path)) == 5
    assert spooled(tmp_path) == []
    active = open_desk()
    active.put("5")
    time.sleep(0.1)
    assert len(handed_over(tmp_path)) == 5, "nobody knows yet that it commits"
    active.spool.committer = lambda: "us"
    wait_for(lambda: handed_over(tmp_path) == [])
    assert sorted(numbers(tmp_path)) == list(range(6))
    (path,) = spooled(tmp_path)
    assert active.spool.readable_bytes(bytes(path)), "one file, and one position, for all of it"
    wait_for(lambda: not active.spool.has_more)
    assert standby.reports == active.reports == []


@pytest.mark.usefixtures("keeping_often")
def test_lines_are_copied_whole_and_in_bounded_pieces(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing_tailer.spool.COPY_BYTES", 100)
    (tmp_path / f"handed-over-{dead_file(tmp_path, b'').name}").write_bytes(
        b"".join(b"1%030d\n" % number for number in range(50)) + b"{tor"
    )
    active = open_desk(file_bytes_max=300)
    active.spool.committer = lambda: "us"
    wait_for(lambda: handed_over(tmp_path) == [])
    assert [number - 10**30 for number in numbers(tmp_path)] == list(range(50))
    assert lines_of(tmp_path)[-1] == b"{tor" + TORN + b"\n"
    assert len(spooled(tmp_path)) > 4


@pytest.mark.usefixtures("keeping_often")
def test_a_full_disk_loses_nothing_that_is_handed_over(tiny_disk: Path, open_desk: Callable[..., Desk]) -> None:
    standby, active = open_desk(tiny_disk), open_desk(tiny_disk)
    active.put("0")
    standby.put(*["1" * 999] * 50)
    filler = tiny_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    standby.spool.committer = lambda: "another"
    active.spool.committer = lambda: "us"
    wait_for(lambda: active.reports)
    assert active.reports == [f"{tiny_disk}: No space left on device"]
    assert active.spool.has_more
    assert len(handed_over(tiny_disk)) == 1
    filler.unlink()
    wait_for(lambda: handed_over(tiny_disk) == [])
    wait_for(lambda: active.reports[-1] is None)
    assert numbers(tiny_disk).count(int("1" * 999)) >= 50
    assert len(active.reports) == 2


@pytest.mark.usefixtures("keeping_often")
def test_a_file_with_a_position_keeps_its_name(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    """The process that committed stands by now: another one goes on where it was."""
    desk, other = open_desk(), open_desk()
    desk.spool.committer = lambda: "us"
    desk.put("1")
    desk.put("2")
    (path,) = [path for path in spooled(tmp_path) if path.stat().st_size]
    wait_for(lambda: desk.spool._file is not None and desk.spool._file.followed)
    assert not other.spool.readable_bytes(bytes(path))
    desk.spool.committer = lambda: "another"
    wait_for(lambda: other.spool.readable_bytes(bytes(path)))
    assert handed_over(tmp_path) == []
    desk.put("3")
    wait_for(lambda: len(handed_over(tmp_path)) == 1)


def test_a_file_is_on_disk_before_it_is_read(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process wrote and did not sync could be committed, and then be gone after a power cut."""
    desk, path = open_desk(), dead_file(tmp_path, b"1\n")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    assert desk.spool.readable_bytes(bytes(path))
    assert synced == [path.stat().st_ino]


@pytest.mark.usefixtures("keeping_often")
def test_a_torn_line_ends_although_nobody_posts(
    tmp_path: Path, open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_desk()
    desk.put("1")
    real = os.write

    def write(fd: int, data: bytes) -> int:
        if len(data) > 2:
            return real(fd, bytes(data)[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert "No space left" in desk.refuse(b"12345\n")
        assert lines_of(tmp_path) == [b"1\n", b"1234"]
        assert len(desk.reports) == 1
    wait_for(lambda: lines_of(tmp_path)[-1] == b"1234" + TORN + b"\n")
    wait_for(lambda: desk.reports[-1] is None)
    assert len(desk.reports) == 2, "the alarm ended, too"


# --- the janitor


def test_the_janitor_removes_only_what_is_finished_old_and_committed(
    tmp_path: Path, open_desk: Callable[..., Desk]
) -> None:
    ours, theirs = open_desk(file_bytes_max=2), open_desk()
    theirs.put("1")
    ours.put("2")
    ours.put("3")
    dead, uncommitted, torn = (
        dead_file(tmp_path, content, number) for number, content in enumerate([b"4\n", b"5\n", b"{tor"])
    )
    unborn = tmp_path / f".{dead.name}"
    unborn.touch()
    other = tmp_path / "audit.jsonl"
    other.touch()
    current = [path for path in spooled(tmp_path) if path.read_bytes() in (b"1\n", b"3\n")]
    (rotated,) = [path for path in spooled(tmp_path) if path.read_bytes() == b"2\n"]
    asked: dict[bytes, int] = {}

    def may_delete(path: bytes, size: int) -> bool:
        asked[path] = size
        return path not in (bytes(uncommitted), bytes(torn))

    now = time.time()
    assert ours.spool.janitor(may_delete, 7 * DAY, now) == ()
    assert asked == {}
    removed = ours.spool.janitor(may_delete, 7 * DAY, now + 8 * DAY)
    assert set(removed) == {bytes(dead), bytes(rotated), bytes(unborn)}
    assert asked == {bytes(dead): 2, bytes(uncommitted): 2, bytes(torn): 6, bytes(rotated): 2}
    assert set(tmp_path.iterdir()) == {*current, uncommitted, torn, other}
    ours.put("6")
    theirs.put("7")
    assert ours.reports == theirs.reports == []


def test_committed_files_make_room(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    """Half of the room is for what is not committed; the oldest go first, and none that is not."""
    desk = open_desk(bytes_max=1000)
    files = [dead_file(tmp_path, b"1" * 99 + b"\n", number) for number in range(9)]
    for number, path in enumerate(files):
        os.utime(path, (time.time() - DAY + number,) * 2)
    uncommitted = {bytes(files[0])}
    removed = desk.spool.janitor(lambda path, _: path not in uncommitted, 7 * DAY, time.time())
    assert removed == tuple(map(bytes, files[1:5]))
    assert desk.spool.janitor(lambda path, _: path not in uncommitted, 7 * DAY, time.time()) == ()


def test_a_small_spool_that_was_full_is_not_full_for_ever(tmp_path: Path, open_desk: Callable[..., Desk]) -> None:
    """The file in use cannot be removed, so that it must not be the whole spool."""
    desk = open_desk(bytes_max=1 << 20)
    for _ in range(2):
        while desk.reports[-1:] in ([], [None]):
            with contextlib.suppress(SpoolError):
                desk.put("1" * 9999)
        assert desk.spool.janitor(lambda _path, _size: True, 7 * DAY, time.time()) != ()
        desk.put("2")
        assert desk.reports[-1] is None
    assert "full" in (desk.reports[0] or "")


def test_the_janitor_and_the_writer_work_at_the_same_time(
    open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing_tailer.spool.USED_SECONDS_MAX", 0.0)
    desk = open_desk(file_bytes_max=100)
    stop = threading.Event()
    removed: list[bytes] = []

    def clean() -> None:
        while not stop.is_set():
            removed.extend(desk.spool.janitor(lambda _path, _size: True, 0, time.time() + 1))

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for number in range(300):
            desk.put(f"1{number:049d}")
    finally:
        stop.set()
        cleaner.join()
    assert desk.reports == []
    assert removed
