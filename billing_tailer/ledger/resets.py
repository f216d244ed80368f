"""Moving an offset, or ruling on a generation that is not read, by an operator's will: one transaction that leaves a
row in `offset_resets`, by which a running daemon notices."""

from dataclasses import dataclass
from typing import Any

from billing_tailer.errors import ConfigError, PositionMoved
from billing_tailer.ledger.connection import Connection, query, wrapped
from billing_tailer.model import FileState, Gap, GapReason, Place, Position


@dataclass(frozen=True, slots=True)
class Reset:
    """A reset that has been thought through: `place` was read from the file.

    requested: the operator's own words, `PATH=beginning|end|BYTE`; source: `env` or `cli`; by: who, None for `env`.
    """

    reset_id: str
    position: Position
    requested: str
    place: Place
    source: str
    reason: str
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """What an operator decides of a generation that is missing or blocked. The offset stays.

    position: as it was looked at; after: with its new place and state, final where it is given up; gap: what is given
    up; requested: the operator's own words; by: who; ended: other generations, of which nothing is committed, that had
    the file in which this one goes on.
    """

    reset_id: str
    position: Position
    after: Position
    gap: Gap | None
    requested: str
    reason: str
    by: str
    ended: tuple[int, ...] = ()


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
        # also those behind the old offset, of a generation that had been given up
        behind = min(reset.place.offset, position.committed_offset)
        connection.execute(query("delete_gaps_from"), {**place, "offset": behind})
        if reset.place.offset < position.committed_offset:
            for name in ("delete_batches_from", "delete_open_dead_letters_from", "recount_letter_bytes"):
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
                "by": reset.by,
            },
        )


def apply_ruling(connection: Connection, source_id: str, ruling: Ruling) -> None:
    """Give a generation up with its gap, or let it go on in another file, and leave a row.

    Raises PositionMoved if the generation is not what the operator saw, or another one has the file by now.
    """
    before, after = ruling.position, ruling.after
    place: dict[str, Any] = {
        "source_id": source_id,
        "file_id": after.file_id,
        "path": after.path,
        "device": after.device,
        "inode": after.inode,
    }
    with wrapped(), connection.transaction():
        ruled = connection.execute(
            query("rule_on_file"),
            {
                **place,
                "committed_offset": before.committed_offset,
                "size_seen": before.size_seen,
                "state": str(after.state),
                "state_was": str(before.state),
                "blocked_reason_was": None if before.blocked_reason is None else str(before.blocked_reason),
            },
        )
        if ruled.rowcount != 1:
            raise PositionMoved(
                f"generation {before.file_id} ({before.path}) is not {before.state} at byte {before.committed_offset} "
                "any more: a running daemon has found its file, or somebody else has decided it",
                "look again with `billing-tailer files`",
            )
        if after.state is not FileState.FINAL:
            connection.execute(query("end_empty_files"), {"file_ids": list(ruling.ended)})
            other = connection.execute(query("other_holder"), place).fetchone()
            if other is not None:
                raise PositionMoved(
                    f"generation {other[0]} is read from {after.path} by now", "look again with `billing-tailer files`"
                )
        if ruling.gap is not None:
            gap = ruling.gap
            words = {"start_offset": gap.start_offset, "end_offset": gap.end_offset, "reason": str(gap.reason)}
            connection.execute(query("insert_gap"), {"file_id": gap.file_id, **words})
        connection.execute(
            query("insert_reset"),
            {
                "reset_id": ruling.reset_id,
                "source_id": source_id,
                "file_id": before.file_id,
                "path": before.path,
                "requested": ruling.requested,
                "old_offset": before.committed_offset,
                "new_offset": after.committed_offset,
                "source": "cli",
                "reason": ruling.reason,
                "by": ruling.by,
            },
        )
