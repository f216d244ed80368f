"""Old logs read to their end, plain or compressed, with the outcomes that tailing would have given them.

Each file is a generation of the source `<SOURCE_ID>.backfill`, which has a lock and positions of its own, so that a
running daemon is never disputed its own; plans, facts and positions are committed by the same code. A call that is
known is `replayed`, a file that was read before is gone on with at its committed offset, and one that is finished
changes nothing (tests/test_backfill.py::test_killed_at_any_moment, ::test_twice_is_nothing).

Calls whose records are known are settled here, at once; the others by the daemon, which looks after this source too.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from billing_tailer.errors import ConfigError, LedgerUnavailable, NotOwner, RowRejected, TailerError
from billing_tailer.files import LogStream
from billing_tailer.ledger import Changes, Ledger, NewFile
from billing_tailer.model import FRONTIER_BYTES_MAX, FileState, Place, Position, SeenFile
from billing_tailer.plan import (
    FileWork,
    LongLine,
    OpenRow,
    Parse,
    build,
    refused,
    take_hole,
    take_lines,
    take_long_line,
    take_rest,
    without_refused,
)
from billing_tailer.reader import Limits
from billing_tailer.settler import Settler
from billing_tailer.survivors import GoOn, agrees, skip

CONNECT_SECONDS_MAX = 10.0
_NOTHING = hashlib.sha256(b"").digest()


def source_of(source_id: str) -> str:
    """The source under which old logs of a source are read."""
    return f"{source_id}.backfill"


@dataclass(slots=True)
class Filled:
    """What became of one file. from_offset: where this run went on."""

    path: str
    file_id: int
    from_offset: int
    to_offset: int
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Chunk:
    context: bytes
    data: bytes
    size: int


def open_ledger(ledger: Ledger) -> None:
    """Take the lock of the source. Raises NotOwner where another backfill holds it, LedgerUnavailable."""
    deadline = time.monotonic() + CONNECT_SECONDS_MAX

    def tick() -> None:
        if time.monotonic() > deadline:
            raise LedgerUnavailable(ledger.trouble or "no answer", "look at Postgres, then run the verb again")

    def another(_: object) -> bool:
        raise NotOwner(f"another backfill of source {ledger.source_id} is running", "wait for it to end")

    ledger.open(tick=tick, may_stand_by=another)


def refuse_followed(
    path: str, followed: Mapping[tuple[int, int], SeenFile], positions: list[Position], go_on: GoOn
) -> None:
    """Raise ConfigError where a daemon reads the file itself. followed: the files that the globs match; positions: of
    all daemons; go_on: called while the file is looked at."""
    with LogStream(path) as stream:
        if not stream.compressed and stream.file.locator in followed:
            raise ConfigError(f"{path} stands in AUDIT_GLOBS", "the daemon reads it itself; nothing is to be done")
    for position in positions:
        reads_it = position.state in (FileState.LIVE, FileState.ROTATED, FileState.BLOCKED)
        if reads_it and position.committed_offset and agrees(path, position, go_on):
            raise ConfigError(
                f"{path} has the content of {position.path} (file_id {position.file_id}), which a daemon reads itself",
                "see `billing-tailer files`; backfill is for logs that no daemon follows",
            )


def find(path: str, positions: list[Position], go_on: GoOn) -> Position | None:
    """The generation that the file was read as before: by its content, or by its place where nothing is committed.
    go_on: called while the file is looked at."""
    with LogStream(path) as stream:
        locator = stream.file.locator
    for position in sorted(positions, key=lambda one: -one.committed_offset):
        empty = not position.committed_offset and (position.locator, position.path) == (locator, path)
        if empty or (position.committed_offset and agrees(path, position, go_on)):
            return position
    return None


class Backfill:
    """Reads files one after the other into the source that its ledger owns."""

    def __init__(self, ledger: Ledger, settler: Settler, parse: Parse, limits: Limits) -> None:
        self._ledger = ledger
        self._settler = settler
        self._parse = parse
        self._limits = limits
        self._row: OpenRow | None = None

    def fill(self, path: str, *, reason: str, by: str, progress: Callable[[int], None] = lambda _: None) -> Filled:
        """Read one file (escaped path) to its end. progress: told the stored bytes that were read. Raises OSError and
        TailerError; what was committed by then stays, and the next run goes on from there."""
        started = time.monotonic()
        # the session that holds the lock must not fall silent while a large archive is read through
        position = find(path, self._ledger.positions(), self._ledger.ping) or self._register(path)
        filled = Filled(path, position.file_id, position.committed_offset, position.committed_offset)
        self._row = None
        with LogStream(path) as stream:
            skip(stream, position.committed_offset - FRONTIER_BYTES_MAX, self._ledger.ping)
            context = stream.read(position.committed_offset - stream.offset)
            buffer, told, data = b"", 0, b"-"
            while data:
                data = stream.read(self._limits.batch_bytes_max)
                progress(stream.stored_bytes_read - told)
                told = stream.stored_bytes_read
                if data and position.committed_offset == filled.from_offset and not buffer:
                    self._ledger.note_backfill(position, reason, by)
                buffer += data
                position, context, buffer = self._take(position, context, buffer, stream, filled)
            if buffer:
                position = self._commit(take_rest(position, context, buffer, self._parse), buffer, filled)
        filled.to_offset, filled.seconds = position.committed_offset, time.monotonic() - started
        if position.state is not FileState.FINAL:
            self._ledger.apply(Changes(updated=(replace(position, state=FileState.FINAL),)))
        return filled

    def _register(self, path: str) -> Position:
        with LogStream(path) as stream:
            seen = stream.file
        earlier = [one for one in self._ledger.positions() if one.path == path]
        previous = max(earlier, key=lambda one: one.file_id, default=None)
        generation = 1 if previous is None else previous.generation + 1
        # the size on disk says nothing about the log of a compressed file
        seen = replace(seen, size=0)
        new = NewFile(seen, None if previous is None else previous.file_id, generation, Place(0, b"", _NOTHING, 0))
        self._ledger.apply(Changes(new=(new,)))
        return self._ledger.positions()[-1]

    def _take(
        self, position: Position, context: bytes, buffer: bytes, stream: LogStream, filled: Filled
    ) -> tuple[Position, bytes, bytes]:
        """Commit the whole lines of the buffer; what is left of it begins at the new position."""
        limits = self._limits
        while True:
            chunk = _Chunk(context, buffer, position.committed_offset + len(buffer))
            work = take_lines(
                position,
                chunk,
                self._row,
                self._parse,
                lines_max=limits.batch_lines_max,
                line_bytes_max=limits.line_bytes_max,
                held_bytes_max=limits.batch_bytes_max,
            )
            if work is not None:
                taken = work.step.end_offset - position.committed_offset
                context, rest = (context + buffer[:taken])[-FRONTIER_BYTES_MAX:], buffer[taken:]
            elif buffer.startswith(b"\0"):
                # nobody writes to it any more: nothing to wait for
                rest = buffer.lstrip(b"\0")
                end = chunk.size - len(rest)
                work = take_hole(position, context, end, end)
                context = (context + buffer[: len(buffer) - len(rest)])[-FRONTIER_BYTES_MAX:]
            elif len(buffer) > limits.line_bytes_max:
                work, context, rest = self._long_line(position, context, buffer, stream)
            else:
                return position, context, buffer
            position, buffer = self._commit(work, buffer, filled), rest

    def _long_line(
        self, position: Position, context: bytes, data: bytes, stream: LogStream
    ) -> tuple[FileWork, bytes, bytes]:
        """A line beyond the limit, hashed as it streams by, also one that the file ends in; its last bytes, and what
        was read behind it."""
        line = LongLine(position.committed_offset, tail=context)
        rest = b""
        while data:
            before = line.scanned
            if line.feed(data):
                rest = data[line.scanned - before :]
                break
            self._ledger.ping()
            data = stream.read(self._limits.batch_bytes_max)
        return take_long_line(position, line, position.committed_offset + line.scanned), line.tail, rest

    def _commit(self, work: FileWork, buffer: bytes, filled: Filled) -> Position:
        plan = build([work])
        try:
            committed = self._ledger.commit(plan)
        except RowRejected as error:
            start = work.step.position.committed_offset
            found = self._ledger.find_refused(plan)
            if not found:
                raise TailerError(f"Postgres refuses a batch, but none of its rows: {error.message}") from error
            facts = [(index, plan.facts[index], words) for index, words in found.items()]
            letters = {
                index: refused(fact, buffer[fact.start_offset - start : fact.end_offset - start], words)
                for index, fact, words in facts
            }
            plan = without_refused(plan, letters)
            committed = self._ledger.commit(plan)
        ((step,), (position,)) = committed.steps, committed.positions
        self._row = None if work.row is None or step.batch is None else replace(work.row, counts=step.batch.counts)
        filled.counts.update(step.counts)
        self._settler.after_commit(self._settler.decidable(plan))
        return position
