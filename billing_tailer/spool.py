"""Where callbacks wait for Postgres: append-only files that are tailed like any other log.

- A record is acknowledged only once it is on disk, and one fsync serves everyone who waits at that moment: the answer
  takes milliseconds whatever Postgres is doing (tests/test_spool.py::test_one_fsync_serves_all_who_wait).
- Every process writes files of its own, and holds the lock (flock) of each for as long as it may still write to it. A
  file whose lock is free is finished: its writer went on to the next one, or is dead. A torn end, which nobody was told
  was safe, is marked by whoever adopts the file (test_a_dead_writers_torn_end_is_marked_once), and the file is put on
  disk before it is read: what is committed must not vanish in a power cut (test_a_file_is_on_disk_before_it_is_read).
- Who stands by hands over what it took, every second, by giving its file another name; the process that commits copies
  the lines into its own file before it removes the other (test_a_standby_hands_over_what_it_took). Not by finished
  files under their own names: a file per second would be a position per second, kept for ever.
- After a failure the file goes on behind a marked end; a full disk costs no record that was acknowledged, and no new
  file per attempt (test_a_full_disk_refuses_everyone_and_recovers).
- What is written here was stripped before (PROMPTS_ARE_NEVER_STORED: tests/test_callbacks.py).

A record that was refused may still be in a file, whole: whoever reads the spool must know a record when it comes twice.
"""

import contextlib
import errno
import fcntl
import glob
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from billing_tailer.errors import ConfigError, TailerError

FILE_BYTES_MAX = 64 << 20
"""A spool file is followed by the next one at this size."""
GROUP_BYTES_MAX = 4 << 20
"""No further request joins a group that is written at once when it has this size."""
USED_SECONDS_MAX = 1.0
"""How long the size of everybody's files may be remembered; our own growth is added to it."""
KEEPING_SECONDS = 1.0
"""How often the spool is put in order: what a standby took is handed over, a torn line is ended."""
COPY_BYTES = 1 << 20
UNBORN_SECONDS = 60.0
"""What was left between a file's creation and its lock, by a process that died there, is kept for so long."""
TORN = b"\x18"
"""Ends a line that was torn; never part of JSON."""

