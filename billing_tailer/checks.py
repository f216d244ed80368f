"""`check`: everything that is wrong with an installation, at once, each with the next step."""

import threading
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from billing_tailer import audit
from billing_tailer.errors import TailerError
from billing_tailer.files import LogFiles
from billing_tailer.ledger import migrations, models_seen, probe
from billing_tailer.litellm import SpendLogs
from billing_tailer.model import DeadLetterReason, Rejected, SeenFile
from billing_tailer.settings import HEADER_LIMITS, Settings

SAMPLE_BYTES = 256 << 10
CLOCK_SECONDS_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. warning: it works, but not as well as it could."""

    ok: bool
    topic: str
    message: str
    hint: str = ""
    warning: bool = False


def run_checks(settings: Settings, dsn: str) -> list[Finding]:
    """Look at the log volume, the log's format, the database and the sources of costs."""
    return [
        *_check_files(settings),
        *_check_database(settings, dsn),
        *_check_cost_sources(settings),
        *_check_free_models(settings, dsn),
    ]


def _check_files(settings: Settings) -> list[Finding]:
    files = LogFiles(settings.audit_globs, settings.open_files_max)
    try:
        files.require_mounts()
    except TailerError as error:
        return [Finding(False, "log volume", error.message, error.hint)]
    scan = files.scan()
    seen = scan.files
    findings = [
        Finding(False, "log volume", problem, "mount it, or make it readable for this user")
        for problem in (*scan.problems, *scan.broken)
    ]
    findings += [
        Finding(
            False,
            "log files",
            f"{path} looks like a rotated log, but no glob matches it",
            "widen BILLING_TAILER_AUDIT_GLOBS, or move what is no log out of the directory",
        )
        for path in scan.lookalikes
    ]
    if not seen and not scan.archives_unknown:
        globs = ", ".join(settings.audit_globs)
        hint = "send a request through the proxy; see AUDIT_GLOBS"
        return [*findings, Finding(False, "log files", f"no file matches {globs}", hint)]
    findings.append(Finding(True, "log files", f"{len(seen)} match"))
    for file in seen:
        try:
            findings.extend(_check_format(settings, files, file))
        except OSError as error:
            findings.append(
                Finding(
                    False, "log files", f"cannot read {file.path}: {error.strerror}", "make it readable for this user"
                )
            )
    return findings


def _check_format(settings: Settings, files: LogFiles, file: SeenFile) -> list[Finding]:
    """Parse the end of a file as the daemon would."""
    end = files.after_last_newline(file)
    sample = files.read_at(file, max(0, end - SAMPLE_BYTES), min(end, SAMPLE_BYTES))
    lines = sample.split(b"\n")[1 if end > SAMPLE_BYTES else 0 : -1]  # only a newline ends a line
    parse = partial(audit.parse, llm_path=audit.routes(settings.llm_routes))
    bad = [outcome for outcome in map(parse, lines) if isinstance(outcome, Rejected)]
    if not bad:
        return [Finding(True, "log format", f"{file.path}: the last {len(lines)} lines are understood")]
    hint = "see them with `billing-tailer dead-letters list`"
    if any(outcome.reason is DeadLetterReason.MISSING_FIELD for outcome in bad):
        hint = "add the field to nginx's log_format; README shows the whole format"
    message = f"{file.path}: {len(bad)} of the last {len(lines)} lines are not understood: {bad[-1].detail}"
    return [Finding(False, "log format", message, hint)]


