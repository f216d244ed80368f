"""Waking up: soon when a writer does something, not for what we do ourselves, and never a crash."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from billing_tailer.files import LogFiles
from billing_tailer.wake import Wake

SOON_SECONDS = 0.1
LONG_SECONDS = 5.0
"""Longer than any wait that something ended: `woken` is told from timed out also where the machine is busy."""


@pytest.fixture
def wake() -> Iterator[Wake]:
    wake = Wake()
    wake.start()
    yield wake
    wake.stop()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"one\n")
    return log


def quiet(wake: Wake) -> None:
    """Let events that are under way arrive, and forget them."""
    time.sleep(0.1)
    wake.wait(0)


def seconds_to_wake(wake: Wake, seconds: float = LONG_SECONDS) -> float:
    started = time.monotonic()
    wake.wait(seconds)
    return time.monotonic() - started


def append(path: Path) -> None:
    with path.open("ab") as out:
        out.write(b"two\n")


def test_an_append_wakes(wake: Wake, log: Path) -> None:
    wake.watch([str(log.parent)])
    quiet(wake)
    taken = []
    for _ in range(5):
        append(log)
        taken.append(seconds_to_wake(wake))
        quiet(wake)
    assert sorted(taken)[2] < SOON_SECONDS


def test_an_append_during_the_wait_wakes(wake: Wake, log: Path) -> None:
    wake.watch([str(log.parent)])
    quiet(wake)
    threading.Timer(0.1, append, [log]).start()
    assert 0.05 < seconds_to_wake(wake) < LONG_SECONDS


@pytest.mark.parametrize("what", ["create", "rename", "delete", "truncate"])
def test_a_rotation_wakes(wake: Wake, log: Path, what: str) -> None:
    wake.watch([str(log.parent)])
    quiet(wake)
    if what == "create":
        (log.parent / "audit.new").touch()
    elif what == "rename":
        log.rename(log.parent / "audit.jsonl.1")
    elif what == "delete":
        log.unlink()
    else:
        log.write_bytes(b"")
    assert seconds_to_wake(wake) < LONG_SECONDS


def test_own_reads_do_not_wake(wake: Wake, log: Path) -> None:
    """Or the loop would never sleep: scanning, opening, reading and closing are events too."""
    wake.watch([str(log.parent)])
    quiet(wake)
    logs = LogFiles([f"{log.parent}/*"], 4)
    for _ in range(3):
        (file,) = logs.scan().files
        assert logs.read_at(file, 0, 10) == b"one\n"
        logs.close()
    assert seconds_to_wake(wake, 0.3) >= 0.3


def test_the_poll_alone_is_enough(log: Path) -> None:
    """Without any watch, and without the observer, waiting ends in time."""
    wake = Wake()
    append(log)
    assert 0.1 <= seconds_to_wake(wake, 0.1) < LONG_SECONDS
    wake.stop()


def test_a_wake_up_is_spent_once(wake: Wake) -> None:
    wake.set()
    assert seconds_to_wake(wake) < LONG_SECONDS
    assert seconds_to_wake(wake, 0.1) >= 0.1


def test_a_directory_that_comes_later(wake: Wake, tmp_path: Path) -> None:
    later = tmp_path / "later"
    wake.watch([str(later), str(tmp_path)])
    assert str(later) in (wake.trouble or "")
    quiet(wake)
    append(tmp_path / "audit")
    assert seconds_to_wake(wake) < LONG_SECONDS  # the other one is watched all the same
    later.mkdir()
    wake.watch([str(later)])
    assert wake.trouble is None
    quiet(wake)
    append(later / "audit")
    assert seconds_to_wake(wake) < LONG_SECONDS


def test_trouble_stays_while_it_lasts(wake: Wake, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for _ in range(3):
        wake.watch([str(tmp_path / "missing"), str(tmp_path / "there")])
        assert str(tmp_path / "missing") in (wake.trouble or "")


def test_watching_twice(wake: Wake, log: Path) -> None:
    for _ in range(3):
        wake.watch([str(log.parent), str(log.parent)])
    quiet(wake)
    append(log)
    assert seconds_to_wake(wake) < LONG_SECONDS


def test_a_directory_that_goes_away(wake: Wake, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    wake.watch([str(gone)])
    gone.rmdir()
    wake.watch([str(gone), str(tmp_path)])
    quiet(wake)
    append(tmp_path / "audit")
    assert seconds_to_wake(wake) < LONG_SECONDS


def test_without_inotify(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    wake = Wake()

    def no_inotify() -> None:
        raise OSError(24, "inotify instance limit reached")

    monkeypatch.setattr("billing_tailer.wake.Observer", no_inotify)
    wake.start()
    assert "inotify instance limit" in (wake.trouble or "")
    wake.watch([str(log.parent)])
    assert "inotify instance limit" in (wake.trouble or "")
    assert seconds_to_wake(wake, 0.1) >= 0.1
    wake.stop()


def test_stop_ends_the_threads(log: Path) -> None:
    before = threading.active_count()
    wake = Wake()
    wake.start()
    wake.watch([str(log.parent)])
    assert threading.active_count() > before
    wake.stop()
    wake.stop()
    assert threading.active_count() == before


def test_other_files_of_the_directory_do_not_wake(log: Path) -> None:
    wake = Wake(LogFiles((f"{log.parent}/audit*.jsonl*",), 8).concerns)
    wake.start()
    try:
        wake.watch([str(log.parent)])
        quiet(wake)
        append(log.parent / "access.log")
        assert seconds_to_wake(wake, 0.3) >= 0.3
        append(log)
        assert seconds_to_wake(wake) < LONG_SECONDS
        (log.parent / "access.log").rename(log.parent / "audit-2.jsonl")
        assert seconds_to_wake(wake) < LONG_SECONDS
    finally:
        wake.stop()


def test_a_directory_whose_writer_tells_us_is_not_watched(tmp_path: Path) -> None:
    for name in ("told", "log"):
        (tmp_path / name).mkdir()
    wake = Wake(told=(str(tmp_path / "told"),))
    wake.start()
    try:
        wake.watch([str(tmp_path / "told"), str(tmp_path / "log")])
        assert wake.trouble is None
        quiet(wake)
        append(tmp_path / "told/callbacks")
        assert seconds_to_wake(wake, 0.3) >= 0.3
        append(tmp_path / "log/audit")
        assert seconds_to_wake(wake) < LONG_SECONDS
    finally:
        wake.stop()


def test_a_directory_made_anew_is_watched_again(wake: Wake, tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    for _ in range(3):
        directory.mkdir()
        wake.watch([str(directory)])
        quiet(wake)
        append(directory / "audit.jsonl")
        assert seconds_to_wake(wake) < LONG_SECONDS
        shutil.rmtree(directory)
        wake.watch([str(directory)])
        assert wake.trouble is not None
        quiet(wake)
    directory.mkdir()
    wake.watch([str(directory)])
    assert wake.trouble is None


@pytest.mark.parametrize("rid_of", [shutil.rmtree, lambda directory: directory.rename(f"{directory}.away")])
def test_directories_that_are_gone_are_not_watched(
    wake: Wake, tmp_path: Path, rid_of: Callable[[Path], object]
) -> None:
    threads = threading.active_count()
    for n in range(10):
        directory = tmp_path / str(n)
        directory.mkdir()
        wake.watch([str(directory)])
        rid_of(directory)
    wake.watch([])
    time.sleep(0.1)
    assert threading.active_count() == threads
