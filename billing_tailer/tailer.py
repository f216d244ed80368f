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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import datetime

from billing_tailer.errors import LedgerUnavailable, NotOwner, PositionMoved, RowRejected, TailerError
from billing_tailer.events import Events
from billing_tailer.files import LogFiles
from billing_tailer.follower import Follower
from billing_tailer.health import Health
from billing_tailer.ledger import Committed, Ledger, LedgerState, reason_of
from billing_tailer.model import Plan
from billing_tailer.plan import FileWork, build, refused, without_refused
from billing_tailer.reader import Batch, Reader
from billing_tailer.resets import OrderedReset
from billing_tailer.settler import Settler
from billing_tailer.wake import Wake

CHECK_SECONDS = 2.0
"""How often the loop asks Postgres what operators did, and at least shows that it is alive."""
FAILURE_WAIT_SECONDS_MAX = 1.0
SHOW_SECONDS = 1.0
WATCH_SECONDS = 1.0
"""How often directories that are new, or made anew, are given to inotify. Until then polls find what is in them."""
TIDY_SECONDS = 60.0


class Tailer:
    """Follows the files of one source until told to stop."""

    def __init__(
        self,
        *,
        files: LogFiles,
        ledger: Ledger,
        follower: Follower,
        reader: Reader,
        wake: Wake,
        events: Events,
        health: Health,
        stop: threading.Event,
        poll_interval_seconds: float,
        reset: OrderedReset,
        settler: Settler,
        tidy: Callable[[], None] = lambda: None,
    ) -> None:
        """tidy: called once a minute, by the owner, for what is not urgent."""
        self._files = files
        self._ledger = ledger
        self._follower = follower
        self._reader = reader
        self._wake = wake
        self._events = events
        self._health = health
        self._stop = stop
        self._poll_interval_seconds = poll_interval_seconds
        self._reset = reset
        self._settler = settler
        self._tidy = tidy
        self._next_tidy = 0.0
        self._read_ahead = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: Batch | None = None
        self._spent: Plan | None = None
        self._failures = 0
        self._next_show = 0.0
        self._next_watch = 0.0
        self._next_check = 0.0
        self._last_reset: tuple[int, datetime | None] = (0, None)
        self._waits_for: tuple[LedgerState, str] | None = None

    # --- the loop

    def run(self) -> None:
        """Until `stop` is set. Raises NotOwner, ConfigError and whatever else must end the process."""
        try:
            while not self._stop.is_set():
                self._health.tick()
                if not self._turn():
                    self._wake.wait(min(self._poll_interval_seconds, CHECK_SECONDS))
        finally:
            self._read_ahead.shutdown()

    def _turn(self) -> bool:
        """One turn of the loop, with what the world does to it; True if there may be more to do at once."""
        try:
            if self._ledger.state is not LedgerState.ACTIVE and not self._become_owner():
                return True
            try:
                more = self._round()
            except PositionMoved as error:
                self._adopt_reset_or_leave(error)
            else:
                self._failures = 0
                return more
        except LedgerUnavailable as error:
            self._events.commit_failed(reason_of(error), error.message)
            self._ledger.lost(error)
            self._ahead = self._spent = None
            # connecting may work where writing does not: a replica, a full disk
            self._stop.wait(min(FAILURE_WAIT_SECONDS_MAX, 0.05 * 2**self._failures))
            self._failures = min(self._failures + 1, 10)
        return True

    def _become_owner(self) -> bool:
        """Wait for Postgres and the lock; False if told to stop."""
        if not self._ledger.open(tick=self._tick_waiting, may_stand_by=self._follower.may_stand_by):
            return False
        self._load()
        self._reset.apply()
        self._load()
        if self._ledger.may_change_money():
            self._events.warning("receipts.not_append_only", message="our role may change receipts: see `check`")
        self._settler.begin()
        self._events.active(True)
        self._waits_for = None
        self._health.say("ledger", ())
        self._events.info("owner", source_id=self._ledger.source_id, files=len(self._follower.positions))
        return True

    def _tick_waiting(self) -> None:
        """While Postgres is away or another tailer is active: stay alive and keep showing the lag."""
        self._health.tick()
        self._health.say("ledger", [f"{self._ledger.state}: {self._ledger.trouble or 'first attempt'}"])
        self._events.active(False)
        self._log_waiting()
        if time.monotonic() >= self._next_show:
            self._next_show = time.monotonic() + SHOW_SECONDS
            self._follower.show(time.time(), waiting=True, standby=self._ledger.state is LedgerState.STANDBY)

    def _log_waiting(self) -> None:
        """Once for each reason: without it, the log of a daemon with a wrong password would be silent for ever."""
        if self._ledger.trouble is None or self._waits_for == (self._ledger.state, self._ledger.trouble):
            return
        self._waits_for = self._ledger.state, self._ledger.trouble
        say = self._events.info if self._ledger.state is LedgerState.STANDBY else self._events.warning
        say("ledger.waiting", state=str(self._ledger.state), message=self._ledger.trouble)

    def _load(self) -> None:
        self._last_reset = self._ledger.newest_reset()
        self._events.gaps_recorded(self._ledger.gap_counts())
        self._follower.load()
        self._reader.forget()
        self._ahead = None

    def _round(self) -> bool:
        """Look, read, commit; True if there may be more to do at once."""
        self._ledger.ping()
        if time.monotonic() >= self._next_check:
            try:
                self._look_what_operators_did()
            finally:  # however long it took, and even if it failed: the log comes first
                self._next_check = time.monotonic() + CHECK_SECONDS
        if time.monotonic() >= self._next_watch:
            self._next_watch = time.monotonic() + WATCH_SECONDS
            self._wake.watch(self._files.directories())
        self._follower.scan_if_due()
        # a file is first read in the round after the one that registered it: a reset comes before that
        if self._reset.due(self._follower.positions.values()):
            self._reset.apply()
            self._load()
            return True
        batch = self._next_batch()
        if batch.surprised or batch.unreadable:
            self._follower.scan_soon(at_leisure=not batch.surprised)
        self._follower.note_sizes(batch.sizes)
        self._health.say("reading", batch.unreadable)
        if batch.works:
            self._commit(batch)
        archiving = self._follower.read_archives()
        settling = self._settler.turn(busy=bool(batch.works))
        if time.monotonic() >= self._next_tidy:
            self._next_tidy = time.monotonic() + TIDY_SECONDS
            self._tidy()
        if batch.works or time.monotonic() >= self._next_show:
            self._next_show = time.monotonic() + SHOW_SECONDS
            self._follower.show(time.time(), waiting=False)
        return bool(batch.works) or batch.streaming or self._follower.registered or settling or archiving

    def _next_batch(self) -> Batch:
        """The batch that was read while the last one was committed, if the positions are still those it follows."""
        ahead, self._ahead = self._ahead, None
        positions, followed = self._follower.positions, self._follower.followed
        if ahead is not None and all(
            work.step.position.file_id in followed
            and replace(work.step.position, size_seen=0) == replace(positions[work.step.position.file_id], size_seen=0)
            for work in ahead.works
        ):
            return ahead
        return self._reader.gather(positions, followed, self._follower.finished)

    def _look_what_operators_did(self) -> None:
        self._events.dead_letters_open(self._ledger.open_dead_letters())
        self._events.gaps_recorded(self._ledger.gap_counts())
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

    # --- committing

    def _commit(self, batch: Batch) -> None:
        """Verify once more, commit, and only then adopt positions and hashes.

        With more to come, the next batch is read and parsed while Postgres works on this one.
        """
        sound = [work for work in batch.works if self._still_sound(work)]
        if len(sound) < len(batch.works):
            self._follower.scan_soon()
        if not sound:
            return
        plan = batch.plan() if len(sound) == len(batch.works) else build(sound)
        reading: list[Future[Batch]] = []
        if not batch.full:
            self._spent = None

        def meanwhile() -> None:
            if batch.full and not reading:
                reading.append(self._read_ahead.submit(self._gather_after, sound))

        try:
            written = self._write(plan, meanwhile, reading)
            if written is None:
                self._follower.scan_soon()
                return
            sifted, committed = written
            # beside the reading, where there is any; else after what is committed was told
            known = self._decidable(sifted) if reading else None
        finally:
            wait(reading)
        self._adopt(sifted, sound, committed)
        ahead = reading[0].result() if reading else None
        # where lines were replays or refused, the row that the next batch goes on from has other counts than it knew
        self._ahead = ahead if committed.steps == plan.steps else None
        self._spent = plan if self._ahead is not None and self._ahead.works else None
        if isinstance(known, LedgerUnavailable):
            raise known
        if committed.unlisted:
            self._settler.note_unlisted()
        self._settler.after_commit(self._settler.decidable(sifted) if known is None else known)

    def _write(
        self, plan: Plan, meanwhile: Callable[[], None], reading: list[Future[Batch]]
    ) -> tuple[Plan, Committed] | None:
        """Commit a plan, less what Postgres refuses of it; None where that cannot be told any more."""
        try:
            return plan, self._ledger.commit(plan, meanwhile)
        except RowRejected as error:
            wait(reading)  # the same files are read again
            sifted = self._without_refused(plan, error)
        return None if sifted is None else (sifted, self._ledger.commit(sifted))

    def _gather_after(self, works: list[FileWork]) -> Batch:
        """What follows work that is being committed."""
        # freeing it takes as long as a few statements: beside COPY it costs nothing
        self._spent = None
        follower = self._follower
        ahead = self._reader.gather(follower.positions, follower.followed, follower.finished, after=works)
        ahead.plan()
        return ahead

    def _decidable(self, plan: Plan) -> list[str] | LedgerUnavailable:
        """Which of the calls can be decided now. That question failing undoes no commit."""
        try:
            return self._settler.decidable(plan)
        except LedgerUnavailable as error:
            return error

    def _still_sound(self, work: FileWork) -> bool:
        position = work.step.position
        return self._files.still_agrees(position, self._follower.followed[position.file_id], work.step.after())

    def _without_refused(self, plan: Plan, error: RowRejected) -> Plan | None:
        """Postgres refused a row: find it, and let it cost one dead letter instead of the batch. None where its line is
        gone meanwhile: the file is to be looked at again."""
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
            try:
                line = self._files.read_at(file, fact.start_offset, fact.end_offset - fact.start_offset)
            except OSError:
                return None
            if line.find(b"\n") != fact.end_offset - fact.start_offset - 1:
                return None
            letters[index] = refused(fact, line, words)
        return without_refused(plan, letters)

    def _adopt(self, plan: Plan, works: list[FileWork], committed: Committed) -> None:
        self._follower.moved(committed.positions)
        counts: Counter[str] = Counter()
        for work, step in zip(works, committed.steps, strict=True):
            self._reader.adopt(work, step)
            if step.gap is not None:
                self._events.gap(step.gap, step.position.path)
            counts.update(step.counts)
        self._events.committed(plan, counts, committed.seconds, time.time())
