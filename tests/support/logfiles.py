"""What people and programs do to log files."""

import threading
from collections.abc import Callable, Iterator
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
    following = [first]

    def write() -> None:
        append(log, lines(following[0], 3))
        following[0] += 3

    with repeated(write, 0.002):
        yield following


@contextmanager
def repeated(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Beside what the block does, in a thread of its own, with a pause of so many seconds before each time."""
    ended = threading.Event()

    def act() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
