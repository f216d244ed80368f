"""Verified bytes -> the work of one batch: whole lines of every file that has some, fairly and within bounds.

Keeps what only this process knows of a file between two batches: the open row of `tail_batches` with its running hash,
and how far an over-long line has been scanned. Both can be forgotten at any time; nothing is lost but a little work.
"""

from collections import ChainMap
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from billing_tailer.files import Chunk, LogFiles
from billing_tailer.holes import Holes
from billing_tailer.model import FileStep, Plan, Position, SeenFile, Verdict
from billing_tailer.plan import (
    FileWork,
    LongLine,
    OpenRow,
    Parse,
    build,
    take_hole,
    take_lines,
    take_long_line,
    take_rest,
)

FILE_SHARE_BYTES_MIN = 64 << 10
"""What each of many busy files is read in one round, so that none starves."""
LONG_LINE_CHUNK_BYTES = 1 << 20
ARCHIVES_MAX = 2
"""Compressed files that are read at a time: each needs memory to stand in its middle."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one batch, in lines and bytes."""

    batch_lines_max: int
    batch_bytes_max: int
    line_bytes_max: int


@dataclass(slots=True)
class Batch:
    """What one round read. full: a bound was reached, so that there is probably more. streaming: an over-long line was
    read on. surprised: a file was not what its position says; look again. unreadable: what could not be read, in words.
    sizes: by `file_id`, how far half a line was seen that is not part of the work.
    """

    works: list[FileWork]
    full: bool = False
    streaming: bool = False
    surprised: bool = False
    unreadable: tuple[str, ...] = ()
    sizes: dict[int, int] = field(default_factory=dict)
    _plan: Plan | None = None

    def plan(self) -> Plan:
        """All of the work as one plan, made once."""
        if self._plan is None:
            self._plan = build(self.works)
        return self._plan


