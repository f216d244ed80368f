"""Verbs about generations: where each stands, and the decision about one that nothing is read from."""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from billing_tailer import configured
from billing_tailer.errors import ConfigError, LedgerUnavailable, PositionMoved
from billing_tailer.files import LogFiles, escape_path
from billing_tailer.identity import deciding_commands
from billing_tailer.ledger import Reports, Reset, Ruling, reason_of
from billing_tailer.listing import file_rows
from billing_tailer.model import Gap, Position
from billing_tailer.options import AsJson, By, DryRun, Reason, person_named, said
from billing_tailer.printing import plain, print_pairs, print_rows
from billing_tailer.proof_cli import print_safe_to_delete
from billing_tailer.resets import newest_at, parse_request, plan_reset
from billing_tailer.rulings import plan_acceptance, plan_adoption
from billing_tailer.settings import OffsetReset, Settings, load

RESET_SECONDS_MAX = 10.0
"""How long `offsets reset` competes with a busy daemon."""
GAPS_SHOWN_MAX = 5
"""Of one generation, to people: the newest."""

verbs = typer.Typer()
offsets = typer.Typer(no_args_is_help=True, help="Where each file stands, and moving it.")
verbs.add_typer(offsets, name="offsets")

FileId = Annotated[int, typer.Argument(metavar="FILE_ID", help="As `files` shows it.")]


@verbs.command()
def files(
    safe_to_delete: Annotated[
        bool, typer.Option("--safe-to-delete", help="Only paths of rotated files that are committed and verified.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Every generation of every file, oldest first."""
    if safe_to_delete:
        print_safe_to_delete(load(), as_json)
    offsets_list(as_json)


@offsets.command("list")
def offsets_list(as_json: AsJson = False) -> None:
    """Committed offsets, sizes, lag and gaps, and the commands that decide what is missing or blocked."""
    settings = load()
    with configured.reports_for_verbs(settings) as ledger:
        positions, gaps = ledger.positions(), ledger.gaps()
    rows = [
        {**row, "decide": list(deciding_commands(position)), "gaps": plain(gaps.get(position.file_id, []))}
        for row, position in zip(file_rows(settings, positions), positions, strict=True)
    ]
    columns = ["file_id", "path", "generation", "state", "committed_offset", "size", "lag_bytes"]
    print_rows(rows, columns, as_json, _notes)


@offsets.command("reset")
def offsets_reset(
    request: Annotated[str, typer.Argument(metavar="PATH=beginning|end|BYTE")],
    reason: Reason,
    by: By = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Read a file again from somewhere, or skip a part of it (declared as a gap). A running daemon adopts it."""
    settings = load()
    wanted = parse_request(request)
    words = {"reason": said("--reason", reason), "by": person_named(by)}
    with configured.reports_for_verbs(settings) as ledger:
        reset = _reset(settings, ledger, wanted, dry_run=dry_run, **words)
    answer = {
        "reset_id": None if dry_run else reset.reset_id,
        "applied": not dry_run,
        "path": reset.position.path,
        "file_id": reset.position.file_id,
        "old_offset": reset.position.committed_offset,
        "new_offset": reset.place.offset,
    }
    print_pairs(answer, as_json)


def _reset(settings: Settings, ledger: Reports, wanted: OffsetReset, reason: str, by: str, *, dry_run: bool) -> Reset:
    """Plan and apply a reset, again and again while a busy daemon moves the offset in between."""
    log_files = LogFiles(settings.audit_globs, settings.open_files_max)
    words = {"reset_id": f"cli-{uuid.uuid4()}", "source": "cli", "reason": reason, "by": by}
    deadline = time.monotonic() + RESET_SECONDS_MAX
    while True:
        position = newest_at(ledger.positions(), wanted.path)
        if position is None:
            raise ConfigError(f"nothing is known of {wanted.path}", "see `billing-tailer files` for the known paths")
        reset = plan_reset(wanted, position, log_files, ledger.range_start, **words)
        if dry_run:
            return reset
        try:
            ledger.reset(reset)
        except (PositionMoved, LedgerUnavailable) as error:
            moved = isinstance(error, PositionMoved) or reason_of(error) == "deadlock_detected"
            if not moved or time.monotonic() > deadline:
                raise
        else:
            return reset


@offsets.command("accept-gap")
def accept_gap(
    file_id: FileId, reason: Reason, by: By = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Give up what is not committed of a generation that is missing or blocked: a gap. Its path is read anew."""

    def plan(position: Position, _: Settings, __: Sequence[Position], **words: str) -> Ruling:
        return plan_acceptance(position, **words)

    _rule(file_id, plan, reason, by, dry_run, as_json)


@offsets.command()
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
    with configured.reports_for_verbs(settings) as ledger:
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
    in_words = {} if as_json or ruling.gap is None else {"gap": _gap_in_words(answer["gap"])}
    print_pairs({**answer, **in_words}, as_json)


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