_NAME = re.compile(r"callbacks-(?P<instance>[0-9a-f]{32})-[0-9]{6}\.jsonl")
_UNBORN = re.compile(rf"\.{_NAME.pattern}")
"""A file between its creation and its lock: not to be seen under its name before the lock is held."""
_HANDED_OVER = re.compile(rf"handed-over-{_NAME.pattern}")
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Failures that end by themselves or by what an operator does: no reason not to start."""

Committer = Literal["us", "another"]


def is_spool_file(path: str) -> bool:
    """Whether an (escaped) path has the name of a spool file."""
    return _NAME.fullmatch(path.rpartition("/")[2]) is not None


class SpoolError(TailerError):
    """The spool is full or cannot be written: the records are not safe, and whoever sent them must be told."""


@dataclass(frozen=True, slots=True)
class _Request:
    data: bytes
    done: "Future[None]"


@dataclass(slots=True)
class _File:
    """The file that is written. size: its bytes. safe: those of them that are on disk. torn: a write failed, so that
    the end is not what it should be. followed: this process has tailed it, so that it has a position."""

    path: Path
    fd: int
    size: int = 0
    safe: int = 0
    torn: bool = False
    followed: bool = False


@dataclass(slots=True)
class _Used:
    """The size of all spool files together, as of a moment (monotonic seconds)."""

    bytes: int = 0
    at: float = field(default=-USED_SECONDS_MAX)


class Spool:
    """The spool files of one process, written by a thread of its own."""

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        report: Callable[[str | None], None],
        *,
        file_bytes_max: int = FILE_BYTES_MAX,
    ) -> None:
        """bytes_max: of all spool files together. report: told when it changes what is wrong with the spool, None when
        it is well again; called from several threads, one at a time."""
        self.directory = directory
        self._bytes_max = bytes_max
        self._file_bytes_max = min(file_bytes_max, bytes_max // 8)  # or the file in use would be all there is room for
        self._report = report
        self._instance = uuid.uuid4().hex
        self._number = 0
        self._file: _File | None = None
        self._used = _Used()
        self._adopted: set[str] = set()
        self._troubles: dict[str, str] = {}
        self._troubles_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._queue_lock = threading.Lock()
        self._open = False
        self._next_keeping = 0.0
        self._refused_bytes = 0
        self.committer: Callable[[], Committer | None] = lambda: None
        """Who tails the spool: this process, another one, or nobody for now. Called from the writing thread."""
        self.has_more = False
        """Whether there are records of a standby which are not in a file that is tailed yet."""
        self.synced: Callable[[], None] = lambda: None
        """Told that there is more to read: an fsync makes no event of the file system."""
        self._thread = threading.Thread(target=self._work, name="spool", daemon=True)

    @property
    def glob(self) -> str:
        """Matches the spool files of every process."""
        return f"{glob.escape(str(self.directory))}/callbacks-*.jsonl"

    def start(self) -> None:
        """Open the first file and begin to write. Raises ConfigError where the directory cannot be used; a disk that is
        full at this moment is reported, and refused to those who come."""
        try:
            self._make_directory()
            self._open_next()
        except OSError as error:
            if error.errno not in _PASSING:
                raise ConfigError(
                    f"BILLING_TAILER_SPOOL_DIR={self.directory}: {error.strerror}",
                    "name a directory on a disk that outlives the container, writable for this user",
                ) from None
            self._refused_bytes = 1
            self._tell("writing", f"{self.directory}: {error.strerror}")
        self._open = True
        self._thread.start()

    def alive(self) -> bool:
        """Whether the writing thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Write what waits, and let go of the file; an empty one is removed."""
        with self._queue_lock:
            self._open = False
            self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()
        if self._file is not None:
            if self._file.size == 0:
                self._file.path.unlink(missing_ok=True)
            os.close(self._file.fd)
            self._file = None

    def append(self, data: bytes) -> "Future[None]":
        """Whole lines -> a future that is done once they are on disk. It raises SpoolError where they are not."""
        request = _Request(data, Future())
        request.done.set_running_or_notify_cancel()  # whoever stops waiting does not stop the writing
        with self._queue_lock:
            if self._open:
                self._queue.put(request)
                return request.done
        request.done.set_exception(SpoolError("the spool is closed"))
        return request.done

    # --- the writing thread

    def _work(self) -> None:
        try:
            while self._next_group():
                if time.monotonic() >= self._next_keeping:
                    self._keep_in_order()
                    self._next_keeping = time.monotonic() + KEEPING_SECONDS
        finally:
            self._refuse_the_rest()

    def _next_group(self) -> bool:
        """Write everything that waits; False when that was the last."""
        try:
            request = self._queue.get(timeout=KEEPING_SECONDS)
        except queue.Empty:
            return True
        group: list[_Request] = []
        group_bytes = 0
        try:
            while request is not None:
                group.append(request)
                group_bytes += len(request.data)
                if group_bytes >= GROUP_BYTES_MAX:
                    break
                request = self._queue.get_nowait()
        except queue.Empty:
            pass
        if group:
            self._write(group, group_bytes)
        return request is not None

    def _write(self, group: Sequence[_Request], group_bytes: int) -> None:
        trouble: str | None = "the spool's thread has failed"
        try:
            self._make_room(group_bytes)
            self._store(b"".join(request.data for request in group))
            trouble = None
        except SpoolError as error:
            trouble = error.message
        except OSError as error:
            trouble = f"{self.directory}: {error.strerror}"
        finally:
            for request in group:
                if trouble is None:
                    request.done.set_result(None)
                else:
                    request.done.set_exception(SpoolError(trouble))  # one each: it will be raised in many places
            self._refused_bytes = 0 if trouble is None else group_bytes
            self._tell("writing", trouble)

    def _refuse_the_rest(self) -> None:
        with self._queue_lock:
            self._open = False
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._queue.get_nowait()
                if request is not None:
                    request.done.set_exception(SpoolError("the spool is closed"))

    def _make_room(self, more: int) -> None:
        """Raises SpoolError where the spool has no room for so many bytes more."""
        for age_max in (USED_SECONDS_MAX, 0.0):  # someone may have cleaned up since we last looked
            now = time.monotonic()
            if now - self._used.at >= age_max:
                self._used = _Used(sum(map(_size, self._entries(_NAME, _HANDED_OVER))), now)
            if self._used.bytes + more <= self._bytes_max:
                return
        raise SpoolError(f"{self.directory}: the spool is full ({self._bytes_max} bytes)")

    def _store(self, data: bytes) -> None:
        """Raises OSError; whatever part of the data is in the file then was not acknowledged."""
        file = self._writable()
        self._used.bytes += len(data)
        try:
            _write_all(file, data)
            os.fsync(file.fd)
        except OSError:
            file.torn = True
            raise
        file.safe = file.size
        self.synced()

    def _writable(self) -> _File:
        """The file to write to: the same as before, or the next one."""
        file = self._file
        if file is None or not _stands(file):
            return self._open_next()
        if file.torn:
            _end_torn_line(file.fd)
            file.size = os.fstat(file.fd).st_size
            if file.safe and file.size != file.safe:
                # after an fsync that failed, nothing more is put where safe records are; a file without any can as
                # well go on, so that a sick disk does not get a file per attempt
                return self._open_next()
            file.torn = False
        return self._open_next() if file.size >= self._file_bytes_max else file

    def _open_next(self) -> _File:
        """Only when it is locked does a file get its name: what is seen without a lock is finished."""
        path = self.directory / f"callbacks-{self._instance}-{self._number:06d}.jsonl"
        unborn = path.with_name(f".{path.name}")
        fd = os.open(unborn, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unborn.rename(path)
            _sync_directory(self.directory)
        except OSError:
            os.close(fd)
            raise
        if self._file is not None:
            os.close(self._file.fd)
        self._file = _File(path, fd, followed=self.committer() == "us")
        self._number += 1
        return self._file

    # --- putting in order: the writing thread, between two groups

    def _keep_in_order(self) -> None:
        self._look_for_recovery()
        trouble: str | None = None
        try:
            committer = self.committer()
            if committer == "another":
                self._hand_over()
            if committer == "us":
                self._take_over()
        except OSError as error:
            trouble = f"{self.directory}: {error.strerror}"
        self._tell("keeping in order", trouble)

    def _look_for_recovery(self) -> None:
        """After a refusal: an alarm must end, and a torn line, which seems unread, although nobody posts."""
        if not self._refused_bytes:
            return
        with contextlib.suppress(OSError, SpoolError):
            self._make_room(self._refused_bytes)
            os.fsync(self._writable().fd)
            self._refused_bytes = 0
            self._tell("writing", None)

    def _hand_over(self) -> None:
        """Leave our file to the process that commits."""
        file = self._file
        if file is None or file.size == 0 or not _stands(file):
            return
        if not file.followed:  # else whoever follows goes on from our position in it
            file.path.rename(file.path.with_name(f"handed-over-{file.path.name}"))
            _sync_directory(self.directory)
        os.close(file.fd)  # and with it the lock
        self._file = None

    def _take_over(self) -> None:
        """Copy what standbys took into our own file. After a death between copy and removal it is copied twice."""
        if self._file is not None:
            self._file.followed = True
        entries = self._entries(_HANDED_OVER)
        self.has_more = bool(entries)
        self.has_more = False in [self._taken_over(Path(entry)) for entry in entries]

    def _taken_over(self, path: Path) -> bool:
        """False where it must be tried again. Raises OSError."""
        with self._finished(path) as fd:
            if fd is None:
                return False
            with open(fd, "rb", closefd=False) as lines:
                lines.seek(0)  # a torn end that was marked has left it there
                while copied := lines.readlines(COPY_BYTES):
                    self._store(b"".join(copied))
            path.unlink()
        return True

    # --- the reading side: other threads

    def readable_bytes(self, path: bytes) -> int | None:
        """How much of a spool file is ours to tail: of the one we write what is on disk, of a finished one everything;
        None where it is another's."""
        name = Path(os.fsdecode(path)).name
        file = self._file
        if file is not None and file.path.name == name:
            return file.safe
        if _NAME.fullmatch(name) is None:
            return None
        if name not in self._adopted:
            with self._finished(self.directory / name) as fd:
                if fd is None:
                    return None
                self._adopted.add(name)  # a finished file is never written again: no name is used twice
        return sys.maxsize

    def janitor(
        self, may_delete: Callable[[bytes, int], bool], older_than_seconds: float, now: float
    ) -> tuple[bytes, ...]:
        """Remove the finished files, of any writer, that nobody has touched for a while and that are committed; of
        those, younger ones as well, oldest first, while all files together take half of the room there is: what is
        safe in Postgres must not be the reason to refuse what is not.

        may_delete: path, size in bytes -> whether every byte of it is committed; only asked for files that are to go.
        now: seconds of the epoch. Returns the paths that were removed.
        """
        removed: list[bytes] = []
        entries = self._entries(_NAME, _UNBORN)
        too_many = sum(map(_size, entries)) - self._bytes_max // 2
        for entry in sorted(entries, key=_modified_at):
            with contextlib.suppress(FileNotFoundError):
                unborn = entry.name.startswith(".")
                age_min = max(older_than_seconds, UNBORN_SECONDS) if unborn else older_than_seconds
                if now - entry.stat().st_mtime < age_min and (unborn or too_many <= 0):
                    continue
                with self._finished(Path(entry)) as fd:
                    path, size = os.fsencode(entry), _size(entry)
                    if fd is None or not (unborn or may_delete(path, os.fstat(fd).st_size)):
                        continue
                    Path(entry).unlink()
                too_many -= size
                removed.append(path)
                self._adopted.discard(entry.name)
        if removed:
            _sync_directory(self.directory)
        return tuple(removed)

    @contextlib.contextmanager
    def _finished(self, path: Path) -> Iterator[int | None]:
        """A descriptor of a finished file, locked, with its torn end marked and all of it on disk; None where its
        writer lives, and where the file cannot be opened or marked, which is reported."""
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end_torn_line(fd)
            os.fsync(fd)
        except (BlockingIOError, FileNotFoundError):
            yield None
        except OSError as error:
            self._tell(path.name, f"{path}: {error.strerror}")
            yield None
        else:
            self._tell(path.name, None)
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    # --- what both use

    def _entries(self, *names: re.Pattern[str]) -> list[os.DirEntry[str]]:
        with os.scandir(self.directory) as entries:
            return [entry for entry in entries if any(name.fullmatch(entry.name) for name in names)]

    def _tell(self, what: str, trouble: str | None) -> None:
        with self._troubles_lock:
            before = dict(self._troubles)
            if trouble is None:
                self._troubles.pop(what, None)
            else:
                self._troubles[what] = trouble
            if self._troubles != before:
                self._report("; ".join(self._troubles.values()) or None)

    def _make_directory(self) -> None:
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in missing:
            _sync_directory(path.parent)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0  # removed since it was listed


def _modified_at(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _stands(file: _File) -> bool:
    """Whether the file can still be found under its name. What goes into one that was removed is lost."""
    try:
        status = file.path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(file.fd)
    return (status.st_dev, status.st_ino) == (held.st_dev, held.st_ino)


def _write_all(file: _File, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        written = os.write(file.fd, rest)
        file.size += written
        rest = rest[written:]


def _end_torn_line(fd: int) -> None:
    """Mark and end a last line that has no end. Raises OSError."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return
    if os.write(fd, TORN + b"\n") != 2:  # the next attempt marks it again, which ends the line as well
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
