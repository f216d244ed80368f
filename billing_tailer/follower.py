"""The generations of one source: what a scan means for them, and what is to be read from where.

Scans, has `identity` match what was seen, commits what changed (new files, rotations, ended generations with their
gaps, blocked ones) and keeps the positions of this process in step with Postgres.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from billing_tailer.events import Events
from billing_tailer.files import LogFiles, Scan, escape_path
from billing_tailer.health import Health
from billing_tailer.identity import Matching, match
from billing_tailer.ledger import Changes, Ledger, NewFile
from billing_tailer.model import HEAD_BYTES_MAX, FileState, Position, SeenFile

SCAN_SHARE = 20
"""Between two scans at least so many times their duration passes, so that scanning costs at most a twentieth."""


class Follower:
    """Positions by `file_id`, and for those that may be read the file that holds them."""

    def __init__(
        self,
        files: LogFiles,
        ledger: Ledger,
        events: Events,
        health: Health,
        *,
        start_at_end: bool,
        is_spool: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """start_at_end: a source without log files begins at their ends. is_spool: whether a path is a spool file,
        which is never skipped."""
        self._files = files
        self._ledger = ledger
        self._events = events
        self._health = health
        self._start_at_end = start_at_end
        self._is_spool = is_spool
        self._next_scan = 0.0
        self._unread_since: dict[int, float] = {}
        self._unreadable: list[str] = []
        self.registered = False
        """The last scan gave new files their ids; the next one, at once, will have them read."""
        self.positions: dict[int, Position] = {}
        self.followed: dict[int, SeenFile] = {}

    def load(self) -> None:
        """Read every position from Postgres, which owns them."""
        self.positions = {position.file_id: position for position in self._ledger.positions()}
        self.followed = {}
        self._next_scan = 0.0

    def moved(self, positions: Sequence[Position]) -> None:
        """Adopt positions after their COMMIT returned."""
        for position in positions:
            self.positions[position.file_id] = position

    def scan_soon(self) -> None:
        """Something about a file is not as expected: look again before anything else is read."""
        self._next_scan = 0.0

    def scan_if_due(self) -> None:
        """Look at the directories and commit what changed. Raises PositionMoved, LedgerUnavailable."""
        started = time.monotonic()
        if started < self._next_scan:
            return
        unfinished = {p.locator for p in self.positions.values() if p.state is not FileState.FINAL}
        scan = self._files.scan(unfinished)
        self._unreadable = []
        matching = match(list(self.positions.values()), scan.files, self._files.judge, complete=scan.complete)
        self._note_sizes(matching.kept | matching.matched)
        registered = self._apply(matching, scan)
        self.followed = {
            file_id: file
            for file_id, file in (matching.kept | matching.matched).items()
            if self.positions[file_id].state is not FileState.BLOCKED
        }
        self._report(scan, matching)
        self.registered = registered
        self._next_scan = 0.0 if registered else time.monotonic() + SCAN_SHARE * (time.monotonic() - started)

    def _note_sizes(self, found: Mapping[int, SeenFile]) -> None:
        """Remember how far each generation went, in case it is truncated before it is read. Only where its content was
        found: the size of what replaced it says nothing about it."""
        for file_id, file in found.items():
            position = self.positions[file_id]
            if file.size > position.size_seen:
                self.positions[file_id] = replace(position, size_seen=file.size)

    def _apply(self, matching: Matching, scan: Scan) -> bool:
        """Commit what the matching changes; True if files were registered."""
        after = [_placed(position, matching, complete=scan.complete) for position in self.positions.values()]
        updated = tuple(p for p in after if p != self.positions[p.file_id])
        new = tuple(file for file in map(self._new_file, matching.new) if file is not None)
        gaps = tuple(gap for gap in matching.ended.values() if gap is not None)
        if not (updated or new or gaps):
            return False
        self._ledger.apply(Changes(new, updated, gaps))
        for position in updated:
            self._report_change(self.positions[position.file_id], position)
        self.moved(updated)
        for gap in gaps:
            self._events.gap(gap, self.positions[gap.file_id].path)
        if new:
            for position in self._ledger.positions():
                if self.positions.setdefault(position.file_id, position) is position:
                    self._events.info("file.new", **_described(position))
        in_sight = {file.locator for file in scan.files}
        for position in updated:
            if position.state is FileState.FINAL and position.locator not in in_sight:
                self._files.release(position.locator)
        return bool(new)

    def _new_file(self, seen: SeenFile) -> NewFile | None:
        """A generation to register; None where the file cannot be opened, which is tried again at the next scan."""
        earlier = [p for p in self.positions.values() if p.path == seen.path]
        previous = max(earlier, key=lambda p: p.file_id, default=None)
        try:
            at_end = self._start_at_end and not self._is_spool(seen.path)
            at_end = at_end and all(self._is_spool(position.path) for position in self.positions.values())
            place = self._files.place_at(seen, self._files.after_last_newline(seen) if at_end else 0)
        except OSError as error:
            self._unreadable.append(f"{seen.path}: {error.strerror}")
            return None
        if previous is None:
            return NewFile(seen, None, 1, place)
        return NewFile(seen, previous.file_id, previous.generation + 1, place)

    def _report(self, scan: Scan, matching: Matching) -> None:
        blocked = [p for p in self.positions.values() if p.state is FileState.BLOCKED]
        unread = {file.path for file in matching.unread} - {p.path for p in blocked}
        self._health.say(
            "files",
            [
                *scan.problems,
                *self._unreadable,
                *(f"{path}: cannot be read" for path in sorted(unread)),
                *(f"{p.path}: blocked, {p.blocked_reason}, at byte {p.committed_offset}" for p in blocked),
                *(f"{path}: is followed, but no glob of AUDIT_GLOBS matches its name" for path in scan.strays),
            ],
        )

    def _report_change(self, before: Position, after: Position) -> None:
        if (before.state, before.path, before.locator) != (after.state, after.path, after.locator):
            report = self._events.error if after.state is FileState.BLOCKED else self._events.info
            report("file.changed", was=before.path, **_described(after))

    def spool_is_behind(self) -> bool:
        """Whether a spool file in sight has bytes that are not committed."""
        return any(
            file.size > self.positions[file_id].committed_offset
            for file_id, file in self.followed.items()
            if self._is_spool(file.path)
        )

    def is_committed(self, path: bytes, size: int) -> bool:
        """Whether every byte of a file of this size is committed."""
        text = escape_path(path)
        return any(p.path == text and p.committed_offset >= size for p in self.positions.values())

    def removed(self, paths: Sequence[bytes]) -> None:
        """Files that were removed because they are committed: their generations are final."""
        gone = {escape_path(path) for path in paths}
        ended = tuple(replace(p, state=FileState.FINAL) for p in self.positions.values() if p.path in gone)
        if not ended:
            return
        self._ledger.apply(Changes(updated=ended))
        self.moved(ended)
        for position in ended:
            self.followed.pop(position.file_id, None)
            self._files.release(position.locator)
            self._events.info("file.removed", **_described(position))

    def may_stand_by(self, recorded: Sequence[Position]) -> bool:
        """Whether this volume shows a file that the active tailer of our source id follows, judged by its content."""
        live = [p for p in recorded if p.state in (FileState.LIVE, FileState.ROTATED) and p.committed_offset > 0]
        if not live:
            return True
        for file in self._files.scan().files:
            try:
                head = self._files.read_at(file, 0, HEAD_BYTES_MAX)
            except OSError:
                continue
            if any(head.startswith(position.head) for position in live):
                return True
        return False

    def show(self, now: float, *, waiting: bool) -> None:
        """Refresh the gauges of files. now: seconds of the epoch. waiting: without a ledger, sizes come from a scan."""
        if waiting:
            self._see_without_ledger()
        rows: dict[int, tuple[str, int, int]] = {}
        for file_id, file in self.followed.items():
            position = self.positions.get(file_id)
            offset = 0 if position is None else position.committed_offset
            size = max(file.size, offset if position is None else position.size_seen)
            unread = size > offset
            if unread:
                self._unread_since.setdefault(file_id, now)
            else:
                self._unread_since.pop(file_id, None)
            if unread or file.named:
                rows[file_id] = (file.path, offset, size)
        self._unread_since = {key: since for key, since in self._unread_since.items() if key in rows}
        self._events.oldest_uncommitted(min(self._unread_since.values(), default=None))
        self._events.files(self.positions, rows)

    def _see_without_ledger(self) -> None:
        """Match by locator alone, for the gauges only: nothing is read or decided while Postgres is away."""
        scan = self._files.scan({position.locator for position in self.positions.values()})
        by_locator = {p.locator: p.file_id for p in sorted(self.positions.values(), key=lambda p: p.file_id)}
        self.followed = {by_locator.get(file.locator, -1 - number): file for number, file in enumerate(scan.files)}
        self._health.say("files", scan.problems)


def _placed(position: Position, matching: Matching, *, complete: bool) -> Position:
    """A position with the place and state that a matching gives it."""
    file_id = position.file_id
    if file_id in matching.ended:
        return replace(position, state=FileState.FINAL, blocked_reason=None)
    if file_id in matching.blocked:
        return replace(position, state=FileState.BLOCKED, blocked_reason=matching.blocked[file_id])
    file = matching.kept.get(file_id) or matching.matched.get(file_id)
    if file is None:
        lost_sight = complete and file_id in matching.missing and position.state in (FileState.LIVE, FileState.ROTATED)
        return replace(position, state=FileState.MISSING) if lost_sight else position
    moved = file.path != position.path or not file.named
    if position.state is FileState.FINAL and file.size <= position.committed_offset:
        state = FileState.FINAL
    elif moved or position.state in (FileState.ROTATED, FileState.FINAL):
        state = FileState.ROTATED
    else:
        state = FileState.LIVE
    return replace(position, path=file.path, device=file.device, inode=file.inode, state=state, blocked_reason=None)


def _described(position: Position) -> dict[str, object]:
    return {
        "file_id": position.file_id,
        "path": position.path,
        "generation": position.generation,
        "offset": position.committed_offset,
        "state": position.state,
        "reason": position.blocked_reason,
    }
