"""What an operator decides of a generation that nothing is read from: missing, or blocked.

Either it is given up, with its unread rest as a gap, or it goes on in another file. Used by the verbs `offsets
accept-gap` and `offsets adopt`; tests/test_offsets.py.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from billing_tailer.errors import ConfigError
from billing_tailer.files import LogFiles, LogStream, directory_of, unescape_path
from billing_tailer.identity import lost
from billing_tailer.ledger import Ruling
from billing_tailer.model import FileState, GapReason, Position, SeenFile
from billing_tailer.spool import is_spool_file
from billing_tailer.survivors import agrees


def plan_acceptance(position: Position, *, reset_id: str, reason: str, by: str) -> Ruling:
    """Give up what is not committed of a generation. Raises ConfigError where something may still be read of it."""
    _require_undecided(position)
    after = replace(position, state=FileState.FINAL, blocked_reason=None)
    gap = lost(position, GapReason.ACCEPTED)
    return Ruling(reset_id, position, after, gap, f"accept-gap {position.file_id}", reason, by)


def plan_adoption(
    position: Position,
    path: str,
    known: Iterable[Position],
    files: LogFiles,
    *,
    reset_id: str,
    reason: str,
    by: str,
) -> Ruling:
    """Let a generation go on in the file at a path (escaped), at its committed offset.

    known: every generation of the source. Raises ConfigError, with the next step, where the file does not begin with
    all that was seen of the generation, is read as another one, or would not be found by the daemon.
    """
    _require_undecided(position)
    if position.committed_offset == 0:
        raise ConfigError(
            f"nothing is committed of generation {position.file_id} ({position.path}), by which it could be known",
            f"`billing-tailer offsets accept-gap {position.file_id}`; the daemon reads {path} as a file of its own",
        )
    _require_found(position, path, files)
    file = _require_content(position, path)
    holders = [one for one in known if one.locator == file.locator and one.file_id != position.file_id]
    for other in holders:
        if other.committed_offset and (other.state is not FileState.FINAL or agrees(path, other)):
            raise ConfigError(
                f"{path} is generation {other.file_id} ({other.state}), read to byte {other.committed_offset}",
                f"what it holds is read there: `billing-tailer offsets accept-gap {position.file_id}`",
            )
    stays = path == position.path and not file.compressed
    after = replace(
        position,
        path=path,
        device=file.device,
        inode=file.inode,
        state=FileState.LIVE if stays else FileState.ROTATED,
        blocked_reason=None,
    )
    # of these nothing is committed: all of the file is read by the generation that goes on in it
    ended = tuple(one.file_id for one in holders if one.state is not FileState.FINAL)
    return Ruling(reset_id, position, after, None, f"adopt {position.file_id} {path}", reason, by, ended)


def _require_undecided(position: Position) -> None:
    if position.state in (FileState.MISSING, FileState.BLOCKED):
        return
    what = f"generation {position.file_id} ({position.path}) is {position.state}"
    if position.state is FileState.FINAL:
        raise ConfigError(f"{what}: there is nothing to decide", "see `billing-tailer files` for its gaps")
    raise ConfigError(
        f"{what}, and only what is missing or blocked can be decided: the daemon reads it to its end",
        "to leave out a part of it, `billing-tailer offsets reset`; to wait until it is out of sight, start the daemon",
    )


def _require_found(position: Position, path: str, files: LogFiles) -> None:
    """Only what the daemon looks at can be read on."""
    if is_spool_file(position.path):
        raise ConfigError(
            f"{position.path} is a file of the spool, which goes on under its own name only",
            "put it back into the directory of the spool, where the daemon finds it by itself",
        )
    name = Path(os.fsdecode(unescape_path(path)))
    if str(name.parent) not in files.directories() or not files.concerns(str(name)):
        raise ConfigError(
            f"{path} matches no glob of BILLING_TAILER_AUDIT_GLOBS: the daemon would not find it",
            f"move it into {directory_of(position.path)}, under a name that matches, then adopt it there",
        )


def _require_content(position: Position, path: str) -> SeenFile:
    """The file at a path, which begins with all that was seen of a generation: head, frontier and length agree."""
    accept = f"`billing-tailer offsets accept-gap {position.file_id}` gives up what is not committed"
    offset, start = position.committed_offset, position.committed_offset - position.frontier_bytes
    try:
        with LogStream(path) as stream:
            head = stream.read(len(position.head))
            pairs = enumerate(zip(head, position.head, strict=False))
            differing = next((at for at, (here, there) in pairs if here != there), None)
            frontier = head[start:]
            if not frontier:
                stream.skip_to(start)
            frontier += stream.read(position.frontier_bytes - len(frontier))
            committed_end = stream.offset
            stream.skip_to(position.size_seen)
            end, compressed = stream.offset, stream.compressed
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "name a log file, plain or .gz") from None
    if differing is not None:
        raise ConfigError(
            f"{path} is another file than generation {position.file_id} ({position.path}): they differ at byte "
            f"{differing}",
            f"name the file that has its content, or {accept}",
        )
    if committed_end < offset:
        raise ConfigError(
            f"{path} ends at byte {committed_end}, and {offset} bytes are committed of generation {position.file_id}",
            f"name a file that has all of them, or {accept}",
        )
    if hashlib.sha256(frontier).digest() != position.frontier_sha256:
        raise ConfigError(
            f"{path} is another file than generation {position.file_id} ({position.path}): they differ between byte "
            f"{start} and byte {offset}",
            f"name the file that has its content, or {accept}",
        )
    if end < position.size_seen:
        raise ConfigError(
            f"{path} ends at byte {end}, and generation {position.file_id} was seen to byte {position.size_seen}: what "
            "is between would be lost without a word",
            f"{accept}; {path} is read from 0 then, and the calls that are known are replays",
        )
    if compressed is not path.endswith(".gz"):
        raise ConfigError(
            f"{path} is {'' if compressed else 'not '}compressed, and its name says otherwise",
            "rename it: the daemon goes by the name",
        )
    return stream.file
