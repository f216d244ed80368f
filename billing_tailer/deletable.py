"""Which files may be deleted: rotated, at rest, and every byte of them committed and verified at this moment.

Deletes nothing, nor does anything else here; tests/test_deletable.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from billing_tailer.files import LogStream
from billing_tailer.ledger import Generation, Proofs
from billing_tailer.model import FileState, SeenFile
from billing_tailer.spool import is_spool_file
from billing_tailer.survivors import Survivors
from billing_tailer.verify import verify

REST_SECONDS = 300
"""A writer may hold a rotated file open for a while, and write to it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A file that is known, by its escaped path. reasons: why it must stay; none: it may be deleted. differs: it is
    not what was committed."""

    path: str
    reasons: tuple[str, ...]
    differs: bool = False


def judge_files(
    generations: Sequence[Generation], found: Survivors, ledger: Proofs, progress: Callable[[int], None]
) -> list[Judged]:
    """Every file that holds a generation, by path. The same content may have been read under several sources: one that
    has all of it is enough, but what stands against it counts for all."""
    by_path: dict[str, list[Generation]] = {}
    for one in generations:
        file = found.files.get(one.position.file_id)
        if file is not None:
            by_path.setdefault(file.path, []).append(one)
    files = {file.path: file for file in found.files.values()}
    return [_judged(files[path], by_path[path], ledger, progress) for path in sorted(by_path)]


def _judged(
    file: SeenFile, generations: Sequence[Generation], ledger: Proofs, progress: Callable[[int], None]
) -> Judged:
    reasons = [reason for one in generations for reason in _against(one)]
    if is_spool_file(file.path):
        reasons.append("the daemon removes files of the spool itself")
    if time.time() - file.mtime_ns / 1e9 < REST_SECONDS:
        reasons.append(f"was written to within the last {REST_SECONDS} seconds")
    if reasons:
        return Judged(file.path, tuple(dict.fromkeys(reasons)))
    checked = [verify(one, file, ledger, progress) for one in generations]
    if any(one.differences for one in checked):
        return Judged(file.path, ("is not what was committed: see `billing-tailer verify`",), differs=True)
    if not any(one.is_whole for one in checked):
        return Judged(file.path, ("has bytes that are not committed",))
    if not _is_unchanged(file):
        return Judged(file.path, ("has changed while it was verified",))
    return Judged(file.path, ())


def _against(generation: Generation) -> list[str]:
    state, open_letters = generation.position.state, generation.letters_open
    reasons = []
    if state is FileState.LIVE:
        reasons.append("is live")
    if state is FileState.BLOCKED:
        reasons.append(f"is blocked: {generation.position.blocked_reason}")
    if open_letters:
        reasons.append(f"has open dead letters ({open_letters}), which may need its bytes")
    return reasons


def _is_unchanged(file: SeenFile) -> bool:
    try:
        with LogStream(file.path) as stream:
            return stream.file == file
    except OSError:
        return False
