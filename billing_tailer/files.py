"""The only room that opens log files: scanning directories, comparing files with positions, verified reads.

Holds, for its part, CANNOT_SEE_IS_NOT_GONE (a scan says whether it was complete) and the rule that a read is verified
on the descriptor that is read (tests/test_files.py). Never writes, so that the volume can be mounted read-only.
"""

import contextlib
import errno
import fnmatch
import glob
import hashlib
import os
import re
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from billing_tailer.errors import ConfigError
from billing_tailer.gzipped import Archive, BrokenArchive, Content
from billing_tailer.model import FRONTIER_BYTES_MAX, HEAD_BYTES_MAX, Place, Position, SeenFile, Verdict

SETTLED_SECONDS = 2.0
"""A file's times tell two versions apart only if they are older than the clock's resolution, with room to spare."""
JUDGED_MAX = 65536
"""Verdicts that are remembered."""
COMPRESSED = (b".bz2", b".xz", b".zst")
"""Never text, and not read."""
ARCHIVE_SLICE_SECONDS = 0.008
"""So long at a time gzip files are read through, beside the live log."""
ARCHIVE_SETTLED_SECONDS = 2.0
"""A gzip file that has not changed for so long is finished."""
ARCHIVE_RETRY_SECONDS = 5.0
SKIP_BYTES_MAX = 8 << 20
"""So much of a gzip file is read again, at a time, to come to where reading goes on."""
COMPARED_BYTES = 1 << 20
_SEPARATOR = re.compile(rb"[.-]")
TAIL_BYTES = 64 << 10
"""Step of the backward search for a newline."""


def escape_path(path: bytes) -> str:
    """File names are bytes; this writes them as text that can be stored, printed and turned back."""
    if not _odd(path):
        return path.decode()
    return path.decode("utf-8", "surrogateescape").encode("unicode_escape").decode("ascii")


def unescape_path(text: str) -> bytes:
    """The inverse of `escape_path`."""
    if "\\" not in text:
        return text.encode()
    return text.encode("ascii").decode("unicode_escape").encode("utf-8", "surrogateescape")


def _odd(path: bytes) -> bool:
    try:
        text = path.decode()
    except UnicodeDecodeError:
        return True
    return "\\" in text or not text.isprintable()


