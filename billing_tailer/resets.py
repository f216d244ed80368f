"""An operator's reset of an offset: from `PATH=beginning|end|BYTE` to a place in the file.

Used by the daemon (OFFSET_RESET) and by the verb `offsets reset`.
"""

import os
import time
from collections.abc import Callable, Iterable

from billing_tailer.errors import ConfigError, PositionMoved
from billing_tailer.events import Events
from billing_tailer.files import LogFiles, escape_path
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger, Reset
from billing_tailer.model import Position, SeenFile, Verdict
from billing_tailer.settings import OffsetReset

RangeStart = Callable[[Position, int], int]
"""Where the committed range begins that contains an offset of a position."""


RETRY_SECONDS = 1.0
"""How often a reset is tried again whose file is not in sight, or not yet known as it is now."""
ATTEMPTS_MAX = 5


class NotInSight(ConfigError):
    """The file of a position is not there, or is not what was followed under that name."""


def newest_at(positions: Iterable[Position], path: str) -> Position | None:
    """The newest generation at a path."""
    return max((p for p in positions if p.path == path), key=lambda p: p.file_id, default=None)


def plan_reset(
    request: OffsetReset,
    position: Position,
    files: LogFiles,
    range_start: RangeStart,
    *,
    reset_id: str,
    source: str,
    reason: str,
    by: str | None = None,
) -> Reset:
    """Think a reset through, with the file open. Raises ConfigError where it cannot be done, naming the next step.

    NotInSight: the position must not be moved by what another file contains.
    """
    file = _file_of(position, files)
    if files.judge(position, file) in (Verdict.CUT, Verdict.SHRUNK, Verdict.DIFFERS):
        raise NotInSight(
            f"offset reset of {position.path}: the file is another one than was followed (truncated or replaced)",
            "let the daemon look at it, which will follow it as a new file, then reset that one",
        )
    try:
        offset = _wanted_offset(request, file, files)
        place = files.place_at(file, range_start(position, offset))
    except OSError as error:
        raise ConfigError(
            f"offset reset {request}: cannot read {file.path}: {error.strerror}",
            "make the file readable, then try again",
        ) from None
    return Reset(reset_id, position, str(request), place, source, reason, by)


def _file_of(position: Position, files: LogFiles) -> SeenFile:
    while True:
        scan = files.scan({position.locator})
        for file in scan.files:
            if file.locator == position.locator:
                return file
        if not files.read_archives(lambda _: (position.committed_offset,)):
            break
    raise NotInSight(
        f"offset reset of {position.path}: the file (device {position.device}, inode {position.inode}) is not there",
        "mount the log volume; see `billing-tailer files`",
    )


def _wanted_offset(request: OffsetReset, file: SeenFile, files: LogFiles) -> int:
    """The byte asked for: 0, or just behind a newline."""
    if request.target == "beginning":
        return 0
    if request.target == "end":
        return files.after_last_newline(file)
    offset = request.target
    size = files.size(file)
    if offset > size:
        raise ConfigError(
            f"offset reset {request}: the file has {size} bytes", f"give a byte from 0 to {size}, or `end`"
        )
    if offset and files.read_at(file, offset - 1, 1) != b"\n":
        raise ConfigError(
            f"offset reset {request}: byte {offset} is in the middle of a line",
            "give 0, or the byte just behind a newline",
        )
    return offset


def parse_request(text: str) -> OffsetReset:
    """`PATH=beginning|end|BYTE` as typed by an operator; the path becomes what positions are stored under."""
    try:
        request = OffsetReset.parse(text)
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}", "write PATH=beginning, PATH=end or PATH=BYTE") from None
    return stored(request)


def stored(request: OffsetReset) -> OffsetReset:
    """The request with its path in the form that positions are stored under."""
    return OffsetReset(escape_path(os.fsencode(request.path)), request.target)


class OrderedReset:
    """OFFSET_RESET: applied once per OFFSET_RESET_ID, and only when its path is known and its file is in sight.

    Until then the id is not used up, and /readyz says so.
    """

    def __init__(
        self,
        request: OffsetReset | None,
        reset_id: str | None,
        ledger: Ledger,
        files: LogFiles,
        events: Events,
        health: Health,
    ) -> None:
        self._request = None if request is None else stored(request)
        self._reset_id = reset_id
        self._ledger = ledger
        self._files = files
        self._events = events
        self._health = health
        self._tried: Position | None = None
        self._next_try = 0.0
        self.pending = False
        """Something remains to be applied. Known after the first `apply`."""

    def due(self, positions: Iterable[Position]) -> bool:
        """Whether it is time to try again: at once if another file has taken the path, else after a while."""
        if not self.pending or self._request is None:
            return False
        newest = newest_at(positions, self._request.path)
        if newest is None:
            return False
        return self._tried is None or newest.file_id != self._tried.file_id or time.monotonic() >= self._next_try

    def apply(self) -> None:
        """Apply it if it is wanted, new and possible. Only for the process that holds the source's lock.

        Raises ConfigError where it never will be possible, or where its id was used for another reset.
        """
        if self._request is None or self._reset_id is None:
            return
        if self._ledger.reset_applied(self._reset_id, str(self._request)):
            self._events.info(
                "offset.reset_known", reset_id=self._reset_id, requested=str(self._request), message="applied before"
            )
            self._is_pending("")
            return
        for _ in range(ATTEMPTS_MAX):
            try:
                self._is_pending(self._try(self._request, self._reset_id))
            except PositionMoved as error:  # by an operator's verb at the same moment
                self._is_pending(error.message)
            else:
                return

    def _try(self, request: OffsetReset, reset_id: str) -> str:
        """Apply it; returns why it must wait, or ""."""
        self._tried = position = newest_at(self._ledger.positions(), request.path)
        self._next_try = time.monotonic() + RETRY_SECONDS
        if position is None:
            return f"nothing is known of {request.path} yet"
        words = {"reset_id": reset_id, "source": "env", "reason": "BILLING_TAILER_OFFSET_RESET"}
        try:
            reset = plan_reset(request, position, self._files, self._ledger.range_start, **words)
        except NotInSight as error:
            return error.message
        self._ledger.reset(reset)
        self._events.reset(
            "env",
            reset_id=reset_id,
            path=position.path,
            file_id=position.file_id,
            old_offset=position.committed_offset,
            new_offset=reset.place.offset,
        )
        return ""

    def _is_pending(self, why: str) -> None:
        if why and not self.pending:
            self._events.warning("offset.reset_pending", reset_id=self._reset_id, requested=str(self._request), why=why)
        self.pending = bool(why)
        self._health.say("reset", [f"OFFSET_RESET {self._request}: {why}; the id is not used up"] if why else [])
