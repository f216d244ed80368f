"""Dead letters looked at again: their bytes, as they were kept or from the file, read with the program of today."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from billing_tailer.files import LogStream
from billing_tailer.model import FactRow, PlacedFact, PlacedRecord, Rejected, SeenFile, Skip
from billing_tailer.plan import Parse
from billing_tailer.rows import placed


@dataclass(frozen=True, slots=True)
class Unread:
    """Why a dead letter stays one, in words."""

    why: str


def read_again(
    letter: Mapping[str, Any], find: Callable[[int], SeenFile | None], parse: Parse, line_bytes_max: int
) -> PlacedFact | PlacedRecord | Skip | Unread:
    """What the line of a dead letter (a row with its bytes) is today. find: the file of a generation, asked only where
    not all of the bytes were kept. line_bytes_max: longest line, in bytes without its newline."""
    length = letter["end_offset"] - letter["start_offset"]
    if length > line_bytes_max + 1:
        return Unread(f"{length} bytes, and LINE_BYTES_MAX is {line_bytes_max}")
    raw: bytes | None = bytes(letter["raw"])
    if not _is_it(raw, letter):
        file = find(letter["file_id"])
        raw = None if file is None else _from_file(file, letter)
        if not _is_it(raw, letter):
            return Unread("not all of its bytes were kept, and no file in sight has them")
    assert raw is not None
    outcome = parse(raw.removesuffix(b"\n"))
    place = letter["file_id"], letter["start_offset"]
    if isinstance(outcome, Rejected):
        return Unread(f"still {outcome.reason}: {outcome.detail}")
    if isinstance(outcome, Skip):
        return outcome
    if isinstance(outcome, FactRow):
        return placed(outcome, *place, letter["end_offset"])
    return PlacedRecord(outcome, *place)


def _is_it(raw: bytes | None, letter: Mapping[str, Any]) -> bool:
    return raw is not None and hashlib.sha256(raw).digest() == bytes(letter["sha256"])


def _from_file(file: SeenFile, letter: Mapping[str, Any]) -> bytes | None:
    try:
        with LogStream(file.path) as stream:
            stream.skip_to(letter["start_offset"])
            return stream.read(letter["end_offset"] - letter["start_offset"])
    except OSError:
        return None