@dataclass(frozen=True, slots=True)
class Scan:
    """Everything one look at the directories saw.

    complete: every directory of every glob was listed, and every file that matches could be looked at. strays: names of
    followed files that no glob matches. problems: in words, for /readyz. broken: gzip files that cannot be read and
    links that are not followed, too.
    lookalikes: files whose names go on from one that matches (`X.1`, `X-20261122`, `X.1.gz`) and that no glob matches.
    archives_unknown: gzip files that are not listed yet, because they have to be read through first.
    """

    files: tuple[SeenFile, ...]
    complete: bool
    problems: tuple[str, ...]
    strays: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    lookalikes: tuple[str, ...] = ()
    archives_unknown: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of one verified read: `data` starts at the position's committed offset, `context` (at most 4 KiB) ends
    there. `size` is that of the file when it was read."""

    context: bytes
    data: bytes | bytearray
    size: int


@dataclass(slots=True)
class _Handle:
    fd: int
    path: str


class LogFiles:
    """The log files of a set of globs, with a bounded number of them held open."""

    def __init__(
        self,
        globs: Sequence[str],
        open_files_max: int,
        readable_bytes: Callable[[bytes], int | None] = lambda _: sys.maxsize,
    ) -> None:
        """readable_bytes: asked for the path of every file that a glob matches, how much of it may be read; None leaves
        it alone for now."""
        self._readable_bytes = readable_bytes
        self._globs = [os.fsencode(pattern) for pattern in globs]
        self.open_files_max = open_files_max
        self._handles: OrderedDict[tuple[int, int], _Handle] = OrderedDict()
        self._archives: dict[tuple[int, int], tuple[SeenFile, Archive]] = {}
        self._judged: dict[tuple[int, int, int], tuple[tuple[int, ...], bytes, Verdict]] = {}
        self.trouble = ""
        """Why the last file was UNREADABLE, in words."""

    # --- looking

    def directories(self) -> list[str]:
        """The directories the globs look into at this moment, for the wake-up."""
        return sorted({os.fsdecode(d) for pattern in self._globs for d in _directories(pattern)})

    def roots(self) -> list[str]:
        """The directories that must be there: of each glob the part before its first magic character."""
        return sorted({os.fsdecode(_fixed_directory(pattern)) for pattern in self._globs})

    def concerns(self, path: str) -> bool:
        """Whether a glob matches this file's name."""
        name = os.path.basename(os.fsencode(path))
        return any(fnmatch.fnmatchcase(name, os.path.basename(pattern)) for pattern in self._globs)

    def require_mounts(self) -> None:
        """Raise ConfigError where a glob's fixed directory is missing or cannot be listed, as at a forgotten mount."""
        for pattern in self._globs:
            root = _fixed_directory(pattern)
            try:
                os.scandir(root).close()
            except OSError as error:
                raise ConfigError(
                    f"BILLING_TAILER_AUDIT_GLOBS={os.fsdecode(pattern)}: "
                    f"cannot list {os.fsdecode(root)}: {error.strerror}",
                    f"mount the proxy's log volume at {os.fsdecode(root)} (read-only is enough), or name another glob",
                ) from None

    def scan(
        self,
        wanted: Collection[tuple[int, int]] = (),
        committed: Callable[[tuple[int, int]], Position | None] = lambda _: None,
    ) -> Scan:
        """List every directory of every glob.

        wanted: locators that are followed; a file there is found whatever its name is. committed: the generation at a
        locator that is committed to its end, if one is; a gzip file that is still that one is not read through again.
        """
        found: dict[tuple[int, int], SeenFile] = {}
        problems: list[str] = []
        strays: set[str] = set()
        lookalikes: list[os.DirEntry[bytes]] = []
        leading_out: list[str] = []
        inodes = {inode for _, inode in wanted}
        by_directory: dict[bytes, list[bytes]] = {}
        for pattern in self._globs:
            directories = _directories(pattern)
            if not directories:
                problems.append(f"no directory matches {escape_path(os.path.dirname(pattern))}")
            for directory in directories:
                by_directory.setdefault(directory, []).append(os.path.basename(pattern))
        for directory, names in sorted(by_directory.items()):
            try:
                with os.scandir(directory) as entries:
                    inside = [entry for entry in entries if not _leads_out(entry, names, by_directory, leading_out)]
                lookalikes += self._scan_directory(inside, names, wanted, inodes, found, strays, problems)
            except OSError as error:
                problems.append(f"cannot list {escape_path(directory)}: {error.strerror}")
        strays &= {file.path for file in found.values()}  # a second name beside one that matches is no stray
        for locator, handle in list(self._handles.items()):
            if locator in found:
                handle.path = found[locator].path
                continue
            try:
                found[locator] = _seen(handle.path, os.fstat(handle.fd), listed=False)
            except OSError as error:  # a network file system that has lost the file
                problems.append(f"cannot look at {handle.path}: {error.strerror}")
                self._close(locator)
        broken, unknown = self._sort_out_archives(found, committed)
        files = tuple(sorted(found.values(), key=lambda file: file.path))
        complete = not problems and not unknown
        followed = {inode for _, inode in found}  # which may have a second name
        like = tuple(escape_path(entry.path) for entry in lookalikes if entry.inode() not in followed)
        unread = (*broken, *leading_out)
        return Scan(files, complete, tuple(problems), tuple(sorted(strays)), unread, like, unknown)

    def _sort_out_archives(
        self,
        found: dict[tuple[int, int], SeenFile],
        committed: Callable[[tuple[int, int]], Position | None],
    ) -> tuple[tuple[str, ...], int]:
        """Give gzip files the size of their content; leave out those of which nothing is known yet."""
        archives: dict[tuple[int, int], tuple[SeenFile, Archive]] = {}
        broken: list[str] = []
        unknown = 0
        for locator, file in list(found.items()):
            if not file.compressed:
                continue
            archive = self._archive_at(file)
            archives[locator] = (file, archive)
            position = committed(locator) if archive.is_unknown() else None
            if position is not None:
                archive.trust(self._raw(file), position)
            if archive.ready and archive.size:
                found[locator] = replace(file, size=archive.size)
                continue
            del found[locator]  # also one without any content, by which it could be known
            if archive.broken:
                broken.append(f"{file.path}: {archive.broken}")
            elif not archive.ready:
                unknown += 1
        self._archives = archives
        return tuple(broken), unknown

    def _archive_at(self, file: SeenFile) -> Archive:
        signature = (file.size, file.mtime_ns)
        known = self._archives.get(file.locator)
        if known is None or known[1].signature != signature or time.monotonic() >= known[1].retry_at:
            return Archive(signature)
        return known[1]

    def read_archives(self, wanted: Callable[[bytes], Iterable[int]]) -> bool:
        """Read on through gzip files of which nothing is known yet, for a moment; False where there is none.

        wanted: the offsets of the generations with a head, at which they will be compared.
        """
        now_ns, settling_ns = time.time() * 1e9, ARCHIVE_SETTLED_SECONDS * 1e9
        until = time.monotonic() + ARCHIVE_SLICE_SECONDS
        for file, archive in self._archives.values():
            # one that is being written changes all the time; a time far ahead of our clock is no news either
            if not archive.is_unknown() or abs(now_ns - max(file.mtime_ns, file.ctime_ns)) < settling_ns:
                continue
            try:
                while archive.is_unknown() and time.monotonic() < until:
                    archive.step(self._raw(file), wanted)
            except OSError as error:
                archive.broken = f"cannot be read: {error.strerror}"
                archive.retry_at = time.monotonic() + ARCHIVE_RETRY_SECONDS
            return True
        return False

    def _raw(self, file: SeenFile) -> Callable[[int, int], bytes]:
        """The compressed bytes of a file. The descriptor may be another one each time."""
        return lambda offset, size: os.pread(self._open(file), size, offset)

    def _archive(self, file: SeenFile) -> Archive:
        """Raises OSError where the file is not the one that was read through."""
        found = self._archives.get(file.locator)
        status = os.fstat(self._open(file))
        if found is None or found[1].signature != (status.st_size, status.st_mtime_ns):
            raise OSError(errno.ESTALE, "the compressed file has changed", file.path)
        return found[1]

    def _scan_directory(
        self,
        entries: Iterable[os.DirEntry[bytes]],
        names: Sequence[bytes],
        wanted: Collection[tuple[int, int]],
        inodes: Collection[int],
        found: dict[tuple[int, int], SeenFile],
        strays: set[str],
        problems: list[str],
    ) -> list[os.DirEntry[bytes]]:
        """Add what a directory has to found, strays and problems; returns the lookalikes."""
        matching: set[bytes] = set()
        others: list[os.DirEntry[bytes]] = []
        for entry in sorted(entries, key=lambda e: e.name):
            matches = any(fnmatch.fnmatchcase(entry.name, name) for name in names)
            if entry.name.endswith(COMPRESSED):
                continue  # what it was compressed from keeps its position
            if matches:
                matching.add(entry.name)
            elif entry.inode() not in inodes:
                others.append(entry)
                continue
            try:
                status = entry.stat()
            except OSError as error:
                # gone since it was listed, or a dangling link: the next scan sees what became of it
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    problems.append(f"cannot look at {escape_path(entry.path)}: {error.strerror}")
                continue
            locator = (status.st_dev, status.st_ino)
            if not stat.S_ISREG(status.st_mode) or (not matches and locator not in wanted):
                continue
            readable = self._readable_bytes(entry.path)
            if readable is None:
                continue
            if not matches:
                strays.add(escape_path(entry.path))
            if locator not in found or (matches and found[locator].path in strays):
                seen = _seen(escape_path(entry.path), status)
                found[locator] = replace(seen, size=min(seen.size, readable))
        return [entry for entry in others if _goes_on_from(entry.name, matching) and entry.is_file()]

    # --- comparing

    def judge(self, position: Position, file: SeenFile) -> Verdict:
        """Compare a file with a position, on a descriptor of that file. What was judged is not read again until size
        or times of the file change."""
        if file.compressed:
            try:
                return self._archive(file).judge(position, own=position.locator == file.locator)
            except OSError:
                return Verdict.UNREADABLE
        # all that a verdict depends on
        signature = (file.size, file.mtime_ns, file.ctime_ns, position.committed_offset, position.size_seen)
        key = (*file.locator, position.file_id)
        remembered = self._judged.get(key)
        if remembered is not None and remembered[0] == signature and remembered[1] == position.frontier_sha256:
            return remembered[2]
        try:
            fd = self._open(file)
            status = os.fstat(fd)
            verdict = _compare(fd, status.st_size, position)
        except OSError:
            return Verdict.UNREADABLE
        unchanged = (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == signature[:3]
        # mtime can be set back, ctime cannot
        if unchanged and abs(time.time() - max(file.mtime_ns, file.ctime_ns) / 1e9) > SETTLED_SECONDS:
            if len(self._judged) >= JUDGED_MAX:
                self._judged.clear()
            self._judged[key] = (signature, position.frontier_sha256, verdict)
        return verdict

    def head(self, file: SeenFile) -> bytes:
        """The first bytes of a file, by which it is looked up; empty where it cannot be read."""
        try:
            return self.read_at(file, 0, HEAD_BYTES_MAX)
        except OSError:
            return b""

    def same_rest(self, position: Position, one: SeenFile, other: SeenFile) -> bool | None:
        """Whether two files that agree with a position go on alike, to the end of the first; None where they do as far
        as could be looked, which is COMPARED_BYTES at most."""
        try:
            at, size = position.committed_offset, self.size(one)
            if at >= size:
                return True
            if one.compressed:  # it would have to be read from its beginning
                return False if size > self.size(other) else None
            part = self.read_at(one, at, min(COMPARED_BYTES, size - at))
            if self.read_at(other, at, len(part)) != part:
                return False
        except OSError:
            return None
        return True if at + len(part) >= size else None

    def is_prefix(self, one: SeenFile, other: SeenFile) -> bool:
        """Whether the end of a file stands at the same place in another, longer one."""
        try:
            size = self.size(one)
            at = max(0, size - FRONTIER_BYTES_MAX)
            end = self.read_at(one, at, size - at)
            return bool(end) and self.read_at(other, at, len(end)) == end
        except OSError:
            return False

    # --- reading

    def size(self, file: SeenFile) -> int:
        """The size of a file now, in bytes. Raises OSError."""
        if file.compressed:
            return self._archive(file).size
        return os.fstat(self._open(file)).st_size

    def read(self, position: Position, file: SeenFile, bytes_max: int) -> Chunk | Verdict:
        """Read what follows the committed offset, in one call together with the frontier before it; a verdict other
        than AGREES where the file is no longer what the position says, or cannot be read."""
        if file.compressed:
            return self._read_archive(position, file, bytes_max)
        try:
            fd, bound = self._open(file), self._bound(file.path)
            size = min(os.fstat(fd).st_size, bound)
            start = position.committed_offset - position.frontier_bytes
            # into two buffers, so that megabytes of data are not copied again; of their size, since they begin as NULs
            context = bytearray(max(0, min(position.frontier_bytes, size - start)))
            data = bytearray(max(0, min(bytes_max, size - position.committed_offset)))
            got = os.preadv(fd, [context, data], start)
            del context[got:], data[max(0, got - position.frontier_bytes) :]
            if size < position.size_seen or hashlib.sha256(context).digest() != position.frontier_sha256:
                return _compare(fd, size, position)
            end = start + got
            if end < min(size, position.committed_offset + bytes_max) and b"\n" not in data:
                os.pread(fd, 1, end)  # a read that meets a bad sector stops before it; only the next one says why
        except OSError as error:
            self.trouble = str(error.strerror)
            return Verdict.UNREADABLE
        return Chunk(bytes(context), data, max(size, end))

    def _read_archive(self, position: Position, file: SeenFile, bytes_max: int) -> Chunk | Verdict:
        start = position.committed_offset - position.frontier_bytes
        try:
            archive = self._archive(file)
            if not archive.ready:
                self.trouble = "it has not been read through"
                return Verdict.UNREADABLE
            size = position.frontier_bytes + bytes_max
            buffer = archive.read(self._raw(file), start, size, skip_bytes_max=SKIP_BYTES_MAX)
        except OSError as error:
            self.trouble = str(error.strerror)
            return Verdict.UNREADABLE
        if buffer is None:
            return Verdict.BEHIND
        context = buffer[: position.frontier_bytes]
        if hashlib.sha256(context).digest() != position.frontier_sha256:
            return Verdict.DIFFERS
        archive.bound.add(position.file_id)
        return Chunk(context, buffer[position.frontier_bytes :], archive.size)

    def read_at(self, file: SeenFile, offset: int, bytes_max: int) -> bytes:
        """Plain bytes, unverified: the caller holds a position and verifies with `still_agrees`. Raises OSError."""
        if file.compressed:
            archive = self._archive(file)
            return archive.read(self._raw(file), offset, bytes_max, skip_bytes_max=archive.size) or b""
        return os.pread(self._open(file), max(0, min(bytes_max, self._bound(file.path) - offset)), offset)

    def _bound(self, path: str) -> int:
        bound = self._readable_bytes(unescape_path(path))
        return sys.maxsize if bound is None else bound  # it was readable when it was seen

    def still_agrees(self, position: Position, file: SeenFile, after: Position | None = None) -> bool:
        """The look before a commit is sent: the committed part is unchanged, and what was read, up to the position
        `after` it, has not shrunk away and ends as it did."""
        try:
            if file.compressed:  # what was read of it is what it is, as long as it does not change
                return position.file_id in self._archive(file).bound
            fd = self._open(file)
            if after is not None and os.fstat(fd).st_size < after.committed_offset:
                return False
            return all(_frontier_agrees(fd, place) for place in (position, after) if place is not None)
        except OSError:
            return False

    def next_data(self, file: SeenFile, offset: int) -> int:
        """The next offset that may hold something else than NUL bytes: a file system may know where nothing was ever
        written. Raises OSError."""
        if file.compressed:
            return offset
        fd = self._open(file)
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing more, to the end of the file
                return max(offset, os.fstat(fd).st_size)
            return offset

    def place_at(self, file: SeenFile, offset: int) -> Place:
        """What identifies an offset of a file. Raises OSError, also where the file ends before it."""
        head = self.read_at(file, 0, min(offset, HEAD_BYTES_MAX))
        length = min(offset, FRONTIER_BYTES_MAX)
        frontier = self.read_at(file, offset - length, length)
        if len(frontier) < length or len(head) < min(offset, HEAD_BYTES_MAX):
            raise OSError(errno.EINVAL, f"the file ends before byte {offset}", file.path)
        return Place(offset, head, hashlib.sha256(frontier).digest(), length)

    def after_last_newline(self, file: SeenFile) -> int:
        """The offset behind the last newline of a file as it is now, 0 without one. Raises OSError."""
        if file.compressed:
            return self._archive(file).after_newline
        end = self.size(file)
        while end > 0:
            start = max(0, end - TAIL_BYTES)
            newline = self.read_at(file, start, end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0

    # --- descriptors

    def _open(self, file: SeenFile) -> int:
        """The held descriptor of a file, or a new one of exactly that inode. Raises OSError."""
        handle = self._handles.get(file.locator)
        if handle is not None:
            self._handles.move_to_end(file.locator)
            return handle.fd
        self._make_room()
        # O_NONBLOCK: a FIFO that took the name since the scan must not hang us
        fd = os.open(unescape_path(file.path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != file.locator or not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(errno.ESTALE, "another file has taken the name", file.path)
        self._handles[file.locator] = _Handle(fd, file.path)
        return fd

    def _make_room(self) -> None:
        """Close the longest unused descriptor of a file that stands under its name; another one, deleted or moved out
        of our sight, could not be opened again."""
        if len(self._handles) < self.open_files_max:
            return
        for locator, handle in self._handles.items():
            if _stands_at(handle.path, locator):
                self._close(locator)
                return
        raise OSError(errno.EMFILE, f"all {self.open_files_max} descriptors hold files without a name")

    def hold(self, file: SeenFile) -> None:
        """Open a file, so that it can be read even after it was deleted. Where that fails, the next scan tells."""
        with contextlib.suppress(OSError):
            self._open(file)

    def held_size(self, locator: tuple[int, int]) -> int | None:
        """The size of a file at this moment, if it is held open and can be looked at."""
        if locator in self._archives:
            return None
        handle = self._handles.get(locator)
        try:
            return None if handle is None else min(os.fstat(handle.fd).st_size, self._bound(handle.path))
        except OSError:
            return None

    def release(self, locator: tuple[int, int]) -> None:
        """Let go of a file that will not be read again."""
        if locator in self._handles:
            self._close(locator)

    def _close(self, locator: tuple[int, int]) -> None:
        os.close(self._handles.pop(locator).fd)

    def close(self) -> None:
        """Let go of every file."""
        for locator in list(self._handles):
            self._close(locator)


def _leads_out(
    entry: os.DirEntry[bytes], names: Sequence[bytes], directories: Collection[bytes], leading_out: list[str]
) -> bool:
    """Whether an entry with one of these names (globs) is a symbolic link to a file outside of the directories that are
    looked into; then it is noted.

    Who may write to the volume must not make us read what else this process can read, such as its secrets. The file
    that the link names and the one that `stat` follows it to are compared, since the link may change in between.
    """
    if not entry.is_symlink() or not any(fnmatch.fnmatchcase(entry.name, name) for name in names):
        return False
    target = os.path.realpath(entry.path)
    try:
        named, followed = os.lstat(target), entry.stat()
    except OSError:
        return False  # it leads nowhere
    inside = os.path.dirname(target) in {os.path.realpath(directory) for directory in directories}
    if inside and (named.st_dev, named.st_ino) == (followed.st_dev, followed.st_ino):
        return False
    if stat.S_ISREG(followed.st_mode):
        leading_out.append(
            f"{escape_path(entry.path)}: a symbolic link out of the directories of AUDIT_GLOBS is not read"
        )
    return True


def _goes_on_from(name: bytes, names: Collection[bytes]) -> bool:
    """Whether a name is another one with something behind it, as rotation and compression make them."""
    return any(name[: found.start()] in names for found in _SEPARATOR.finditer(name))


def _stands_at(path: str, locator: tuple[int, int]) -> bool:
    try:
        status = os.stat(unescape_path(path))
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == locator


def _compare(fd: int, size: int, position: Position) -> Verdict:
    head = os.pread(fd, len(position.head), 0)
    if size < position.committed_offset:
        same_beginning = size > 0 and head == position.head[: len(head)] and len(head) == min(size, len(position.head))
        return Verdict.PAST_END if same_beginning else Verdict.SHRUNK
    if position.committed_offset == 0 and size < position.size_seen:
        return Verdict.SHRUNK  # nothing is committed, but what we saw was longer: it is another content
    if head != position.head or not _frontier_agrees(fd, position):
        return Verdict.DIFFERS
    return Verdict.CUT if size < position.size_seen else Verdict.AGREES


def _frontier_agrees(fd: int, position: Position) -> bool:
    frontier = os.pread(fd, position.frontier_bytes, position.committed_offset - position.frontier_bytes)
    return hashlib.sha256(frontier).digest() == position.frontier_sha256


def _seen(path: str, status: os.stat_result, *, listed: bool = True) -> SeenFile:
    compressed = path.endswith(".gz")
    times = status.st_mtime_ns, status.st_ctime_ns
    return SeenFile(path, status.st_dev, status.st_ino, status.st_size, *times, listed, compressed)


def read_range(path: str, locator: tuple[int, int], head: bytes, start: int, end: int) -> bytes | str:
    """The bytes [start, end) of exactly that log, plain or gzip, to be shown; a reason in words where they cannot be.

    path: escaped. Opens and closes a descriptor of its own, so that any thread may call it.
    """
    try:
        with LogStream(path) as stream:
            if stream.file.locator != locator:
                return f"{path}: another file has taken the name"
            beginning = stream.read(len(head))
            if beginning != head:
                return f"{path}: its content is another one by now"
            content = beginning[start:end]
            stream.skip_to(max(start, stream.offset))
            content += stream.read(max(0, end - stream.offset))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return content if len(content) == end - start else f"{path}: ends before byte {end}"


def _fixed_directory(pattern: bytes) -> bytes:
    """The part of a glob before its first magic character: what must exist for a scan to mean anything."""
    directory = os.path.dirname(pattern)
    while glob.has_magic(directory):
        directory = os.path.dirname(directory)
    return directory


def _directories(pattern: bytes) -> list[bytes]:
    directory = os.path.dirname(pattern)
    if not glob.has_magic(directory):
        return [directory]
    if not os.path.isdir(_fixed_directory(pattern)):
        return []
    return sorted(d for d in glob.glob(directory) if os.path.isdir(d))


# --- whole files, for proofs and old logs

GZIP_MAGIC = b"\x1f\x8b"
SKIP_BYTES = 1 << 20


class LogStream:
    """The bytes of one log from its beginning to its end as it is now, whether stored plain or as gzip; in bounded
    memory. Every method raises OSError where the file cannot be read or is damaged."""

    def __init__(self, path: str) -> None:
        """path: escaped."""
        self._fd = os.open(unescape_path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        self.file = _seen(path, status)
        self.offset = 0
        """Of the next byte that is read, in the log."""
        self.compressed = stat.S_ISREG(status.st_mode) and os.pread(self._fd, len(GZIP_MAGIC), 0) == GZIP_MAGIC
        self._content = Content(lambda offset, size: os.pread(self._fd, size, offset))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    @property
    def stored_bytes_read(self) -> int:
        """How far the stored file has been read, against `file.size`."""
        return self._content.compressed_bytes_read if self.compressed else self.offset

    def read(self, bytes_max: int) -> bytes:
        """The next bytes, fewer than asked for at the end only."""
        if not self.compressed:
            data = os.pread(self._fd, bytes_max, self.offset)
        else:
            try:
                data = self._content.take(bytes_max)
            except BrokenArchive as error:
                raise OSError(errno.EIO, str(error), self.file.path) from None
        self.offset += len(data)
        return data

    def skip_to(self, offset: int) -> None:
        """Go forward to an offset of the log, or to its end where it ends before."""
        if not self.compressed:
            self.offset = min(offset, os.fstat(self._fd).st_size)
        while self.offset < offset and self.read(min(SKIP_BYTES, offset - self.offset)):
            pass


def directory_of(path: str) -> str:
    """The directory of an escaped path, escaped."""
    return escape_path(os.path.dirname(unescape_path(path)))


def regular_files(directories: Collection[str]) -> tuple[list[SeenFile], list[str]]:
    """Every regular file in these directories (escaped paths), whatever its name; and what could not be looked at, in
    words."""
    found: dict[tuple[int, int], SeenFile] = {}
    problems: list[str] = []
    for directory in sorted(directories):
        try:
            with os.scandir(unescape_path(directory)) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):
                            file = _seen(escape_path(entry.path), status)
                            found.setdefault(file.locator, file)
        except OSError as error:
            problems.append(f"cannot list {directory}: {error.strerror}")
    return list(found.values()), problems
