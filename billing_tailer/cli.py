"""The verbs. Reads take `--json` (a stable shape), writes take `--reason` and have `--dry-run`.

Exit codes: 0 ok, 1 failed or unhealthy, 2 usage or configuration, 3 another owner.
"""

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, NoReturn

import typer

from billing_tailer import __version__
from billing_tailer import app as daemon
from billing_tailer.backfill_cli import backfill
from billing_tailer.checks import run_checks
from billing_tailer.errors import ConfigError, LedgerUnavailable, PositionMoved, TailerError
from billing_tailer.export_cli import export
from billing_tailer.files import LogFiles
from billing_tailer.ledger import Reports, Reset, reason_of, reports
from billing_tailer.ledger import migrate as migrate_schema
from billing_tailer.letters_cli import discard, retry
from billing_tailer.model import FileState
from billing_tailer.money_cli import By, money, person_named, said
from billing_tailer.offsets_cli import accept_gap, adopt, file_rows, offsets_list
from billing_tailer.printing import AsJson, DryRun, Reason, plain, print_pairs, print_rows
from billing_tailer.proof_cli import print_safe_to_delete, proof
from billing_tailer.resets import newest_at, parse_request, plan_reset
from billing_tailer.settings import OffsetReset, Settings, load

RESET_SECONDS_MAX = 10.0
"""How long `offsets reset` competes with a busy daemon."""

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
offsets = typer.Typer(no_args_is_help=True, help="Where each file stands, and moving it.")
dead_letters = typer.Typer(no_args_is_help=True, help="Byte ranges that could not become facts.")
cli.add_typer(offsets, name="offsets")
cli.add_typer(dead_letters, name="dead-letters")
cli.add_typer(proof)
cli.command("backfill")(backfill)
cli.command("export")(export)
cli.add_typer(money)


def main() -> NoReturn:
    """The console script: our own errors become one message and their exit code."""
    try:
        cli(standalone_mode=True)
    except TailerError as error:
        sys.stdout.flush()
        print(f"billing-tailer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


@cli.command()
def run() -> None:
    """Follow the log until SIGTERM."""
    raise typer.Exit(daemon.run(load()))


@cli.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    print(json.dumps({"version": __version__}) if as_json else __version__)


@cli.command()
def check(as_json: AsJson = False) -> None:
    """Tell everything that is wrong with this installation at once."""
    with daemon.database_for_verbs(settings := load()) as dsn:
        findings = run_checks(settings, dsn)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            word = "FAIL" if not finding.ok else "warn" if finding.warning else "ok  "
            print(f"{word} {finding.topic}: {finding.message}")
            if word != "ok  ":
                print(f"     -> {finding.hint}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@cli.command()
def migrate(as_json: AsJson = False) -> None:
    """Create or upgrade the schema, with the owner's DSN (MIGRATE_DATABASE_URL, else DATABASE_URL)."""
    settings = load()
    owner = settings.migrate_database_url or settings.database_url
    if owner is None:
        raise ConfigError(
            "BILLING_TAILER_MIGRATE_DATABASE_URL is not set", "set it to the DSN of the role that owns the schema"
        )
    applied = migrate_schema(owner.get_secret_value(), settings.db_schema)
    if as_json:
        print(json.dumps({"schema": settings.db_schema, "applied": applied}))
    else:
        print(f"schema {settings.db_schema}: {', '.join(applied) or 'nothing to do'}")


@cli.command()
def status(as_json: AsJson = False) -> None:
    """How far everything is committed; exit code 1 if something needs an operator."""
    settings = load()
    with _reports(settings) as ledger:
        positions = ledger.positions()
        totals = {**ledger.totals(), **ledger.settlement()}
        owner = ledger.active_owner()
    rows = file_rows(settings, positions)
    blocked = [row["path"] for row in rows if row["state"] == FileState.BLOCKED]
    answer = {
        "source_id": settings.source_id,
        "active": owner is not None,
        "lag_bytes": sum(row["lag_bytes"] or 0 for row in rows),
        "last_commit_at": max((row["last_commit_at"] for row in rows if row["last_commit_at"]), default=None),
        "files": len(rows),
        "blocked": blocked,
        **totals,
    }
    if as_json:
        print(json.dumps(answer))
    else:
        print_pairs(answer)
    raise typer.Exit(1 if blocked or totals["dead_letters_open"] else 0)


@cli.command()
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


offsets.command("list")(offsets_list)
offsets.command("accept-gap")(accept_gap)
offsets.command("adopt")(adopt)


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
    with _reports(settings) as ledger:
        reset = _reset(settings, ledger, wanted, dry_run=dry_run, **words)
    answer = {
        "reset_id": None if dry_run else reset.reset_id,
        "applied": not dry_run,
        "path": reset.position.path,
        "file_id": reset.position.file_id,
        "old_offset": reset.position.committed_offset,
        "new_offset": reset.place.offset,
    }
    if as_json:
        print(json.dumps(answer))
    else:
        print_pairs(answer)


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


@dead_letters.command("list")
def dead_letters_list(
    as_json: AsJson = False,
    include_resolved: Annotated[bool, typer.Option("--all", help="Also those that are resolved.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
) -> None:
    """The newest first."""
    with _reports(load()) as ledger:
        rows = ledger.dead_letters(include_resolved=include_resolved, limit=limit)
    columns = ["dead_letter_id", "path", "start_offset", "end_offset", "reason", "detail", "created_at", "resolution"]
    print_rows([plain(row) for row in rows], columns, as_json)


@dead_letters.command("show")
def dead_letters_show(dead_letter_id: int, as_json: AsJson = False) -> None:
    """One dead letter with its bytes."""
    with _reports(load()) as ledger:
        row = ledger.dead_letter(dead_letter_id)
    if row is None:
        raise ConfigError(f"there is no dead letter {dead_letter_id}", "see `billing-tailer dead-letters list --all`")
    row["raw"] = bytes(row["raw"]).decode("utf-8", "backslashreplace")
    row["sha256"] = bytes(row["sha256"]).hex()
    if as_json:
        print(json.dumps(plain(row)))
    else:
        print_pairs(plain(row))


dead_letters.command("retry")(retry)
dead_letters.command("discard")(discard)


@contextmanager
def _reports(settings: Settings) -> Iterator[Reports]:
    with (
        daemon.database_for_verbs(settings) as dsn,
        reports(dsn, settings.db_schema, settings.source_id) as ledger,
    ):
        yield ledger
