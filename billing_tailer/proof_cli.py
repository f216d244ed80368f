"""The verbs that prove: what is committed against the log itself, and receipts against their records.

They only read, beside a running daemon or without one. Exit code 1 where something differs.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from billing_tailer import configured
from billing_tailer.deletable import judge_files
from billing_tailer.errors import ConfigError
from billing_tailer.files import LogFiles, escape_path, unescape_path
from billing_tailer.ledger import Generation, Proofs, proofs
from billing_tailer.options import AsJson
from billing_tailer.printing import (
    complain,
    print_json,
    print_line,
    print_pairs,
    print_rows,
    print_state,
    progress_bar,
    text,
)
from billing_tailer.settings import Settings, load
from billing_tailer.survivors import Survivors, survivors
from billing_tailer.verify import Checked, verify
from billing_tailer.verify_settlement import verify_settlement

verbs = typer.Typer()

File = Annotated[str | None, typer.Option(metavar="PATH", help="Only what was read from this file, or stands in it.")]


@verbs.command("verify")
def verify_(
    file: File = None,
    settlement: Annotated[bool, typer.Option("--settlement", help="Prove the receipts instead of the log.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that every committed byte has its outcome, from the log, or every receipt its price; exit code 1 if not."""
    settings = load()
    if settlement:
        if file is not None:
            raise ConfigError("--file and --settlement do not go together", "receipts are proven all at once")
        _verify_settlement(settings, as_json)
    with configured.database_for_verbs(settings) as dsn, proofs(dsn, settings.db_schema, settings.source_id) as ledger:
        answer = _verified(settings, ledger, file)
    if as_json:
        print_json(answer)
    else:
        _print_verified(answer)
    raise typer.Exit(0 if answer["ok"] else 1)


def _verified(settings: Settings, ledger: Proofs, file: str | None) -> dict[str, Any]:
    generations = ledger.generations()
    found = find_survivors(settings, generations)
    chosen = [
        one
        for one in generations
        if file is None or _is_about(one, found, escape_path(os.fsencode(Path(file).absolute())))
    ]
    if file is not None and not chosen:
        raise ConfigError(f"nothing is known of {text(file)}", "see `billing-tailer files` for the known paths")
    todo = sum(one.position.committed_offset for one in chosen if one.position.file_id in found.files)
    with progress_bar("verifying", todo) as bar:
        checked = [_checked(one, found, ledger, bar) for one in chosen]
    if any(one.differences for one in checked):
        now = {one.position.file_id: one for one in ledger.generations()}
        pairs = [(was, one, now[was.position.file_id]) for was, one in zip(chosen, checked, strict=True)]
        checked = [
            # an operator moved its offset meanwhile: what was read before and after does not fit together
            _checked(after, found, ledger, lambda _: None) if one.differences and was.resets != after.resets else one
            for was, one, after in pairs
        ]
    rows = [_row(one) for one in checked]
    differences = [asdict(difference) for one in checked for difference in one.differences]
    return {
        "ok": not differences,
        "generations": rows,
        "differences": differences,
        "differences_not_shown": sum(one.more_differences for one in checked),
        "bytes_read": sum(one.bytes_read for one in checked),
        "not_on_disk": [row["file_id"] for row in rows if row["committed_offset"] and row["found_at"] is None],
        "problems": found.problems,
    }


def _checked(one: Generation, found: Survivors, ledger: Proofs, progress: Callable[[int], None]) -> Checked:
    file_id = one.position.file_id
    checked = verify(one, found.files.get(file_id), ledger, progress)
    if file_id in found.unreadable:
        checked.differ(0, one.position.committed_offset, found.unreadable[file_id])
    return checked