def _check_database(settings: Settings, dsn: str) -> list[Finding]:
    try:
        found = probe(dsn, settings.db_schema)
    except TailerError as error:
        return [Finding(False, "database", error.message, error.hint)]
    latest = migrations()[-1].version
    findings = [
        Finding(True, "database", f"Postgres {found['server_version']} as role {found['role']}"),
        Finding(
            found["schema_version"] == latest,
            "schema",
            f"{settings.db_schema} is at version {found['schema_version']}, this program needs {latest}",
            "run `billing-tailer migrate`",
        ),
        Finding(
            not found["missing_grants"],
            "grants",
            "missing: " + ", ".join(found["missing_grants"]) if found["missing_grants"] else "all there",
            f"as the owner of the schema, run deploy/postgres/grants.sql with -v daemon={found['role']}",
        ),
    ]
    if not found["append_only"]:
        embedded = settings.uses_embedded_postgres
        message = f"role {found['role']} may change or delete receipts, which are to be append-only"
        why = "; the embedded Postgres has one role for all" if embedded else ""
        hint = "give the daemon a role of its own with the grants of deploy/postgres/grants.sql"
        findings.append(Finding(embedded, "receipts", message + why, hint, warning=embedded))
    apart = abs(time.time() - found["server_time"])
    findings.append(
        Finding(
            apart <= CLOCK_SECONDS_MAX,
            "clock",
            f"{apart:.1f} s apart from Postgres",
            "synchronise the clocks (NTP) of this machine and of Postgres",
        )
    )
    return findings


def _check_cost_sources(settings: Settings) -> list[Finding]:
    """Callbacks are fast and lossy, spend logs slow and lossy in other ways: both are best, one is needed."""
    if settings.cost_source == "header":
        hint = "set COST_SOURCE=litellm, with CALLBACK_TOKEN, or LITELLM_URL and LITELLM_API_KEY"
        return [Finding(True, "cost source", HEADER_LIMITS, hint, warning=True)]
    with_callbacks = settings.callback_token is not None or settings.spool_dir is not None
    if not with_callbacks and settings.litellm_url is None:
        hint = "set CALLBACK_TOKEN, or LITELLM_URL and LITELLM_API_KEY"
        message = "there is none: calls are recorded but never charged"
        return [Finding(True, "cost source", message, hint, warning=True)]
    if settings.callback_token is not None:
        findings = [Finding(True, "callbacks", "taken with CALLBACK_TOKEN")]
    elif with_callbacks:
        hint = "set CALLBACK_TOKEN where LiteLLM runs on another machine"
        findings = [Finding(True, "callbacks", "taken from this machine only", hint, warning=True)]
    else:
        message = "off: spend logs are slower, and lose calls whose provider repeats an id, which then stay overdue"
        findings = [Finding(True, "callbacks", message, "set CALLBACK_TOKEN, also in LiteLLM", warning=True)]
    return [*findings, _check_spend_logs(settings)]


def _check_spend_logs(settings: Settings) -> Finding:
    if settings.litellm_url is None or settings.litellm_api_key is None:
        hint = "set LITELLM_URL and LITELLM_API_KEY: callbacks that LiteLLM drops are found there"
        return Finding(True, "spend logs", "not asked: what callbacks lose stays overdue", hint, warning=True)
    key = settings.litellm_api_key.get_secret_value()
    try:
        with SpendLogs(settings.litellm_url, key, stop=threading.Event()) as logs:
            trouble = logs.reachable()
    except TailerError as error:
        return Finding(False, "spend logs", error.message, error.hint)
    if trouble is None:
        return Finding(True, "spend logs", f"{settings.litellm_url} answers")
    message, _, hint = trouble.partition("\n  -> ")
    return Finding(False, "spend logs", message, hint or "look at LITELLM_URL and LITELLM_API_KEY")


def _check_free_models(settings: Settings, dsn: str) -> list[Finding]:
    """A pattern that matches nothing may be a typo: then a free model's calls are held."""
    if not settings.free_models:
        return []
    try:
        seen = models_seen(dsn, settings.db_schema)
    except TailerError:
        return []  # the database's own findings say why
    unused = [glob for glob in settings.free_models if not any(fnmatchcase(name, glob) for name in seen)]
    if not seen or not unused:
        return [Finding(True, "free models", f"{len(settings.free_models)} patterns")]
    hint = "compare FREE_MODELS with the models of `billing-tailer exceptions list --kind held_zero_cost`"
    return [Finding(True, "free models", f"matching nothing seen so far: {', '.join(unused)}", hint, warning=True)]
