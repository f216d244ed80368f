"""The loop: look at the directories, read what is new, commit it, sleep until something happens.

One loop, one writer. While Postgres is away it does not read: the log is the buffer. After any database error the
positions are forgotten and read again from Postgres, which owns them.

Holds EVERY_BYTE_HAS_AN_OUTCOME and POSITION_AND_ROWS_COMMIT_TOGETHER with `plan` and `ledger`, CANNOT_SEE_IS_NOT_GONE
and FAIL_CLOSED with `follower`, `identity` and `files` (tests/test_tailer.py, tests/test_crash.py).
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from billing_tailer.errors import LedgerUnavailable, NotOwner, PositionMoved, RowRejected, TailerError
from billing_tailer.events import Events
from billing_tailer.files import LogFiles
from billing_tailer.follower import Follower
from billing_tailer.health import Health
from billing_tailer.ledger import Committed, Ledger, LedgerState, reason_of
from billing_tailer.model import Plan, Position, SeenFile, Verdict
from billing_tailer.plan import (
    FileWork,
    LongLine,
    OpenRow,
    Parse,
    build,
    refused,
    take_lines,
    take_long_line,
    without_refused,
)
from billing_tailer.wake import Wake

FILE_SHARE_BYTES_MIN = 64 << 10
"""What each of many busy files is read in one round, so that none starves."""
LONG_LINE_CHUNK_BYTES = 1 << 20
CHECK_SECONDS = 2.0
"""How often the loop asks Postgres what operators did."""
SHOW_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one round, in seconds, lines and bytes."""

    poll_interval_seconds: float
    batch_lines_max: int
    batch_bytes_max: int
    line_bytes_max: int


