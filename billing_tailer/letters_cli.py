"""The verbs that decide dead letters: look at them again with the program of today, or give them up.

Each letter is decided in a transaction of its own; exit code 1 where one of them stays open.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any

import typer

from billing_tailer import audit, configured, fastlane
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.ledger import Operator, Reports, operator, proofs, reports
from billing_tailer.letters import Unread, read_again
from billing_tailer.model import SeenFile
from billing_tailer.options import AsJson, By, DryRun, Limit, Reason, person_named, said
from billing_tailer.plan import Parse
from billing_tailer.printing import plain, print_pairs, print_rows
from billing_tailer.proof_cli import find_survivors
from billing_tailer.settings import Settings, load
from billing_tailer.spend import parse_spool_line
from billing_tailer.spool import is_spool_file

verbs = typer.Typer()
dead_letters = typer.Typer(no_args_is_help=True, help="Byte ranges that could not become facts.")
verbs.add_typer(dead_letters, name="dead-letters")

Ids = Annotated[list[int], typer.Argument(metavar="ID...", help="As `dead-letters list` shows them.")]


@dead_letters.command("list")
def dead_letters_list(
    as_json: AsJson = False,
    include_resolved: Annotated[bool, typer.Option("--all", help="Also those that are resolved.")] = False,
    limit: Limit = 100,
) -> None:
    """The newest first."""
    with configured.reports_for_verbs(load()) as ledger:
        rows = ledger.dead_letters(include_resolved=include_resolved, limit=limit)
    columns = ["dead_letter_id", "path", "start_offset", "end_offset", "reason", "detail", "created_at", "resolution"]
    print_rows([plain(row) for row in rows], columns, as_json)


@dead_letters.command("show")
def dead_letters_show(dead_letter_id: int, as_json: AsJson = False) -> None:
    """One dead letter with its bytes."""
    with configured.reports_for_verbs(load()) as ledger:
        row = _letter(ledger, dead_letter_id)
    row["raw"] = bytes(row["raw"]).decode("utf-8", "backslashreplace")
    row["sha256"] = bytes(row["sha256"]).hex()
    print_pairs(plain(row), as_json)


@dead_letters.command()
def retry(ids: Ids, reason: Reason, by: By = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Read dead letters with the program of today; what is understood becomes what it is. Exit code 1 if not all."""
    _decide(ids, reason, by, dry_run, as_json, again=True)


@dead_letters.command()
def discard(ids: Ids, reason: Reason, by: By = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Decide that nothing will become of dead letters. They stay, with who decided and why."""
    _decide(ids, reason, by, dry_run, as_json, again=False)


def _decide(ids: Sequence[int], reason: str, by: str | None, dry_run: bool, as_json: bool, *, again: bool) -> None:
    settings = load()
    who, why = person_named(by), said("--reason", reason)
    with configured.database_for_verbs(settings) as dsn:
        find = _finder(settings, dsn)
        with (
            reports(dsn, settings.db_schema, settings.source_id) as reads,
            operator(
                dsn,
                settings.db_schema,
                quiet_seconds=settings.failure_quiet_seconds,
                deadline_seconds=settings.settle_deadline_seconds,
            ) as writes,
        ):
            letters = [_letter(reads, one) for one in dict.fromkeys(ids)]
            rows = [
                _decided(settings, letter, writes, find if again else None, who, why, dry_run) for letter in letters
            ]
    print_rows(rows, ["dead_letter_id", "path", "start_offset", "end_offset", "applied", "resolution", "why"], as_json)
    raise typer.Exit(0 if all(row["resolution"] is not None for row in rows) else 1)


def _letter(reads: Reports, dead_letter_id: int) -> dict[str, Any]:
    letter = reads.dead_letter(dead_letter_id)
    if letter is None:
        raise ConfigError(f"there is no dead letter {dead_letter_id}", "see `billing-tailer dead-letters list --all`")
    return letter


def _decided(
    settings: Settings,
    letter: dict[str, Any],
    writes: Operator,
    find: Callable[[int], SeenFile | None] | None,
    by: str,
    reason: str,
    dry_run: bool,
) -> dict[str, Any]:
    row = {name: letter[name] for name in ("dead_letter_id", "file_id", "path", "start_offset", "end_offset")}
    if letter["resolved_at"] is not None:
        return {**row, "applied": False, "resolution": letter["resolution"], "why": "it was decided before"}
    becomes = (
        None if find is None else read_again(letter, find, _parser(settings, letter["path"]), settings.line_bytes_max)
    )
    if isinstance(becomes, Unread):
        return {**row, "applied": False, "resolution": None, "why": becomes.why}
    try:
        resolution = writes.decide_letter(letter["dead_letter_id"], becomes, by=by, reason=reason, dry_run=dry_run)
    except TailerError as error:
        if error.exit_code != 1:
            raise
        return {**row, "applied": False, "resolution": None, "why": error.message}
    return {**row, "applied": not dry_run, "resolution": resolution, "why": None}


def _parser(settings: Settings, path: str) -> Parse:
    if is_spool_file(path):
        return partial(parse_spool_line, cost_max=settings.cost_max_usd)
    return fastlane.AuditLines(audit.routes(settings.llm_routes))


def _finder(settings: Settings, dsn: str) -> Callable[[int], SeenFile | None]:
    """Where the content of a generation is today; looked for only if somebody asks."""

    @cache
    def files() -> dict[int, SeenFile]:
        with proofs(dsn, settings.db_schema, settings.source_id) as ledger:
            return find_survivors(settings, ledger.generations()).files

    return lambda file_id: files().get(file_id)
