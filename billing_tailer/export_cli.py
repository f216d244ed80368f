"""The verb `export`: receipts of a range as CSV or JSON lines, the rows that the page exports.

Whatever the range, memory is bounded and no snapshot is held for longer than five seconds. A file appears whole, under
its name, or not at all; standard output may be cut where the verb fails, and then the exit code is not 0.
"""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TextIO

import typer

from billing_tailer import activity, configured, exporting
from billing_tailer.activity import Range
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.given import EARLIEST
from billing_tailer.ledger import Chosen, activity_reads
from billing_tailer.options import AsJson, time_given
from billing_tailer.printing import text
from billing_tailer.settings import load

verbs = typer.Typer()


class Format(StrEnum):
    """How rows are written."""

    CSV = "csv"
    JSON = "json"


@verbs.command()
def export(
    form: Annotated[Format, typer.Option("--format", help="csv, or json: one object a line.")] = Format.CSV,
    start: Annotated[
        str | None, typer.Option("--from", metavar="ISO", help="Calls that ended at or after this time (UTC).")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="ISO", help="Calls that ended before this time; by default now.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="Of this account.")] = None,
    run: Annotated[str | None, typer.Option(help="Of this run.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="By default standard output.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write all receipts of a range with what was adjusted, the newest first."""
    settings = load()
    form = Format.JSON if as_json else form
    chosen_range = _range(start, end)
    if output is not None and output.exists() and not force:
        raise ConfigError(f"--output {text(str(output))} exists", "name another file, or add --force to replace it")
    with (
        configured.database_for_verbs(settings) as dsn,
        activity_reads(dsn, settings.db_schema) as reads,
        _target(output) as target,
    ):
        if form is Format.CSV:
            target.write(exporting.csv_header())
        for rows in activity.receipts(reads, chosen_range, Chosen(account=account, run_id=run)):
            target.write(exporting.csv_rows(rows) if form is Format.CSV else exporting.json_rows(rows))


def _range(start: str | None, end: str | None) -> Range:
    until = time_given("--to", end) or datetime.now(UTC)
    since = time_given("--from", start) or EARLIEST
    if since >= until:
        raise ConfigError(f"--from {since.isoformat()} is not before --to {until.isoformat()}", "name a period of time")
    return Range(since, until)


@contextmanager
def _target(output: Path | None) -> Iterator[TextIO]:
    """Where to write: beside the file, which takes its name when all is on disk."""
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a test may have put something else there
            sys.stdout.reconfigure(encoding="utf-8", newline="")  # CSV brings its own line ends
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise TailerError(
            f"--output {text(str(output))}: {error.strerror}", "name a file that can be written"
        ) from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        Path(name).replace(output)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
