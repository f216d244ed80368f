"""Where the content of each generation is on disk today, plain or compressed: found by locator, else by content.

Reads only, and decides nothing about positions: that is the daemon's (`identity`). Looks into the directories of the
globs and of every recorded path (tests/test_verify.py::test_survivors).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from billing_tailer.files import LogStream, directory_of, regular_files
from billing_tailer.ledger import Generation
from billing_tailer.model import HEAD_BYTES_MAX, FileState, Position, SeenFile

GoOn = Callable[[], None]
SKIP_BYTES = 8 << 20


@dataclass(slots=True)
class Survivors:
    """files: by file_id, where its content is. unreadable: of these generations the file is there, but not readable:
    why. problems: directories that could not be listed, in words."""

    files: dict[int, SeenFile] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Candidate:
    file: SeenFile
    head: bytes = b""
    compressed: bool = False
    trouble: str | None = None


def survivors(generations: Sequence[Generation], directories: Iterable[str]) -> Survivors:
    """Find each generation that has something committed. directories: those of the globs, escaped."""
    places = {*directories, *(directory_of(one.position.path) for one in generations)}
    seen, problems = regular_files(places)
    result = Survivors(problems=problems)
    candidates = [_looked_at(file) for file in seen]
    # the same content may have been read under two sources: by a daemon, and from an archive
    for source_id in {one.source_id for one in generations}:
        mine = [one.position for one in generations if one.source_id == source_id and one.position.committed_offset]
        newest = {one.position.locator: one.position.file_id for one in generations if one.source_id == source_id}
        _find(mine, newest, candidates, result)
    return result


def _looked_at(file: SeenFile) -> _Candidate:
    candidate = _Candidate(file)
    try:
        with LogStream(file.path) as stream:
            candidate.compressed = stream.compressed
            candidate.head = stream.read(HEAD_BYTES_MAX)
    except OSError as error:
        candidate.trouble = error.strerror or type(error).__name__
    return candidate


def _find(
    positions: Sequence[Position],
    newest: dict[tuple[int, int], int],
    candidates: Sequence[_Candidate],
    result: Survivors,
) -> None:
    """By place, then by content, then by what a damaged file still has in common with it; one to one."""
    free = {one.file.locator: one for one in candidates}
    wanted = {one.file_id: one for one in positions}

    def take(is_its: Callable[[Position, _Candidate], bool]) -> None:
        for position in [wanted[file_id] for file_id in sorted(wanted, reverse=True)]:
            for candidate in list(free.values()):
                if is_its(position, candidate):
                    del wanted[position.file_id]
                    del free[candidate.file.locator]
                    if candidate.trouble is None:
                        result.files[position.file_id] = candidate.file
                    else:
                        result.unreadable[position.file_id] = f"{candidate.file.path}: {candidate.trouble}"
                    break

    def is_at_its_place(position: Position, one: _Candidate) -> bool:
        """The very file, whatever is in it: what differs is to be named. Unless another generation stands there now."""
        still_its = newest[position.locator] == position.file_id and position.state is not FileState.FINAL
        return one.file.locator == position.locator and one.file.path == position.path and still_its

    take(lambda position, one: one.file.locator == position.locator and _agrees(position, one))
    take(is_at_its_place)
    take(_agrees)
    take(lambda position, one: one.head.startswith(position.head) or _named_after(position, one))


def _agrees(position: Position, one: _Candidate) -> bool:
    return one.trouble is None and one.head.startswith(position.head) and agrees(one.file.path, position)


def agrees(path: str, position: Position, go_on: GoOn = lambda: None) -> bool:
    """Whether a file (escaped path) begins with all that is committed of a generation, by head and frontier. Inode
    numbers are reused at once: the content decides. go_on: see `skip`."""
    start = position.committed_offset - position.frontier_bytes
    try:
        with LogStream(path) as stream:
            head = stream.read(min(len(position.head), start))
            if not position.head.startswith(head):
                return False
            skip(stream, start, go_on)
            frontier = stream.read(position.frontier_bytes)
    except OSError:
        return False
    same_head = (head + frontier[: len(position.head) - len(head)]) == position.head
    return same_head and hashlib.sha256(frontier).digest() == position.frontier_sha256


def skip(stream: LogStream, offset: int, go_on: GoOn) -> None:
    """Go forward to an offset, or to the end. go_on: called every moment, since what is compressed takes its time."""
    before = -1
    while before < stream.offset < offset:
        go_on()
        before = stream.offset
        stream.skip_to(min(offset, before + SKIP_BYTES))


def _named_after(position: Position, one: _Candidate) -> bool:
    return one.compressed and one.file.path == f"{position.path}.gz"
