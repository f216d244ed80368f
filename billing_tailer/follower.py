"""The generations of one source: what a scan means for them, and what is to be read from where.

Scans, has `identity` match what was seen, commits what changed (new files, rotations, ended generations with their
gaps, blocked ones) and keeps the positions of this process in step with Postgres.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from billing_tailer.events import Events
from billing_tailer.files import LogFiles, Scan, escape_path
from billing_tailer.health import Health, Sight
from billing_tailer.identity import Matching, deciding_commands, match
from billing_tailer.ledger import Changes, Ledger, NewFile
from billing_tailer.model import HEAD_BYTES_MAX, FileState, Position, SeenFile

SCAN_SHARE = 100
"""Between two scans at least so many times their duration passes, so that scanning costs at most a hundredth."""
SCAN_SECONDS_MAX = 2.0
"""So often is looked at least, however long a look takes."""
LEISURE_SECONDS = 0.25
SILENT_SECONDS = 10.0
"""A file that is gone from the directories and has not changed for so long has no writer, if another replaced it."""
REPLACED_SECONDS = 600.0
"""So long a file that another one replaced is still watched for a writer."""
FINAL_SECONDS = 24 * 3600.0
"""A file that is gone from the directories and has not changed for so long will not change any more."""
NEW_FILES_MAX = 1000
"""So many files are registered in one transaction; the others follow in the next scan, at once."""


@dataclass(frozen=True, slots=True)
class _Gone:
    """A file that is only held open: how it looked, and since when (monotonic seconds) it has not changed."""

    size: int
    mtime_ns: int
    since: float


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
        self._looked_at = 0.0
        self._saw_all = False
        self._at_leisure = 0.0
        self._gone: dict[tuple[int, int], _Gone] = {}
        self._replaced: dict[tuple[int, int], int] = {}
        self._unread: dict[int, tuple[int, float]] = {}
        self._unreadable: list[str] = []
        self._acted_on: tuple[Scan, Matching] | None = None
        """What the last scan saw and made of it, as long as the positions are those of then."""
        self._act_again = 0.0
        self.registered = False
        """The last scan gave new files their ids; the next one, at once, will have them read."""
        self.positions: dict[int, Position] = {}
        self.followed: dict[int, SeenFile] = {}
        self.finished: set[int] = set()
        """Of those followed, the ones that will not grow: what has no newline at their end will never get one."""

    def load(self) -> None:
        """Read every position from Postgres, which owns them."""
        self.positions = {position.file_id: position for position in self._ledger.positions()}
        self.followed = {}
        self._acted_on = None
        self._next_scan = 0.0

    def moved(self, positions: Sequence[Position]) -> None:
        """Adopt positions after their COMMIT returned. What was seen of a file meanwhile is not forgotten."""
        self._acted_on = None
        for position in positions:
            before = self.positions.get(position.file_id)
            size = position.size_seen if before is None else max(before.size_seen, position.size_seen)
            self.positions[position.file_id] = replace(position, size_seen=size)

    def scan_soon(self, *, at_leisure: bool = False) -> None:
        """Something about a file is not as expected: look again before anything else is read. at_leisure: what cannot
        be read may stay so for long; the other files are not to wait for a scan in every round."""
        self._next_scan = min(self._next_scan, self._at_leisure) if at_leisure else 0.0

    def scan_if_due(self) -> None:
        """Look at the directories and commit what changed. Raises PositionMoved, LedgerUnavailable."""
        started = time.monotonic()
        if started < self._next_scan:
            return
        self._unreadable = []
        scan, matching = self._look(started)
        if scan.archives_unknown and self._begins_at_ends():
            self._looked_at, self._saw_all, self._acted_on = started, False, None
            waiting = f"{scan.archives_unknown} compressed files are read through before the others begin at their ends"
            self._health.say("files", [waiting])
            return
        if (scan, matching) != self._acted_on or (self._gone and started >= self._act_again):
            self._act_on(scan, matching, started)
        self._looked_at = started
        now = time.monotonic()
        pause = min(SCAN_SECONDS_MAX, SCAN_SHARE * (now - started))
        self._next_scan = 0.0 if self.registered else now + pause
        self._at_leisure = now + max(LEISURE_SECONDS, pause)

    def _act_on(self, scan: Scan, matching: Matching, now: float) -> None:
        """Commit what a matching changes, and follow its files. The same matching at the same positions changes nothing
        more, but for new files, which are tried again, and those that are gone, of which time decides, if slowly."""
        self._acted_on = None if matching.new else (scan, matching)  # until `moved` says otherwise
        self._act_again = now + SILENT_SECONDS
        self.note_sizes({file_id: file.size for file_id, file in (matching.kept | matching.matched).items()})
        silent = self._silent_for_a_day(matching, now)
        final = {i for i in silent if matching.kept[i].size <= self.positions[i].committed_offset}
        self.registered = self._apply(matching, final, complete=scan.complete)
        self.followed = {
            file_id: file
            for file_id, file in (matching.kept | matching.matched).items()
            if self.positions[file_id].state is not FileState.BLOCKED
        }
        self.finished = silent | {file_id for file_id, file in self.followed.items() if file.compressed}
        for file_id, file in matching.replaced.items():
            if matching.matched[file_id].compressed:
                self._files.release(file.locator)
            else:
                self._replaced[file.locator] = file.size
        self._let_go(matching, now)
        self._report(scan, matching)
        self._saw_all = self._is_whole(scan, matching)

    def _is_whole(self, scan: Scan, matching: Matching) -> bool:
        """Whether all log files that there are have a position now, and all but the blocked ones can be read."""
        if not scan.complete or scan.problems or scan.broken or self._unreadable or matching.longer:
            return False
        blocked = {p.path for p in self.positions.values() if p.state is FileState.BLOCKED}
        return len(matching.new) <= NEW_FILES_MAX and all(file.path in blocked for file in matching.unread)

    def _look(self, now: float) -> tuple[Scan, Matching]:
        """Scan and match. What would be ended is looked for a second time: a copy of it may be younger than the
        listing."""
        suspected: set[int] = set()
        while True:
            unfinished = {p.locator for p in self.positions.values() if p.state is not FileState.FINAL}
            scan = self._files.scan(unfinished, self._committed_at)
            self._note_gone(scan, now)
            scan = self._without_replaced(scan)
            matching = match(
                list(self.positions.values()),
                scan.files,
                self._files,
                complete=scan.complete,
                silent={locator for locator, gone in self._gone.items() if now - gone.since >= SILENT_SECONDS},
                tick=self._tick,
            )
            if matching.ended.keys() <= suspected:
                return scan, matching
            suspected |= matching.ended.keys()

    def _tick(self) -> None:
        """Between two looks of a long scan: the loop is alive, and so is its session."""
        self._health.tick()
        self._ledger.ping()

    def _without_replaced(self, scan: Scan) -> Scan:
        """A file that another one replaced is of no interest any more, unless it grows: then its writer is not gone."""
        self._replaced = {
            file.locator: file.size
            for file in scan.files
            if not file.listed and self._replaced.get(file.locator) == file.size
        }
        return replace(scan, files=tuple(file for file in scan.files if file.locator not in self._replaced))

    def _note_gone(self, scan: Scan, now: float) -> None:
        """Remember since when files without a name in any directory have been silent."""
        gone: dict[tuple[int, int], _Gone] = {}
        for file in scan.files:
            if file.listed or not scan.complete:
                continue
            before = self._gone.get(file.locator)
            unchanged = before is not None and (before.size, before.mtime_ns) == (file.size, file.mtime_ns)
            gone[file.locator] = before if unchanged and before else _Gone(file.size, file.mtime_ns, now)
        if scan.complete:
            self._gone = gone

    def _silent_for_a_day(self, matching: Matching, now: float) -> set[int]:
        """Generations that are gone from the directories and have not changed for a day."""
        return {
            file_id
            for file_id, file in matching.kept.items()
            if file.locator in self._gone and now - self._gone[file.locator].since >= FINAL_SECONDS
        }

    def _committed_at(self, locator: tuple[int, int]) -> Position | None:
        """The generation at a locator that is final and committed to its end."""
        for position in self.positions.values():
            if position.locator == locator and position.state is FileState.FINAL:
                return position
        return None

    def read_archives(self) -> bool:
        """Read on through compressed files of which nothing is known yet; False where there are none."""
        if not self._files.read_archives(self._offsets_of):
            return False
        self.scan_soon(at_leisure=True)
        return True

    def _offsets_of(self, head: bytes) -> set[int]:
        """Where the generations with this head are to be compared."""
        return {p.committed_offset for p in self.positions.values() if head.startswith(p.head)}

    def _let_go(self, matching: Matching, now: float) -> None:
        """Close files that are gone and committed to their end: those that were silent for a day, and, where there are
        so many that log files could not be opened, the longest silent ones."""
        consumed = {
            file.locator
            for file_id, file in matching.kept.items()
            if file.size <= self.positions[file_id].committed_offset
        }
        since = {
            locator: self._gone[locator].since for locator in (consumed | self._replaced.keys()) & self._gone.keys()
        }
        too_many = len(since) - self._files.open_files_max // 2
        for number, locator in enumerate(sorted(since, key=since.__getitem__)):
            patience = REPLACED_SECONDS if locator in self._replaced else FINAL_SECONDS
            if number < too_many or now - since[locator] >= patience:
                self._files.release(locator)
        for file in matching.redundant:
            self._files.release(file.locator)

    def note_sizes(self, sizes: Mapping[int, int]) -> None:
        """Remember how far each generation went, in case it is truncated before it is committed. Only where its content
        was found: the size of what replaced it says nothing about it."""
        for file_id, size in sizes.items():
            position = self.positions[file_id]
            if size > position.size_seen:
                self.positions[file_id] = replace(position, size_seen=size)

    def _apply(self, matching: Matching, final: Collection[int], *, complete: bool) -> bool:
        """Commit what the matching changes; True if files were registered."""
        placed = (_placed(position, matching, final, complete=complete) for position in self.positions.values())
        after = [self._without_empty_spool(position) for position in placed]
        updated = tuple(p for p in after if p != self.positions[p.file_id])
        new = self._new_files(matching.new)
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
            for position in self._ledger.positions(after_file_id=max(self.positions, default=0)):
                self.positions[position.file_id] = position
                self._events.info("file.new", **_described(position))
        return bool(new)

    def _without_empty_spool(self, position: Position) -> Position:
        """A daemon that ends removes its spool file if nobody posted: nothing is missing."""
        if position.state is FileState.MISSING and position.size_seen == 0 and self._is_spool(position.path):
            return replace(position, state=FileState.FINAL)
        return position

    def _new_files(self, seen: Sequence[SeenFile]) -> tuple[NewFile, ...]:
        """The generations to register; a file that cannot be opened is tried again at the next scan."""
        if not seen:
            return ()
        at_end = self._begins_at_ends()
        newest = {p.path: p for p in sorted(self.positions.values(), key=lambda p: p.file_id)}
        new: list[NewFile] = []
        # all at once where they begin at their ends: the next scan would find that the source has files
        for file in seen:
            if len(new) >= NEW_FILES_MAX and not at_end:
                break
            self._tick()
            try:
                skip = at_end and not self._is_spool(file.path)
                place = self._files.place_at(file, self._files.after_last_newline(file) if skip else 0)
                # the size belongs to the place: since the scan, the file may have been truncated
                now = replace(file, size=self._files.size(file))
            except OSError as error:
                self._unreadable.append(f"{file.path}: {error.strerror}")
                continue
            previous = newest.get(file.path)
            previous_id, generation = (None, 1) if previous is None else (previous.file_id, previous.generation + 1)
            new.append(NewFile(now, previous_id, generation, place))
        return tuple(new)

    def _begins_at_ends(self) -> bool:
        """Whether START_AT=end holds: as long as nothing is known of any log file."""
        return self._start_at_end and all(self._is_spool(position.path) for position in self.positions.values())

    def _report(self, scan: Scan, matching: Matching) -> None:
        blocked = [p for p in self.positions.values() if p.state is FileState.BLOCKED]
        unread = {file.path for file in matching.unread} - {p.path for p in blocked}
        self._health.say(
            "files",
            [
                *scan.problems,
                *scan.broken,
                *self._unreadable,
                *(f"{path}: cannot be read" for path in sorted(unread)),
                *(
                    f"{p.path}: blocked, {p.blocked_reason}, at byte {p.committed_offset}; decide it with "
                    f"{' or '.join(f'`{command}`' for command in deciding_commands(p))}"
                    for p in blocked
                ),
                *(
                    f"{file.path}: has more than the file it has replaced; read once that one is silent"
                    for file in matching.longer
                ),
                *(f"{path}: is followed, but no glob of AUDIT_GLOBS matches its name" for path in scan.strays),
                *(
                    f"{path}: looks like a rotated log, but no glob of AUDIT_GLOBS matches it"
                    for path in scan.lookalikes
                ),
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
        """Whether every byte of a file of this size is committed: of the newest generation at its path."""
        text = escape_path(path)
        newest = max((p for p in self.positions.values() if p.path == text), key=lambda p: p.file_id, default=None)
        return newest is not None and newest.committed_offset >= size

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

    def show(self, now: float, *, waiting: bool, standby: bool = False) -> None:
        """Refresh the gauges of files. now: seconds of the epoch. waiting: without a ledger, sizes come from a scan.
        standby: another tailer reads the files."""
        if waiting:
            self._see_without_ledger(hold=not standby)
        rows: dict[int, tuple[str, int, int]] = {}
        for file_id, file in self.followed.items():
            position = self.positions.get(file_id)
            offset = 0 if position is None else position.committed_offset
            size = max(file.size, offset if position is None else position.size_seen)
            unread = size > offset
            # of a log that never rests there is always something unread: what counts is how old that is
            if unread and self._unread.get(file_id, (0, now))[0] <= offset:
                self._unread[file_id] = (size, now)
            elif not unread:
                self._unread.pop(file_id, None)
            if unread or (file.listed and not file.compressed):
                rows[file_id] = (file.path, offset, size)
        self._unread = {key: seen for key, seen in self._unread.items() if key in rows}
        self._events.oldest_uncommitted(min((since for _, since in self._unread.values()), default=None))
        self._events.files(self.positions, rows)
        sizes = {file_id: size for file_id, (_, _, size) in rows.items()}
        ago = time.monotonic() - self._looked_at
        self._health.see(None if waiting else Sight(now - ago, sizes, self._saw_all))

    def _see_without_ledger(self, *, hold: bool) -> None:
        """Match by locator alone, for the gauges only: nothing is read or decided while Postgres is away. But files are
        opened (hold), so that one which comes and is deleted meanwhile can still be read."""
        scan = self._files.scan({position.locator for position in self.positions.values()})
        for file in scan.files if hold else ():
            self._files.hold(file)
        by_locator = {p.locator: p.file_id for p in sorted(self.positions.values(), key=lambda p: p.file_id)}
        self.followed = {by_locator.get(file.locator, -1 - number): file for number, file in enumerate(scan.files)}
        self._health.say("files", scan.problems)


def _placed(position: Position, matching: Matching, final: Collection[int], *, complete: bool) -> Position:
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
    moved = file.path != position.path or (complete and not file.listed)
    ended = file_id in final or file.compressed or position.state is FileState.FINAL
    if ended and file.size <= position.committed_offset:
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
