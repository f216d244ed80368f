"""The verb that reads old logs."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from billing_tailer import audit, configured, fastlane
from billing_tailer.backfill import Backfill, Filled, find, open_ledger, refuse_followed, source_of
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.events import Events, configure_logging
from billing_tailer.files import LogFiles, LogStream, escape_path
from billing_tailer.health import Health
from billing_tailer.ledger import Ledger
from billing_tailer.model import Outcome, Rejected, Skip
from billing_tailer.options import AsJson, By, DryRun, Reason, person_named, said
from billing_tailer.plan import Parse
from billing_tailer.printing import print_line, print_rows, progress_bar, text
from billing_tailer.reader import Limits
from billing_tailer.settings import Settings, load
from billing_tailer.settler import Settler, Timing
from billing_tailer.spool import is_spool_file

verbs = typer.Typer()

Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Audit logs, plain or gzip.")]


@verbs.command()
def backfill(files: Files, reason: Reason, by: By = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Read old audit logs that no daemon follows, as if they had been tailed; again is nothing, interrupted goes on."""
    settings = load()
    who, why = person_named(by), said("--reason", reason)
    paths = [_path(file) for file in dict.fromkeys(files)]
    configure_logging("error", settings.log_format)
    with configured.database_for_verbs(settings) as dsn:
        ledger = Ledger(dsn, schema=settings.db_schema, source_id=source_of(settings.source_id), stop=threading.Event())
        try:
            open_ledger(ledger)
            scan = LogFiles(settings.audit_globs, settings.open_files_max).scan()
            daemons = ledger.positions_of_daemons()
            for path in paths:
                refuse_followed(path, {file.locator: file for file in scan.files}, daemons, ledger.ping)
            parse = fastlane.AuditLines(audit.routes(settings.llm_routes))
            with progress_bar("reading", sum(map(_size, paths))) as bar:
                if dry_run:
                    rows = [_looked_at(path, ledger, parse, settings, bar) for path in paths]
                else:
                    filler = _backfill(settings, ledger, parse)
                    filled = [filler.fill(path, reason=why, by=who, progress=bar) for path in paths]
                    rows = [_row(one, applied=True) for one in filled]
        except OSError as error:
            raise TailerError(
                f"{text(error.filename or 'a file')}: {error.strerror}",
                "what was read before is committed; repair the file, or restore it, and run the verb again",
            ) from error
        finally:
            ledger.close()
    columns = ["file_id", "path", "from_offset", "to_offset", "outcomes", "lines_per_second"]
    print_rows(rows, columns, as_json)
    if dry_run and not as_json:
        print_line("nothing was written; calls that are known will be replayed")


def _path(file: str) -> str:
    path = escape_path(os.fsencode(Path(file).absolute()))
    try:
        with LogStream(path) as stream:
            stream.read(1)
    except OSError as error:
        raise ConfigError(f"{text(file)}: {error.strerror}", "name a readable audit log, plain or gzip") from None
    if is_spool_file(path):
        raise ConfigError(f"{text(file)} is a file of the spool", "put it back into SPOOL_DIR: the daemon reads it")
    return path


def _size(path: str) -> int:
    with LogStream(path) as stream:
        return stream.file.size


def _backfill(settings: Settings, ledger: Ledger, parse: Parse) -> Backfill:
    timing = Timing(settings.settle_deadline_seconds, settings.failure_quiet_seconds)
    rules = configured.rules(settings)
    # nobody here can tell whether a record may still come: what time decides is the daemon's
    settler = Settler(ledger, rules, timing, Events(), Health(), poller=None, spool_is_behind=lambda: True)
    limits = Limits(settings.batch_lines_max, settings.batch_bytes_max // 2, settings.line_bytes_max)
    return Backfill(ledger, settler, parse, limits)


def _looked_at(
    path: str, ledger: Ledger, parse: Parse, settings: Settings, progress: Callable[[int], None]
) -> dict[str, Any]:
    """What a file would become, as far as its lines say."""
    position = find(path, ledger.positions(), ledger.ping)
    start = 0 if position is None else position.committed_offset
    counts: Counter[str] = Counter()
    with LogStream(path) as stream:
        stream.skip_to(start)
        rest = b""
        while data := stream.read(settings.batch_bytes_max // 2):
            progress(len(data) if not stream.compressed else 0)
            *lines, rest = (rest + data).split(b"\n")
            counts.update(_outcomes(lines, parse, settings.line_bytes_max))
        counts.update([str(Outcome.DEAD_LETTER)] if rest else [])
        filled = Filled(path, 0 if position is None else position.file_id, start, stream.offset, counts)
    return _row(filled, applied=False)


def _outcomes(lines: Sequence[bytes], parse: Parse, line_bytes_max: int) -> list[str]:
    outcomes = [parse(line) if len(line) <= line_bytes_max else None for line in lines]
    return [
        str(one.reason if isinstance(one, Skip) else Outcome.DEAD_LETTER if _is_bad(one) else Outcome.FACT)
        for one in outcomes
    ]


def _is_bad(outcome: object) -> bool:
    return outcome is None or isinstance(outcome, Rejected)


def _row(filled: Filled, *, applied: bool) -> dict[str, Any]:
    rate = round(sum(filled.counts.values()) / filled.seconds) if filled.seconds else None
    return {
        "file_id": filled.file_id,
        "path": filled.path,
        "from_offset": filled.from_offset,
        "to_offset": filled.to_offset,
        "applied": applied,
        "outcomes": dict(filled.counts),
        "seconds": round(filled.seconds, 3),
        "lines_per_second": rate,
    }
