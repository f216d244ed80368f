"""What the machine does: mounts that go and come, calls that fail, clocks that jump, a crowd of files."""

import errno
import gzip
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from billing_tailer import files as files_module
from tests.scenarios.outcome import assert_exactly, states
from tests.support.daemon import Daemon
from tests.support.follow import following
from tests.support.logfiles import append
from tests.support.loglines import line, lines
from tests.support.proof import count, rows
from tests.torture.steps import Steps


@pytest.mark.parametrize("instead", ["nothing", "an empty directory"])
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "restarted meanwhile"])
def test_mount_missing_for_5_s(
    dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, instead: str, stopped: bool
) -> None:
    """Whether the mount point is gone or empty: no position is lost, nothing is read again, nothing is a gap."""
    late, steady = 0.0, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: steady() + late)
    mount, away, elsewhere = log.parent, log.parent.with_name("away"), log.parent.with_name("elsewhere")
    log.write_bytes(lines(0, 10))
    log.with_name("audit.jsonl.1").write_bytes(lines(100, 10))
    elsewhere.mkdir()
    globs = (f"{mount}/audit*.jsonl*", f"{elsewhere}/audit*.jsonl*")
    # a copy that goes on by itself: nobody may take it for the file that is out of sight
    copy = elsewhere / "audit-copy.jsonl"

    def unmount() -> None:
        mount.rename(away)
        if instead == "an empty directory":
            mount.mkdir()
        else:
            copy.write_bytes(lines(0, 10) + lines(50, 1))

    with following(dsn, mount, globs=globs) as rig:
        unmount()
        for _ in range(5):
            late += 1.0
            rig.turn()
            if instead == "nothing":
                assert "cannot list" in str(rig.health.reasons()["files"])
        if not stopped:
            _mount(away, mount)
            append(log, lines(10, 5))
            rig.turn()
            assert not rig.health.reasons()
    if stopped:
        with following(dsn, mount, globs=globs):
            pass
        _mount(away, mount)
        append(log, lines(10, 5))
        with following(dsn, mount, globs=globs) as rig:
            assert not rig.health.reasons()
    contents = {1: lines(0, 15), 2: lines(100, 10)}
    if not copy.exists():
        assert_exactly(dsn, [*range(15), *range(100, 110)], contents=contents)
        return
    contents[3] = copy.read_bytes()
    assert_exactly(dsn, [*range(15), 50, *range(100, 110)], contents=contents, replayed=10)


def _mount(away: Path, mount: Path) -> None:
    if mount.exists():
        mount.rmdir()
    away.rename(mount)


