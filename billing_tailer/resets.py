"""An operator's reset of an offset: from `PATH=beginning|end|BYTE` to a place in the file.

Used by the daemon (OFFSET_RESET) and by the verb `offsets reset`.
"""

from collections.abc import Callable, Sequence

from billing_tailer.errors import ConfigError
from billing_tailer.files import LogFiles, escape_path
from billing_tailer.ledger import Reset
from billing_tailer.model import Position, SeenFile
from billing_tailer.settings import OffsetReset

RangeStart = Callable[[Position, int], int]
"""Where the committed range begins that contains an offset of a position."""


def newest_at(positions: Sequence[Position], path: str) -> Position | None:
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
) -> Reset:
    """Think a reset through, with the file open. Raises ConfigError where it cannot be done, naming the next step."""
    file = _file_of(position, files)
    try:
        offset = _wanted_offset(request, file, files)
        place = files.place_at(file, range_start(position, offset))
    except OSError as error:
        raise ConfigError(
            f"offset reset {request}: cannot read {file.path}: {error.strerror}",
            "make the file readable, then try again",
        ) from None
    return Reset(reset_id, position, str(request), place, source, reason)


def _file_of(position: Position, files: LogFiles) -> SeenFile:
    for file in files.scan({position.locator}).files:
        if file.locator == position.locator:
            return file
    raise ConfigError(
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
    return OffsetReset(escape_path(request.path.encode("utf-8", "surrogateescape")), request.target)