class Reader:
    """Reads what follows the positions."""

    def __init__(self, files: LogFiles, parser_of: Callable[[str], Parse], limits: Limits) -> None:
        """parser_of: a file's path -> what its lines are."""
        self._files = files
        self._parser_of = parser_of
        self._limits = limits
        self._rows: dict[int, OpenRow] = {}
        self._long_lines: dict[int, LongLine] = {}
        self._half_lines: dict[int, tuple[int, int, int]] = {}
        self._holes = Holes(files)
        self._turn = 0
        self._finished: Container[int] = ()

    def forget(self) -> None:
        """After any doubt about what is committed: begin new rows, scan over-long lines from their start."""
        self._rows.clear()
        self._long_lines.clear()
        self._half_lines.clear()
        self._holes.forget()

    def adopt(self, work: FileWork, step: FileStep) -> None:
        """The work is committed, with the counts of this step in its row: the row may grow from here."""
        if work.row is not None and step.batch is not None:
            self._rows[work.step.position.file_id] = replace(work.row, counts=step.batch.counts)

    def gather(
        self,
        positions: Mapping[int, Position],
        followed: Mapping[int, SeenFile],
        finished: Container[int] = (),
        after: Sequence[FileWork] = (),
    ) -> Batch:
        """Whole lines of all files that have some. finished: files that will not grow any more. after: work that is
        being committed, to be gone on from.

        Each file gets a share of the bytes, and the turn goes round, so that a busy file does not starve the others.
        """
        self._finished = finished
        places = ChainMap({work.step.position.file_id: work.step.after() for work in after}, dict(positions))
        open_rows: dict[int, OpenRow | None] = {work.step.position.file_id: work.row for work in after}
        rows = {**self._rows, **open_rows}
        waiting = self._waiting(places, followed)
        budget = self._limits.batch_bytes_max
        # half of it for what comes of the lines: that of the next batch is made while this one is being committed
        bytes_left, lines_left, held_left = budget, self._limits.batch_lines_max, budget // 2
        batch = Batch([])
        for position, file in waiting:
            if bytes_left <= 0 or lines_left <= 0 or held_left <= 0:
                batch.full = True
                break
            self._turn = position.file_id
            share = min(bytes_left, max(FILE_SHARE_BYTES_MIN, budget // len(waiting)))
            work = self._work_on(position, file, rows.get(position.file_id), share, lines_left, held_left, batch)
            if work is not None:
                batch.works.append(work)
                batch.full = batch.full or work.step.end_offset < file.size
                bytes_left -= work.step.end_offset - position.committed_offset
                lines_left -= sum(work.step.counts.values())
                held_left -= work.held_bytes
        return batch

    def _waiting(
        self, places: Mapping[int, Position], followed: Mapping[int, SeenFile]
    ) -> list[tuple[Position, SeenFile]]:
        """Files with bytes that were not looked at, beginning after the one that had the last turn."""
        ids = sorted(followed, key=lambda file_id: (file_id <= self._turn, file_id))
        pairs = ((places[file_id], self._fresh(followed[file_id])) for file_id in ids)
        waiting = [
            (position, file)
            for position, file in pairs
            # shorter than what was looked at: to be seen, too
            if file.size > position.committed_offset
            and (file.size != self._looked_at(position, file) or position.file_id in self._finished)
        ]
        archives = sorted(position.file_id for position, file in waiting if file.compressed)[ARCHIVES_MAX:]
        return [pair for pair in waiting if pair[0].file_id not in archives]

    def _fresh(self, file: SeenFile) -> SeenFile:
        """The file with its size at this moment, where it is held open: scans of many files may be seconds apart."""
        size = self._files.held_size(file.locator)
        return file if size is None else replace(file, size=size)

    def _looked_at(self, position: Position, file: SeenFile) -> int:
        line = self._long_lines.get(position.file_id)
        if line is not None:
            return line.start_offset + line.scanned
        offset, size, mtime_ns = self._half_lines.get(position.file_id, (-1, 0, 0))
        unchanged = (offset, mtime_ns) == (position.committed_offset, file.mtime_ns)
        return size if unchanged else position.committed_offset

    def _work_on(
        self,
        position: Position,
        file: SeenFile,
        row: OpenRow | None,
        share: int,
        lines_max: int,
        held_max: int,
        batch: Batch,
    ) -> FileWork | None:
        if position.file_id in self._long_lines:
            return self._stream(position, file, batch)
        line_max = self._limits.line_bytes_max
        chunk = self._files.read(position, file, share)
        if not isinstance(chunk, Verdict) and chunk.data.startswith(b"\0"):
            return self._hole(position, file, chunk, batch)
        if not isinstance(chunk, Verdict) and len(chunk.data) == share <= line_max and b"\n" not in chunk.data:
            chunk = self._files.read(position, file, line_max + 1)  # the share is smaller than one line
        if isinstance(chunk, Verdict):
            if chunk is Verdict.BEHIND:
                batch.streaming = True
            elif chunk is Verdict.UNREADABLE:
                batch.unreadable += (f"{file.path}: cannot be read: {self._files.trouble}",)
            else:
                batch.surprised = True
            return None
        parse = self._parser_of(position.path)
        work = take_lines(
            position, chunk, row, parse, lines_max=lines_max, line_bytes_max=line_max, held_bytes_max=held_max
        )
        if work is None and len(chunk.data) > line_max:
            self._long_lines[position.file_id] = LongLine(position.committed_offset, tail=chunk.context)
            batch.streaming = True
        elif (
            work is None
            and position.file_id in self._finished
            and position.committed_offset + len(chunk.data) == chunk.size
        ):
            return take_rest(position, chunk.context, bytes(chunk.data), parse)
        elif work is None:
            end = position.committed_offset + len(chunk.data)
            self._half_lines[position.file_id] = (position.committed_offset, end, file.mtime_ns)
            batch.sizes[position.file_id] = end
        return work

    def _hole(self, position: Position, file: SeenFile, chunk: Chunk, batch: Batch) -> FileWork | None:
        """NUL bytes where a line should begin."""
        try:
            end = self._holes.end_of(position, file, finished=position.file_id in self._finished)
        except OSError as error:
            batch.unreadable += (
                f"{file.path}: cannot be read behind byte {position.committed_offset}: {error.strerror}",
            )
            return None
        if end is not None:
            return take_hole(position, chunk.context, end, max(chunk.size, end))
        batch.streaming = batch.streaming or self._holes.unfinished
        batch.sizes[position.file_id] = chunk.size
        if self._holes.waits_for_data(position.file_id):
            self._half_lines[position.file_id] = (position.committed_offset, file.size, file.mtime_ns)
        return None

    def _stream(self, position: Position, file: SeenFile, batch: Batch) -> FileWork | None:
        """Read on in a line beyond the limit; it becomes work when its newline comes."""
        line = self._long_lines[position.file_id]
        at = line.start_offset + line.scanned
        try:
            data = self._files.read_at(file, at - len(line.tail), len(line.tail) + LONG_LINE_CHUNK_BYTES)
        except OSError as error:
            batch.unreadable += (f"{file.path}: cannot be read at byte {at}: {error.strerror}",)
            return None
        known, data = data[: len(line.tail)], data[len(line.tail) :]
        changed = known != line.tail or line.start_offset != position.committed_offset
        at_its_end = not data and position.file_id in self._finished and at == file.size
        if changed or not (data or at_its_end) or not self._files.still_agrees(position, file):
            del self._long_lines[position.file_id]
            batch.surprised = True
            return None
        batch.streaming = True
        if not at_its_end and not line.feed(data):
            return None
        del self._long_lines[position.file_id]
        return take_long_line(position, line, max(file.size, at + len(data)), ended=not at_its_end)
