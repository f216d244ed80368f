"""Where each generation stands beside the file that it is read from, for the verbs that list them."""

import glob
from collections.abc import Sequence
from typing import Any

from billing_tailer.configured import spool_directory
from billing_tailer.files import LogFiles, directory_of, regular_files
from billing_tailer.model import FileState, Position
from billing_tailer.settings import Settings


def file_rows(settings: Settings, positions: Sequence[Position]) -> list[dict[str, Any]]:
    """Each position as a row, with the size of its log, of a gzip file that of its content; none where it is not in
    sight or another content has taken its place, which is no reason not to answer."""
    sizes = _sizes(settings, positions)
    return [_file_row(position, sizes.get(position.file_id)) for position in positions]


def _sizes(settings: Settings, positions: Sequence[Position]) -> dict[int, int]:
    """By file_id."""
    spool = spool_directory(settings)
    globs = settings.audit_globs if spool is None else (*settings.audit_globs, f"{glob.escape(str(spool))}/*.jsonl")
    # gzip files are final once they are committed; of others a final one's place is another's
    at = {one.locator: one for one in positions if one.state is not FileState.FINAL or one.path.endswith(".gz")}
    files = LogFiles(globs, settings.open_files_max)
    try:
        scan = files.scan(at.keys(), at.get)
    finally:
        files.close()
    found = {file.locator: file.size for file in scan.files}
    # of a gzip file that is not committed to its end, what the daemon saw: a verb does not read it through
    unread = {locator: one for locator, one in at.items() if one.path.endswith(".gz") and locator not in found}
    there = {file.locator for file in regular_files({directory_of(one.path) for one in unread.values()})[0]}
    seen = {locator: one.size_seen for locator, one in unread.items() if locator in there}
    return {
        one.file_id: (found | seen)[locator]
        for locator, one in at.items()
        if locator in found or (locator in seen and one.state is not FileState.FINAL)
    }


def _file_row(position: Position, size: int | None) -> dict[str, Any]:
    return {
        "file_id": position.file_id,
        "path": position.path,
        "generation": position.generation,
        "state": str(position.state),
        "blocked_reason": None if position.blocked_reason is None else str(position.blocked_reason),
        "committed_offset": position.committed_offset,
        "size": size,
        "lag_bytes": None if size is None else max(0, size - position.committed_offset),
        "last_commit_at": None if position.last_commit_at is None else position.last_commit_at.isoformat(),
        "first_seen_at": None if position.first_seen_at is None else position.first_seen_at.isoformat(),
        "previous_file_id": position.previous_file_id,
    }