class Tailer:
    """Follows the files of one source until told to stop."""

    def __init__(
        self,
        *,
        files: LogFiles,
        ledger: Ledger,
        follower: Follower,
        parse: Parse,
        wake: Wake,
        events: Events,
        health: Health,
        stop: threading.Event,
        limits: Limits,
        apply_reset: Callable[[], None],
    ) -> None:
        """apply_reset: called each time this process has become the owner, before anything is read."""
        self._files = files
        self._ledger = ledger
        self._follower = follower
        self._parse = parse
        self._wake = wake
        self._events = events
        self._health = health
        self._stop = stop
        self._limits = limits
        self._apply_reset = apply_reset
        self._rows: dict[int, OpenRow] = {}
        self._long_lines: dict[int, LongLine] = {}
        self._next_show = 0.0
        self._next_check = 0.0
        self._last_reset: datetime | None = None
        self._turn = 0
        self._unreadable: list[str] = []

    # --- the loop

    def run(self) -> None:
        """Until `stop` is set. Raises NotOwner, ConfigError and whatever else must end the process."""
        while not self._stop.is_set():
            self._health.tick()
            try:
                if self._ledger.state is not LedgerState.ACTIVE and not self._become_owner():
                    break
                busy = self._round()
            except LedgerUnavailable as error:
                self._events.commit_failed(reason_of(error), error.message)
                self._ledger.lost(error)
                busy = True
            except PositionMoved as error:
                self._adopt_reset_or_leave(error)
                busy = True
            if not busy:
                self._wake.wait(self._limits.poll_interval_seconds)

    def _become_owner(self) -> bool:
        """Wait for Postgres and the lock; False if told to stop."""
        if not self._ledger.open(tick=self._tick_waiting, may_stand_by=self._follower.may_stand_by):
            return False
        self._load()
        self._apply_reset()
        self._load()
        self._events.active(True)
        self._health.say("ledger", ())
        self._events.info("owner", source_id=self._ledger.source_id, files=len(self._follower.positions))
        return True

    def _tick_waiting(self) -> None:
        """While Postgres is away or another tailer is active: stay alive and keep showing the lag."""
        self._health.tick()
        self._health.say("ledger", [f"{self._ledger.state}: {self._ledger.trouble or 'first attempt'}"])
        self._events.active(False)
        if time.monotonic() >= self._next_show:
            self._next_show = time.monotonic() + SHOW_SECONDS
            self._follower.show(time.time(), waiting=True)

    def _load(self) -> None:
        self._last_reset = self._ledger.newest_reset()
        self._follower.load()
        self._rows.clear()
        self._long_lines.clear()

    def _round(self) -> bool:
        """One turn; True if there may be more to do at once."""
        self._ledger.ping()
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + CHECK_SECONDS
            self._look_what_operators_did()
        self._wake.watch(self._files.directories())
        self._follower.scan_if_due()
        works, streaming = self._gather()
        if works:
            self._commit(works)
        if works or time.monotonic() >= self._next_show:
            self._next_show = time.monotonic() + SHOW_SECONDS
            self._follower.show(time.time(), waiting=False)
        return bool(works) or streaming or self._follower.registered

    def _look_what_operators_did(self) -> None:
        self._events.dead_letters_open(self._ledger.open_dead_letters())
        if self._ledger.newest_reset() != self._last_reset:
            self._events.reset("cli", message="an operator moved an offset; the positions are read again")
            self._load()

    def _adopt_reset_or_leave(self, error: PositionMoved) -> None:
        """A failed compare-and-set: an operator's reset explains it, nothing else does."""
        if self._ledger.newest_reset() == self._last_reset:
            raise NotOwner(
                f"another process moved a position of source {self._ledger.source_id}: {error.message}",
                "find the second tailer on this database: only one at a time may commit for a SOURCE_ID",
            ) from error
        self._look_what_operators_did()

    # --- reading

    def _gather(self) -> tuple[list[FileWork], bool]:
        """Whole lines of all files that have some, within the bounds of one batch; and whether a long line streams.

        Each file gets a share of the bytes, and the turn goes round, so that a busy file does not starve the others.
        """
        waiting = [(p, f) for p, f in self._in_turn() if f.size > self._scanned(p)]
        bytes_left, lines_left = self._limits.batch_bytes_max, self._limits.batch_lines_max
        works: list[FileWork] = []
        streaming = False
        self._unreadable = []
        for position, file in waiting:
            if bytes_left <= 0 or lines_left <= 0:
                break
            self._turn = position.file_id
            share = min(bytes_left, max(FILE_SHARE_BYTES_MIN, self._limits.batch_bytes_max // len(waiting)))
            work, progressed = self._work_on(position, file, share, lines_left)
            streaming = streaming or progressed
            if work is not None:
                works.append(work)
                bytes_left -= work.step.end_offset - position.committed_offset
                lines_left -= sum(work.step.counts.values())
        self._health.say("reading", self._unreadable)
        return works, streaming

    def _in_turn(self) -> list[tuple[Position, SeenFile]]:
        ids = sorted(self._follower.followed, key=lambda file_id: (file_id <= self._turn, file_id))
        return [(self._follower.positions[file_id], self._fresh(self._follower.followed[file_id])) for file_id in ids]

    def _fresh(self, file: SeenFile) -> SeenFile:
        """The file with its size at this moment, where it is held open: scans of many files may be seconds apart."""
        size = self._files.held_size(file.locator)
        return file if size is None else replace(file, size=size)

    def _scanned(self, position: Position) -> int:
        line = self._long_lines.get(position.file_id)
        return position.committed_offset if line is None else line.start_offset + line.scanned

    def _work_on(self, position: Position, file: SeenFile, share: int, lines_max: int) -> tuple[FileWork | None, bool]:
        """The work of one file, and whether a long line of it streamed on."""
        if position.file_id in self._long_lines:
            return self._stream(position, file)
        chunk = self._files.read(position, file, share)
        if isinstance(chunk, Verdict):
            return self._not_as_expected(file, chunk)
        line_max = self._limits.line_bytes_max
        if len(chunk.data) == share <= line_max and b"\n" not in chunk.data:
            chunk = self._files.read(position, file, line_max + 1)  # the share is smaller than one line
            if isinstance(chunk, Verdict):
                return self._not_as_expected(file, chunk)
        row = self._rows.get(position.file_id)
        work = take_lines(position, chunk, row, self._parse, lines_max=lines_max, line_bytes_max=line_max)
        if work is None and len(chunk.data) > line_max:
            self._long_lines[position.file_id] = LongLine(position.committed_offset)
            return None, True
        return work, False

    def _not_as_expected(self, file: SeenFile, verdict: Verdict) -> tuple[None, bool]:
        """The next scan finds out what became of the file; what cannot be read stays in sight of /readyz."""
        if verdict is Verdict.UNREADABLE:
            self._unreadable.append(f"{file.path}: cannot be read")
        self._follower.scan_soon()
        return None, False

    def _stream(self, position: Position, file: SeenFile) -> tuple[FileWork | None, bool]:
        """Read on in a line beyond the limit; it becomes work when its newline comes."""
        line = self._long_lines[position.file_id]
        at = line.start_offset + line.scanned
        try:
            data = self._files.read_at(file, at, LONG_LINE_CHUNK_BYTES)
        except OSError:
            data = b""
        if not data or not self._files.still_agrees(position, file, at + len(data)):
            del self._long_lines[position.file_id]
            self._follower.scan_soon()
            return None, False
        ended = line.feed(data)
        return (take_long_line(position, line, max(file.size, at + len(data))) if ended else None), True

    # --- committing

    def _commit(self, works: list[FileWork]) -> None:
        """Verify once more, commit, and only then adopt positions and hashes."""
        sound = [work for work in works if self._still_sound(work)]
        if len(sound) < len(works):
            self._follower.scan_soon()
        if not sound:
            return
        plan = build(sound)
        try:
            committed = self._ledger.commit(plan)
        except RowRejected as error:
            plan = self._without_refused(plan, error)
            committed = self._ledger.commit(plan)
        self._adopt(plan, sound, committed)

    def _still_sound(self, work: FileWork) -> bool:
        position = work.step.position
        return self._files.still_agrees(position, self._follower.followed[position.file_id], work.step.end_offset)

    def _without_refused(self, plan: Plan, error: RowRejected) -> Plan:
        """Postgres refused a row: find it, and let it cost one dead letter instead of the batch."""
        found = self._ledger.find_refused(plan)
        if not found:
            raise TailerError(
                f"Postgres refuses a batch, but none of its rows: {error.message}",
                "this is a fault of billing_tailer: report it with this message",
            ) from error
        letters = {}
        for index, words in found.items():
            fact = plan.facts[index]
            file = self._follower.followed[fact.file_id]
            line = self._files.read_at(file, fact.start_offset, fact.end_offset - fact.start_offset)
            letters[index] = refused(fact, line, words)
        return without_refused(plan, letters)

    def _adopt(self, plan: Plan, works: list[FileWork], committed: Committed) -> None:
        self._follower.moved(committed.positions)
        counts: Counter[str] = Counter()
        for work, step in zip(works, committed.steps, strict=True):
            file_id = step.position.file_id
            self._rows[file_id] = replace(work.row, counts=step.batch.counts)
            self._long_lines.pop(file_id, None)
            counts.update(step.counts)
        self._events.committed(plan, counts, committed.seconds, time.time())