def _verify_settlement(settings: Settings, as_json: bool) -> NoReturn:
    with (
        configured.database_for_verbs(settings) as dsn,
        proofs(dsn, settings.db_schema, settings.source_id) as ledger,
        progress_bar("calls", None) as bar,
    ):
        proven = verify_settlement(ledger, configured.rules(settings), bar)
    answer = {"ok": proven.ok, **asdict(proven)}
    if as_json:
        print_json(answer)
    else:
        for one in proven.differences:
            print_state("DIFFERENCE", f" call {text(one.call_id)}: {text(one.what)}")
        print_pairs({name: value for name, value in answer.items() if name not in ("ok", "differences")})
        print_pairs({"differences": len(proven.differences) + proven.differences_not_shown})
    raise typer.Exit(0 if proven.ok else 1)


def print_safe_to_delete(settings: Settings, as_json: bool) -> NoReturn:
    """Paths that may be deleted on standard output, one a line as they are; why others must stay on standard error.
    Exit code 1 where a file is not what was committed."""
    with configured.database_for_verbs(settings) as dsn, proofs(dsn, settings.db_schema, settings.source_id) as ledger:
        generations = ledger.generations()
        found = find_survivors(settings, generations)
        todo = sum(one.position.committed_offset for one in generations if one.position.file_id in found.files)
        with progress_bar("verifying", todo) as bar:
            judged = judge_files(generations, found, ledger, bar)
    safe = [one.path for one in judged if not one.reasons]
    if as_json:
        others = [{"path": one.path, "reasons": list(one.reasons)} for one in judged if one.reasons]
        print_json({"safe": safe, "not_safe": others, "problems": found.problems})
    else:
        for path in safe:
            name = unescape_path(path)
            if b"\n" in name:  # would be two names to whoever reads them
                complain(f"{path}: may be deleted, but its name has a newline: use --json")
            else:
                print_line(os.fsdecode(name))
        for one in judged:
            if one.reasons:
                complain(f"{text(one.path)}: {'; '.join(one.reasons)}")
        for problem in found.problems:
            complain(f"warning: {text(problem)}")
    raise typer.Exit(1 if any(one.differs for one in judged) else 0)


def find_survivors(settings: Settings, generations: Sequence[Generation]) -> Survivors:
    """Where the content of each generation is today, as these settings see it."""
    directories = LogFiles(settings.audit_globs, settings.open_files_max).directories()
    return survivors(generations, [escape_path(os.fsencode(directory)) for directory in directories])


def _is_about(generation: Generation, found: Survivors, path: str) -> bool:
    file = found.files.get(generation.position.file_id)
    return path in (generation.position.path, None if file is None else file.path)


def _row(one: Checked) -> dict[str, Any]:
    position = one.position
    return {
        "file_id": position.file_id,
        "path": position.path,
        "generation": position.generation,
        "state": str(position.state),
        "found_at": one.found_at,
        "committed_offset": position.committed_offset,
        "bytes_read": one.bytes_read,
        "ranges": one.ranges,
        "gaps": one.gaps,
        "facts": one.facts,
        "dead_letters": one.dead_letters,
        "conflicts": one.conflicts,
        "is_whole": one.is_whole,
        "differences": len(one.differences) + one.more_differences,
    }


def _print_verified(answer: dict[str, Any]) -> None:
    columns = ["file_id", "path", "found_at", "committed_offset", "ranges", "gaps", "facts", "dead_letters"]
    rows = [
        {**row, "found_at": row["found_at"] or ("not on disk" if row["committed_offset"] else None)}
        for row in answer["generations"]
    ]
    print_rows(rows, [*columns, "differences"], False)
    for one in answer["differences"]:
        place = f"{text(one['path'])} (file_id {one['file_id']})"
        print_state("DIFFERENCE", f" {place}, bytes {one['start_offset']} to {one['end_offset']}: {one['what']}")
    for problem in answer["problems"]:
        print_line(f"warning: {text(problem)}", "yellow")
    shown = len(answer["differences"]) + answer["differences_not_shown"]
    print_pairs({"differences": shown, "bytes_read": answer["bytes_read"], "not_on_disk": len(answer["not_on_disk"])})
