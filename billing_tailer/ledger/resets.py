"""Moving an offset by an operator's will: one transaction that leaves a row."""

from dataclasses import dataclass
from typing import Any

from billing_tailer.errors import ConfigError, PositionMoved
from billing_tailer.ledger.connection import Connection, query, wrapped
from billing_tailer.model import GapReason, Place, Position


@dataclass(frozen=True, slots=True)
class Reset:
    """A reset that has been thought through: `place` was read from the file.

    requested: the operator's own words, `PATH=beginning|end|BYTE`; source: `env` or `cli`.
    """

    reset_id: str
    position: Position
    requested: str
    place: Place
    source: str
    reason: str


def already_applied(connection: Connection, source_id: str, reset_id: str, requested: str) -> bool:
    """True if this id was applied with this very request. Raises ConfigError if it was applied with another one, or
    for another source."""
    with wrapped():
        row = connection.execute(query("reset_by_id"), {"reset_id": reset_id}).fetchone()
    if row is None:
        return False
    if (row[0], row[2]) != (source_id, requested):
        raise ConfigError(
            f"BILLING_TAILER_OFFSET_RESET_ID={reset_id} was used for {row[2]!r} of source {row[0]}, "
            f"not for {requested!r} of source {source_id}",
            "give the new reset a new id, or remove BILLING_TAILER_OFFSET_RESET",
        )
    return True


def range_start(connection: Connection, position: Position, offset: int) -> int:
    """Where the committed range that contains `offset` begins: a rewind lands there, so that ranges stay whole."""
    if offset >= position.committed_offset:
        return offset
    with wrapped():
        row = connection.execute(query("range_start"), {"file_id": position.file_id, "offset": offset}).fetchone()
    return 0 if row is None or row[0] is None else int(row[0])


def apply_reset(connection: Connection, source_id: str, reset: Reset) -> None:
    """Move the offset, forget what lies behind it (rewind) or declare what is left out (skip), and leave a row.

    Re-reading is safe because facts are unique. Raises PositionMoved if the tailer has moved the offset meanwhile.
    """
    position = reset.position
    place: dict[str, Any] = {"file_id": position.file_id, "offset": reset.place.offset}
    with wrapped(), connection.transaction():
        # first the position, as a commit does: in another order the two would wait for each other
        moved = connection.execute(
            query("rewind_position"),
            {
                "file_id": position.file_id,
                "old_offset": position.committed_offset,
                "new_offset": reset.place.offset,
                "head": reset.place.head,
                "frontier_sha256": reset.place.frontier_sha256,
                "frontier_bytes": reset.place.frontier_bytes,
            },
        )
        if moved.rowcount != 1:
            raise PositionMoved(f"{position.path}: the offset is not {position.committed_offset} any more")
        if reset.place.offset < position.committed_offset:
            for name in (
                "delete_batches_from",
                "delete_gaps_from",
                "delete_open_dead_letters_from",
                "recount_letter_bytes",
            ):
                connection.execute(query(name), place)
        elif reset.place.offset > position.committed_offset:
            gap = {
                "file_id": position.file_id,
                "start_offset": position.committed_offset,
                "end_offset": reset.place.offset,
                "reason": str(GapReason.SKIPPED),
            }
            connection.execute(query("insert_gap"), gap)
        connection.execute(
            query("insert_reset"),
            {
                "reset_id": reset.reset_id,
                "source_id": source_id,
                "file_id": position.file_id,
                "path": position.path,
                "requested": reset.requested,
                "old_offset": position.committed_offset,
                "new_offset": reset.place.offset,
                "source": reset.source,
                "reason": reset.reason,
            },
        )