def test_device_number_changed(dsn: str, log: Path) -> None:
    """As after a reboot: every file is known again by its content, also those that grew, were renamed or compressed
    meanwhile, and those that begin alike."""
    rotated, packed = log.with_name("audit.jsonl.1"), log.with_name("audit.jsonl.2")
    alike = b"".join(line(number, uri="/health") for number in range(10))
    log.write_bytes(alike + lines(0, 10))
    rotated.write_bytes(alike + lines(100, 10))
    packed.write_bytes(lines(200, 10))
    with following(dsn, log.parent):
        pass
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("update billing.tail_files set device = device + 1")
    Path(f"{packed}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    os.utime(f"{packed}.gz", (1, 1))
    packed.unlink()
    rotated.rename(log.with_name("audit.jsonl.3"))
    log.rename(rotated)
    log.write_bytes(lines(300, 10))
    append(rotated, lines(10, 5))
    _wait_for_archives(log.parent)
    with following(dsn, log.parent) as rig:
        assert not rig.health.reasons()
    assert states(dsn)[1:] == [
        ("audit.jsonl.3", "rotated", None),
        ("audit.jsonl.2.gz", "final", None),
        ("audit.jsonl", "live", None),
    ]
    assert_exactly(
        dsn,
        [*range(15), *range(100, 110), *range(200, 210), *range(300, 310)],
        contents={1: alike + lines(0, 15), 2: alike + lines(100, 10), 3: lines(200, 10), 4: lines(300, 10)},
        not_llm_route=20,
    )


def _wait_for_archives(directory: Path) -> None:
    """A gzip file that changed just now is not believed to be finished: neither its content's time nor its inode's."""
    newest = max(path.stat().st_ctime for path in directory.iterdir())
    time.sleep(max(0.0, newest + files_module.ARCHIVE_SETTLED_SECONDS - time.time()))


# --- inotify ---------------------------------------------------------------------------------------------------------


def test_inotify_overflowing(dsn: str, tmp_path: Path) -> None:
    """The daemon stands still while more happens than the kernel's queue holds: what it was not told of is read."""
    volume = tmp_path / "billing"
    volume.mkdir()
    logs = [volume / "audit-a.jsonl", volume / "audit-b.jsonl"]
    contents = [b"", b""]
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
    }
    events = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) + 1000
    with Daemon(variables, tmp_path / "daemon.log") as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        daemon.signal(signal.SIGSTOP)
        try:
            with logs[0].open("ab", buffering=0) as first, logs[1].open("ab", buffering=0) as second:
                for number in range(events // 2):  # one after the other, or the kernel makes one event of two
                    first.write(b"\n")
                    second.write(b"\n")
                    contents[0] += b"\n"
                    contents[1] += b"\n"
                    if number in (0, events // 2 - 1):
                        first.write(line(number))
                        contents[0] += line(number)
            new = volume / "audit-c.jsonl"
            new.write_bytes(line(7))
        finally:
            daemon.signal(signal.SIGCONT)
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 3)
        append(logs[1], line(8))
        contents[1] += line(8)
        daemon.wait_until(lambda: count(dsn, "usage_facts") == 4)
        assert daemon.terminate() == 0
    by_path = {row["path"]: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    assert_exactly(
        dsn,
        [0, 7, 8, events // 2 - 1],
        contents={
            by_path[str(logs[0])]: contents[0],
            by_path[str(logs[1])]: contents[1],
            by_path[str(new)]: line(7),
        },
        blank_line=2 * (events // 2),
    )


# --- calls that fail -------------------------------------------------------------------------------------------------

TROUBLES = [
    (errno.EMFILE, ("open", "scandir")),
    (errno.ENFILE, ("open", "scandir")),
    (errno.EIO, ("open", "scandir", "fstat", "pread", "preadv")),
    (errno.ESTALE, ("open", "scandir", "fstat", "pread", "preadv")),
    (errno.ENOSPC, ("open", "scandir")),
    (errno.EACCES, ("open", "scandir")),
]


@pytest.mark.parametrize(
    ("code", "call"),
    [(code, call) for code, calls in TROUBLES for call in calls],
    ids=[f"{errno.errorcode[code]} of {call}" for code, calls in TROUBLES for call in calls],
)
@pytest.mark.parametrize("restarts", [False, True], ids=["held", "after a restart"])
def test_emfile_eio_enospc_estale(dsn: str, log: Path, code: int, call: str, restarts: bool) -> None:
    """Every such call fails for a while, in which files grow, come and are rotated: nothing that cannot be seen is
    taken for gone, /readyz says why, nothing spins, and all of it is read afterwards."""
    log.write_bytes(lines(0, 10))
    other = log.with_name("audit-other.jsonl")
    other.write_bytes(lines(100, 10))

    def fail(step: str, done: bool) -> None:
        if not done and step.endswith(f" {call}"):
            raise OSError(code, os.strerror(code))

    with following(dsn, log.parent) as rig:
        if restarts:
            rig.files.close()
        with Steps(fail, sql=False):
            append(log, lines(10, 5))
            rig.turn(rounds_max=50)
            rotated = log.rename(f"{log}.1")
            log.write_bytes(lines(20, 5))
            append(rotated, lines(15, 5))
            rig.turn(rounds_max=50)
            assert os.strerror(code) in str(rig.health.reasons())
            assert not any(rig.tailer._turn() for _ in range(3))
        append(other, lines(110, 5))
        rig.turn()
        assert not rig.health.reasons()
    by_path = {row["path"]: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    assert_exactly(
        dsn,
        [*range(25), *range(100, 115)],
        contents={
            by_path[str(rotated)]: lines(0, 20),
            by_path[str(other)]: lines(100, 15),
            by_path[str(log)]: lines(20, 5),
        },
    )


@contextmanager
def no_descriptors() -> Iterator[None]:
    """None can be opened any more; those that are open stay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_emfile_by_the_limit_of_the_process(dsn: str, log: Path) -> None:
    """The real one: what is held is still read and committed, what is new waits."""
    log.write_bytes(lines(0, 10))
    new = log.with_name("audit-new.jsonl")
    with following(dsn, log.parent) as rig:
        append(log, lines(10, 5))
        new.write_bytes(lines(100, 5))
        with no_descriptors():
            rig.turn()
            reasons = str(rig.health.reasons())
        assert os.strerror(errno.EMFILE) in reasons
        assert_exactly(dsn, range(15), contents={1: lines(0, 15)})
        rig.turn()
        assert not rig.health.reasons()
    assert_exactly(dsn, [*range(15), *range(100, 105)], contents={1: lines(0, 15), 2: lines(100, 5)})


def test_enospc_of_the_writer(dsn: str, log: Path) -> None:
    """nginx's disk is full amid a line; it goes on when there is room: the torn line and the one that is merged with it
    are one dead letter, with both in its bytes, and nothing else is touched."""
    torn = line(10)[:300]
    log.write_bytes(lines(0, 10))
    with following(dsn, log.parent) as rig:
        append(log, torn)
        rig.turn()
        append(log, lines(11, 5))
        rig.turn()
    content = lines(0, 10) + torn + lines(11, 5)
    start = len(lines(0, 10))
    letter = (1, start, start + len(torn + line(11)), "invalid_json")
    assert_exactly(dsn, [*range(10), *range(12, 16)], contents={1: content}, letters=[letter])
    assert rows(dsn, "select raw from dead_letters") == [{"raw": torn + line(11)}]


# --- the clock -------------------------------------------------------------------------------------------------------

DAY = 86_400.0


@pytest.mark.parametrize("jump", [-10 * 365 * DAY, -DAY, -3600.0, 3600.0, DAY, 10 * 365 * DAY])
def test_clock_jumping(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """Only the wall clock: forth or back and home again, amid appends, a rotation, a truncation that regrows, and a
    deletion whose writer takes its time: no day has passed."""
    late, wall = 0.0, time.time
    monkeypatch.setattr(time, "time", lambda: wall() + late)
    deleted, other = log.with_name("audit-deleted.jsonl"), log.with_name("audit-other.jsonl")
    half, rotated = line(300), Path(f"{log}.1")
    log.write_bytes(lines(0, 5))
    other.write_bytes(lines(200, 5))
    with deleted.open("ab", buffering=0) as writer, following(dsn, log.parent) as rig:
        writer.write(half[:100])
        rig.turn()
        deleted.unlink()
        rig.turn()
        late = jump
        append(log, lines(5, 5))
        log.rename(rotated)
        log.write_bytes(lines(20, 5))
        deadline = time.monotonic() + 5
        while count(dsn, "usage_facts") < 20:  # nobody says that it is time to look at the directory
            assert time.monotonic() < deadline
            rig.tailer._turn()
        other.write_bytes(lines(210, 20))
        rig.turn()
        writer.write(half[100:])
        rig.turn()
        late = 0.0
        append(rotated, lines(10, 5))
        append(log, lines(25, 5))
        rig.turn()
        late = -jump
        append(log, lines(30, 5))
        rig.turn()
        assert not rig.health.reasons()
    by_generation = {(row["path"], row["generation"]): row["file_id"] for row in rows(dsn, "select * from tail_files")}
    assert_exactly(
        dsn,
        [*range(15), *range(20, 35), *range(200, 205), *range(210, 230), 300],
        contents={
            by_generation[str(rotated), 1]: lines(0, 15),
            by_generation[str(other), 1]: lines(200, 5),
            by_generation[str(other), 2]: lines(210, 20),
            by_generation[str(log), 2]: lines(20, 15),
            by_generation[str(deleted), 1]: half,
        },
        gaps=[(by_generation[str(other), 1], len(lines(200, 5)), None, "regrown")],
    )


def test_clock_behind_the_times_of_a_gzip_file(dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back by an hour, or the volume's host is ahead: the archive is read all the same, and until it is known
    nothing else has to wait an hour for it."""
    late, wall = -3600.0, time.time
    monkeypatch.setattr(time, "time", lambda: wall() + late)
    log.write_bytes(lines(0, 5))
    archive = log.with_name("audit.jsonl.1.gz")
    with following(dsn, log.parent) as rig:
        archive.write_bytes(gzip.compress(lines(100, 5)))
        log.write_bytes(lines(20, 10))
        rig.turn()
        assert not rig.health.reasons()
    by_generation = {(row["path"], row["generation"]): row["file_id"] for row in rows(dsn, "select * from tail_files")}
    assert_exactly(
        dsn,
        [*range(5), *range(20, 30), *range(100, 105)],
        contents={
            by_generation[str(log), 1]: lines(0, 5),
            by_generation[str(log), 2]: lines(20, 10),
            by_generation[str(archive), 1]: lines(100, 5),
        },
        gaps=[(by_generation[str(log), 1], len(lines(0, 5)), None, "regrown")],
    )


# --- a crowd ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_hot_file_and_500_slow_ones(dsn: str, log: Path) -> None:
    """A backlog in one file holds nobody up: the lines of all others are committed before a tenth of it is."""
    slow = [log.with_name(f"audit-{number:03d}.jsonl") for number in range(500)]
    log.touch()
    for number, path in enumerate(slow):
        path.write_bytes(line(number))
    hot = lines(10_000, 20_000)
    with following(dsn, log.parent, open_files_max=64) as rig:
        append(log, hot)
        for number, path in enumerate(slow):
            append(path, line(1_000 + number))
        rig.follower.scan_soon()
        for _ in range(100):
            rig.tailer._turn()
            found = rows(dsn, "select count(*) filter (where call_id < 'call-00010000')::int as slow from usage_facts")
            if found == [{"slow": 1_000}]:
                break
        assert count(dsn, "usage_facts") - 1_000 < 2_000
        rig.turn()
        assert not rig.health.reasons()
    by_path = {row["path"]: row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
    contents = {by_path[str(path)]: line(number) + line(1_000 + number) for number, path in enumerate(slow)}
    contents[by_path[str(log)]] = hot
    assert_exactly(dsn, [*range(500), *range(1_000, 1_500), *range(10_000, 30_000)], contents=contents)
