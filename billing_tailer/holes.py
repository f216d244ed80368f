"""NUL bytes where a line should begin: a hole that a writer without O_APPEND left behind a truncation, or bytes whose
size is on disk before their data.

They are waited for. Only once something follows, and a second look after HOLE_SECONDS finds them unchanged, are they
given up: a gap `hole` up to the first byte that is not NUL. With nothing behind them they are never committed, but in a
file that will not grow any more.
"""

import time
from dataclasses import dataclass

from billing_tailer.files import LogFiles
from billing_tailer.model import Position, SeenFile

HOLE_SECONDS = 2.0
"""Data may come so long after the size of its file."""
LOOK_BYTES = 1 << 20
LOOK_BYTES_MAX = 64 << 20
"""So much of a hole is looked at in one round, unless the file system knows that nothing was written there."""


@dataclass(slots=True)
class _Hole:
    """at: how far it was looked at. size: of the file then. end: where data begins, found at `since` (monotonic)."""

    start: int
    at: int
    size: int
    end: int | None = None
    since: float = 0.0


class Holes:
    """The holes at which files stand, by `file_id`. Known only to this process; can be forgotten at any time."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files
        self._holes: dict[int, _Hole] = {}
        self.unfinished = False
        """The last look was cut short: look again at once."""

    def forget(self) -> None:
        """Look at all of them anew."""
        self._holes.clear()

    def waits_for_data(self, file_id: int) -> bool:
        """Whether nothing follows the NUL bytes: there is nothing to do before the file changes."""
        hole = self._holes.get(file_id)
        return hole is not None and hole.end is None and not self.unfinished

    def end_of(self, position: Position, file: SeenFile, *, finished: bool) -> int | None:
        """Where the hole at a position ends, once that is certain. Raises OSError."""
        hole = self._holes.get(position.file_id)
        if hole is None or hole.start != position.committed_offset or (hole.end is None and hole.size != file.size):
            hole = self._holes[position.file_id] = _Hole(
                position.committed_offset, position.committed_offset, file.size
            )
        if hole.end is not None and not finished and time.monotonic() - hole.since < HOLE_SECONDS:
            self.unfinished = False
            return None
        found = self._look(hole, file)
        if found is None or (found >= file.size and not finished):
            return None
        if hole.end == found:
            del self._holes[position.file_id]
            return found
        # found for the first time, or data has come meanwhile: once more, later
        hole.end, hole.since, hole.at = found, time.monotonic(), hole.start
        return None

    def _look(self, hole: _Hole, file: SeenFile) -> int | None:
        """On from where the last look ended, to the first byte that is not NUL or to the end of the file; None where
        that is further than one round may look."""
        looked = 0
        while looked < LOOK_BYTES_MAX:
            hole.at = self._files.next_data(file, hole.at)
            data = self._files.read_at(file, hole.at, LOOK_BYTES)
            rest = data.lstrip(b"\0")
            hole.at += len(data) - len(rest)
            if rest or not data:
                self.unfinished = False
                return hole.at
            looked += len(data)
        self.unfinished = True
        return None
