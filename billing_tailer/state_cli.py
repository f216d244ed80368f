"""The verbs about the whole: is the installation right, is the schema this program's, is everything committed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer

from billing_tailer import configured
from billing_tailer.checks import run_checks
from billing_tailer.errors import ConfigError, LedgerUnavailable
from billing_tailer.ledger import Reports
from billing_tailer.ledger import migrate as migrate_schema
from billing_tailer.listing import file_rows
from billing_tailer.model import ExceptionKind, FileState
from billing_tailer.options import AsJson, DryRun
from billing_tailer.printing import complain, plain, print_json, print_line, print_pairs, print_state
from billing_tailer.reconcile import SWEEP_SECONDS_MAX, rate
from billing_tailer.settings import Settings, load

WAIT_PAUSE_SECONDS: Final = 0.5

verbs = typer.Typer()

UNDECIDED = (
    ExceptionKind.HELD_ZERO_COST,
    ExceptionKind.HELD_BAD_COST,
    ExceptionKind.UNATTRIBUTED,
    ExceptionKind.CONFLICT,
    ExceptionKind.OVERDUE,
    ExceptionKind.COST_MISMATCH,
)
"""Open exceptions that keep money from being charged, or mean that other money was."""
WaitSeconds = Annotated[
    int,
    typer.Option(min=0, max=3600, help="For so long, try again while Postgres cannot be reached or lets nobody in."),
]


@verbs.command()
def check(as_json: AsJson = False) -> None:
    """Tell everything that is wrong with this installation at once; exit code 1 if anything has to be mended."""
    findings = run_checks(load())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            word = "FAIL" if not finding.ok else "warn" if finding.warning else "ok"
            print_state(f"{word:<4}", f" {finding.topic}: {finding.message}")
            if word != "ok":
                print_line(f"     -> {finding.hint}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@verbs.command()
def migrate(wait_seconds: WaitSeconds = 0, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Create or upgrade the schema, with the owner's DSN (MIGRATE_DATABASE_URL, else DATABASE_URL)."""
    settings = load()
    owner = settings.migrate_database_url or settings.database_url
    if owner is None:
        raise ConfigError(
            "BILLING_TAILER_MIGRATE_DATABASE_URL is not set", "set it to the DSN of the role that owns the schema"
        )
    names = _migrated(owner.get_secret_value(), settings.db_schema, dry_run, wait_seconds)
    if as_json:
        missing, applied = (names, []) if dry_run else ([], names)
        print_json({"schema": settings.db_schema, "applied": applied, "missing": missing})
    else:
        would = "would be applied: " if dry_run and names else ""
        print_line(f"schema {settings.db_schema}: {would}{', '.join(names) or 'nothing to do'}")


def _migrated(dsn: str, schema: str, dry_run: bool, wait_seconds: int) -> list[str]:
    """`migrate_schema`, and again while Postgres is away, as long as the verb may wait."""
    deadline = time.monotonic() + wait_seconds
    said = ""
    while True:
        try:
            return migrate_schema(dsn, schema, dry_run=dry_run)
        except LedgerUnavailable as error:
            if time.monotonic() + WAIT_PAUSE_SECONDS > deadline:
                raise
            if error.message != said:
                said = error.message
                complain(f"billing-tailer: waiting for Postgres: {said}")
        time.sleep(WAIT_PAUSE_SECONDS)


@verbs.command()
def status(as_json: AsJson = False) -> None:
    """How far everything is committed; exit code 1 if something needs an operator, and what."""
    settings = load()
    with configured.reports_for_verbs(settings) as ledger:
        positions = ledger.positions()
        totals = {**ledger.totals(), **ledger.settlement()}
        owner = ledger.active_owner()
        ratio = _capture_ratio(ledger, settings)
    rows = file_rows(settings, positions)
    answer = {
        "source_id": settings.source_id,
        "active": owner is not None,
        "lag_bytes": sum(row["lag_bytes"] or 0 for row in rows),
        "last_commit_at": max((row["last_commit_at"] for row in rows if row["last_commit_at"]), default=None),
        "files": len(rows),
        "blocked": [row["path"] for row in rows if row["state"] == FileState.BLOCKED],
        **totals,
        "capture_ratio": ratio,
    }
    unhealthy = list(_unhealthy(rows, totals))
    if as_json:
        print_json({**answer, "unhealthy": unhealthy})
    else:
        print_pairs({**answer, "unhealthy": len(unhealthy)})
        for one in unhealthy:
            print_state("FAIL", f" {one['reason']}")
            print_line(f"     -> {one['next']}")
    raise typer.Exit(1 if unhealthy else 0)


def _capture_ratio(ledger: Reports, settings: Settings) -> str | None:
    """Of the last quarter of an hour that is closed, as the metric has it, of all sources; None without calls, or where
    it would take too long to count them."""
    try:
        counts = ledger.closed_window(settings.settle_deadline_seconds + SWEEP_SECONDS_MAX)
    except LedgerUnavailable:
        return None
    ratio: str | None = plain(rate(counts["settled"] + counts["not_charged"], counts["billable"]))
    return ratio


def _unhealthy(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What an operator has to decide, and the command that begins with it."""
    for row in rows:
        if row["state"] == FileState.BLOCKED:
            yield {
                "reason": f"{row['path']} (file_id {row['file_id']}) is blocked: {row['blocked_reason']}",
                "next": "`billing-tailer files` shows the commands that decide it",
            }
        elif row["state"] == FileState.MISSING:
            yield {
                "reason": f"{row['path']} (file_id {row['file_id']}) is missing: nobody knows whether it had more",
                "next": "put it back, or `billing-tailer files` shows the commands that decide it",
            }
    letters = totals["dead_letters_open"]
    if letters:
        yield {
            "reason": f"{letters} dead letter{'s are' if letters > 1 else ' is'} open",
            "next": "`billing-tailer dead-letters list`, then `billing-tailer dead-letters retry ID --reason ...` or "
            "`billing-tailer dead-letters discard ID --reason ...`",
        }
    for kind, number in totals["exceptions_open"].items():
        if kind in UNDECIDED:
            yield {
                "reason": f"{number} call{'s are' if number > 1 else ' is'} {kind}",
                "next": f"`billing-tailer exceptions list --kind {kind}`, then `billing-tailer explain CALL_ID`",
            }
