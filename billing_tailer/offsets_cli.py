"""Verbs about generations: where each stands, and the decision about one that nothing is read from."""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from billing_tailer import app as daemon
from billing_tailer.errors import ConfigError
from billing_tailer.files import LogFiles, escape_path
from billing_tailer.identity import deciding_commands
from billing_tailer.ledger import Ruling, reports
from billing_tailer.model import FileState, Gap, Position
from billing_tailer.money_cli import By, person_named, said
from billing_tailer.printing import AsJson, DryRun, Reason, plain, print_pairs, print_rows
from billing_tailer.rulings import plan_acceptance, plan_adoption
from billing_tailer.settings import Settings, load

GAPS_SHOWN_MAX = 5
"""Of one generation, to people: the newest."""

FileId = Annotated[int, typer.Argument(metavar="FILE_ID", help="As `files` shows it.")]


def offsets_list(as_json: AsJson = False) -> None:
    """Committed offsets, sizes, lag and gaps, and the commands that decide what is missing or blocked."""
    settings = load()
    with daemon.database_for_verbs(settings) as dsn, reports(dsn, settings.db_schema, settings.source_id) as ledger:
        positions, gaps = ledger.positions(), ledger.gaps()
    rows = [
        {**row, "decide": list(deciding_commands(position)), "gaps": plain(gaps.get(position.file_id, []))}
        for row, position in zip(file_rows(settings, positions), positions, strict=True)
    ]
    columns = ["file_id", "path", "generation", "state", "committed_offset", "size", "lag_bytes"]
    print_rows(rows, columns, as_json, _notes)


def accept_gap(
    file_id: FileId, reason: Reason, by: By = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Give up what is not committed of a generation that is missing or blocked: a gap. Its path is read anew."""

    def plan(position: Position, _: Settings, __: Sequence[Position], **words: str) -> Ruling:
        return plan_acceptance(position, **words)

    _rule(file_id, plan, reason, by, dry_run, as_json)


def adopt(
    file_id: FileId,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The file that has its content, plain or .gz.")],
    reason: Reason,
    by: By = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Let a generation that is missing or blocked go on in another file, at the committed offset."""
    name = escape_path(os.fsencode(Path(path).absolute()))

    def plan(position: Position, settings: Settings, known: Sequence[Position], **words: str) -> Ruling:
        return plan_adoption(position, name, known, LogFiles(settings.audit_globs, settings.open_files_max), **words)

    _rule(file_id, plan, reason, by, dry_run, as_json)


def _rule(file_id: int, plan: Callable[..., Ruling], reason: str, by: str | None, dry_run: bool, as_json: bool) -> None:
    settings = load()
    words = {"reset_id": f"cli-{uuid.uuid4()}", "reason": said("--reason", reason), "by": person_named(by)}
    with daemon.database_for_verbs(settings) as dsn, reports(dsn, settings.db_schema, settings.source_id) as ledger:
        known = ledger.positions()
        position = next((one for one in known if one.file_id == file_id), None)
        if position is None:
            raise ConfigError(
                f"there is no generation {file_id} of source {settings.source_id}",
                "see `billing-tailer files` for the known ones",
            )
        ruling = plan(position, settings, known, **words)
        if not dry_run:
            ledger.rule(ruling)
    answer = _answer(ruling, applied=not dry_run)
    if as_json:
        print(json.dumps(answer))
    else:
        gap = {} if ruling.gap is None else {"gap": _gap_in_words(answer["gap"])}
        print_pairs({**answer, **gap})


def _answer(ruling: Ruling, *, applied: bool) -> dict[str, Any]:
    before, after = ruling.position, ruling.after
    return {
        "reset_id": ruling.reset_id if applied else None,
        "applied": applied,
        "file_id": before.file_id,
        "path": after.path,
        "path_was": before.path,
        "state": str(after.state),
        "state_was": str(before.state),
        "blocked_reason_was": None if before.blocked_reason is None else str(before.blocked_reason),
        "committed_offset": after.committed_offset,
        "gap": None if ruling.gap is None else _gap_row(ruling.gap),
        "ended_file_ids": list(ruling.ended),
    }


def _gap_row(gap: Gap) -> dict[str, Any]:
    return {"start_offset": gap.start_offset, "end_offset": gap.end_offset, "reason": str(gap.reason)}


def file_rows(settings: Settings, positions: Sequence[Position]) -> list[dict[str, Any]]:
    """Each position as a row, with the size of its file; none where it is not in sight, which is no reason not to
    answer."""
    scan = LogFiles(settings.audit_globs, settings.open_files_max).scan({p.locator for p in positions})
    sizes = {file.locator: file.size for file in scan.files}
    return [_file_row(position, sizes) for position in positions]


def _file_row(position: Position, sizes: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    superseded = position.state is FileState.FINAL
    size = None if superseded else sizes.get(position.locator)
    return {
        "file_id": position.file_id,
        "path": position.path,
        "generation": position.generation,
        "state": str(position.state),
        "blocked_reason": None if position.blocked_reason is None else str(position.blocked_reason),
        "committed_offset": position.committed_offset,
        "size": size,
        "lag_bytes": None if size is None else max(0, size - position.committed_offset),
        "last_commit_at": None if position.last_commit_at is None else position.last_commit_at.isoformat(),
        "first_seen_at": None if position.first_seen_at is None else position.first_seen_at.isoformat(),
        "previous_file_id": position.previous_file_id,
    }


def _notes(row: Mapping[str, Any]) -> Iterator[str]:
    """What is to be known of a generation beside its columns: why it is blocked, what decides it, its gaps."""
    if row["blocked_reason"] is not None:
        yield f"blocked: {row['blocked_reason']}"
    yield from _decisions(row["decide"])
    gaps = row["gaps"]
    hidden = len(gaps) - GAPS_SHOWN_MAX
    if hidden > 0:
        yield f"{hidden} older gaps: see --json"
    for gap in gaps[-GAPS_SHOWN_MAX:]:
        yield f"gap: {_gap_in_words(gap)}"


def _decisions(commands: Iterable[str]) -> Iterator[str]:
    for word, command in zip(("decide:", "or:"), commands, strict=False):
        yield f"{word:<7} {command}"


def _gap_in_words(gap: Mapping[str, Any]) -> str:
    end = gap["end_offset"]
    to = "to nobody knows where" if end is None else f"to byte {end}"
    return f"{gap['reason']}, byte {gap['start_offset']} {to}"
