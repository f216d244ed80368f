"""What people and programs do to log files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.loglines import lines


def append(path: Path, content: bytes) -> None:
    """As a writer does it."""
    with path.open("ab") as out:
        out.write(content)


def overwrite(path: Path, at: int, content: bytes) -> None:
    """In place, from an offset on, which may lie behind the end."""
    with path.open("r+b") as out:
        out.seek(at)
        out.write(content)


def replaced(log: Path, content: bytes) -> None:
    """Another file takes the name, as rsync, `sed -i` and editors do it."""
    (log.parent / ".new").write_bytes(content)
    (log.parent / ".new").rename(log)


@contextmanager
def busy_writer(log: Path, first: int) -> Iterator[list[int]]:
    """A thread that writes three lines every two milliseconds, of the calls from `first` on; gives a list of one: the
    call that is next."""
    stop, following = threading.Event(), [first]

    def write() -> None:
        while not stop.wait(0.002):
            append(log, lines(following[0], 3))
            following[0] += 3

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield following
    finally:
        stop.set()
        writer.join()
