"""Postgres: can it be reached, as whom, is the schema this program's, are the grants those of a daemon; and what its
tables say about the rest of the installation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from threading import Event

from billing_tailer import configured
from billing_tailer.checks.finding import Finding, collected, failed, fine, warned
from billing_tailer.errors import LedgerUnavailable, TailerError
from billing_tailer.files import LogFiles
from billing_tailer.ledger import Probe, migrations, probing
from billing_tailer.litellm import SpendLogs
from billing_tailer.model import FileState, Position, SeenFile
from billing_tailer.settings import Settings, effective
from billing_tailer.spool import is_spool_file

CLOCK_SECONDS_MAX = 2.0
STORED_WITHIN = timedelta(days=1)
STORED_AFTER = timedelta(minutes=5)
"""LiteLLM writes its rows up to so long after the call."""

_UNREACHABLE = (
    ("resolve|translate host name|not known", "the host's name is not known here", "correct the host in {dsn}, or DNS"),
    ("refused", "nothing listens there", "start Postgres, or correct host and port of {dsn}"),
    ("timeout|timed out", "no answer", "look at the network and at firewalls, or correct the host of {dsn}"),
    ("unreachable|No route", "no way there", "look at the network, or correct the host of {dsn}"),
    ("No such file", "no such socket", "start Postgres, or correct the directory of the socket in {dsn}"),
    ("password|no pg_hba.conf entry|authentication", "the login is refused", "correct user and password in {dsn}"),
    (
        "role .* does not exist",
        "there is no such role",
        "create it with the grants of deploy/postgres/grants.sql, or correct {dsn}",
    ),
    ("database .* does not exist", "there is no such database", "create it, or correct the database's name in {dsn}"),
    ("too many|remaining connection slots", "no connection is free", "raise max_connections, or close others"),
    ("starting up|shutting down|recovery", "not ready", "wait for it, and run this again"),
    ("SSL|certificate", "TLS fails", "correct sslmode and the certificates of {dsn}"),
)
"""libpq's and the server's words, what they mean, and the next step."""


def check_database(settings: Settings) -> Iterator[Finding]:
    """Everything that one connection can tell."""
    with _probing(settings) as probe:
        server = probe.server()
        login = "" if server.login == server.role else f", logged in as {server.login}"
        name = f"database {server.database} as role {server.role}{login}"
        yield fine("database", f"Postgres {server.server_version}, {name}")
        for topic, findings in (
            ("schema", _check_schema(settings, probe)),
            ("grants", _check_grants(probe, server.role)),
            ("receipts", _check_money(settings, probe, server.role)),
            ("pooling", _check_pooling(probe)),
            ("clock", _check_clock(probe)),
            ("collation", _check_collation(probe)),
        ):
            yield from collected(topic, findings)
        if _has_tables(probe):
            yield from collected("SOURCE_ID", _check_source_id(settings, probe))
            yield from collected("free models", _check_free_models(settings, probe))
            yield from collected("spend logs", _check_stored(settings, probe))


@contextmanager
def _probing(settings: Settings) -> Iterator[Probe]:
    """Raises TailerError that says why not, in Postgres' words and in ours."""
    with configured.database_for_verbs(settings) as dsn:
        try:
            connection = probing(dsn, settings.db_schema)
            probe = connection.__enter__()
        except LedgerUnavailable as error:
            shown = f"BILLING_TAILER_DATABASE_URL, {effective(settings)['database_url']}"
            what, hint = meaning(error.message) or ("cannot be reached", "look at Postgres and at {dsn}")
            raise TailerError(f"{what}: {error.message}", hint.format(dsn=shown)) from error
        try:
            yield probe
        finally:
            connection.__exit__(None, None, None)


def meaning(message: str) -> tuple[str, str] | None:
    """What libpq's or the server's words mean, and the next step with a place for the DSN; None of others."""
    return next(((what, hint) for pattern, what, hint in _UNREACHABLE if re.search(pattern, message)), None)


def _check_schema(settings: Settings, probe: Probe) -> Iterator[Finding]:
    version, latest = probe.schema_version(), migrations()[-1].version
    what = f"{settings.db_schema} is at version {version}, this program needs {latest}"
    if version == latest:
        yield fine("schema", what)
    elif not version:
        hint = "run `billing-tailer migrate` with the owner's DSN in BILLING_TAILER_MIGRATE_DATABASE_URL"
        yield failed("schema", f"{what}: it is not there yet", hint)
    else:
        yield failed("schema", what, "run `billing-tailer migrate`, then grant again")


def _has_tables(probe: Probe) -> bool:
    try:
        return probe.schema_version() > 0
    except TailerError:
        return False  # as said of the schema


def _check_grants(probe: Probe, role: str) -> Iterator[Finding]:
    missing, excess = probe.missing_grants(), probe.excess_grants()
    if missing:
        yield failed(
            "grants",
            "missing: " + ", ".join(missing),
            f"as the owner of the schema, run deploy/postgres/grants.sql with -v daemon={role}",
        )
    else:
        yield fine("grants", "all there")
    if excess and not probe.may_change_money():  # else that is said, and these go with it
        hint = f"revoke them from {role}: receipts follow from these rows"
        yield warned("grants", "more than the daemon needs: " + ", ".join(excess), hint)


def _check_money(settings: Settings, probe: Probe, role: str) -> Iterator[Finding]:
    if not probe.may_change_money():
        return
    what = f"role {role} may change or delete receipts, which are to be append-only"
    hint = "give the daemon a role of its own with the grants of deploy/postgres/grants.sql"
    if settings.uses_embedded_postgres:
        yield warned("receipts", f"{what}; the embedded Postgres has one role for all", hint)
    else:
        yield failed("receipts", what, hint)


def _check_pooling(probe: Probe) -> Iterator[Finding]:
    if probe.shares_sessions():
        hint = "point BILLING_TAILER_DATABASE_URL at Postgres itself, or at a pool in session mode"
        yield failed("pooling", "statements of one session run in several: it pools per transaction", hint)


def _check_clock(probe: Probe) -> Iterator[Finding]:
    ahead = probe.clock_skew_seconds()
    what = f"{abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} Postgres"
    if abs(ahead) > CLOCK_SECONDS_MAX:
        yield failed("clock", what, "synchronise the clocks (NTP) of this machine and of Postgres")
    else:
        yield fine("clock", what)


def _check_collation(probe: Probe) -> Iterator[Finding]:
    if not probe.compares_bytes():
        what = (
            "texts are compared by a language's rules: each line costs Postgres a third more, and the unique keys hold "
            "only as long as the system's libraries keep these rules"
        )
        hint = "make the next database with LC_COLLATE 'C' (docs/operating.md); REINDEX this one after a system upgrade"
        yield warned("collation", what, hint)


# --- what the tables say


def _check_source_id(settings: Settings, probe: Probe) -> Iterator[Finding]:
    """Files recorded under this id, of which none is in sight: another volume's, or nothing is mounted."""
    recorded = [
        one
        for one in probe.positions(settings.source_id)
        if one.state in (FileState.LIVE, FileState.ROTATED) and one.committed_offset and not is_spool_file(one.path)
    ]
    if not recorded:
        return
    files = LogFiles(settings.audit_globs, settings.open_files_max)
    try:
        seen = files.scan({one.locator for one in recorded}).files
        if not seen or any(_is_one_of(files, file, recorded) for file in seen):
            return  # that nothing is there is said of the volume
    finally:
        files.close()
    what = f"{settings.source_id} has {len(recorded)} files recorded, such as {recorded[-1].path}, and none is here"
    hint = "give every proxy's volume its own BILLING_TAILER_SOURCE_ID, or mount the same volume"
    yield failed("SOURCE_ID", what, hint)


def _is_one_of(files: LogFiles, file: SeenFile, recorded: list[Position]) -> bool:
    head = files.head(file)
    return any(head.startswith(one.head) or file.locator == one.locator for one in recorded)


def _check_free_models(settings: Settings, probe: Probe) -> Iterator[Finding]:
    """A pattern that matches nothing may be a typo: then a free model's calls are held."""
    if not settings.free_models:
        return
    seen = probe.models_seen()
    unused = [glob for glob in settings.free_models if not any(fnmatchcase(name, glob) for name in seen)]
    if not seen or not unused:
        yield fine("free models", f"{len(settings.free_models)} patterns")
        return
    hint = "compare FREE_MODELS with the models of `billing-tailer exceptions list --kind held_zero_cost`"
    yield warned("free models", f"matching nothing seen so far: {', '.join(unused)}", hint)


def _check_stored(settings: Settings, probe: Probe) -> Iterator[Finding]:
    """Callbacks came, and LiteLLM has no row of that time: it may be told not to store any."""
    if settings.cost_source == "header" or settings.litellm_url is None or settings.litellm_api_key is None:
        return
    end = datetime.now(UTC) - STORED_AFTER
    start = end - STORED_WITHIN
    callbacks = probe.callbacks_between(start, end)
    if not callbacks:
        return
    try:
        with SpendLogs(settings.litellm_url, settings.litellm_api_key.get_secret_value(), stop=Event()) as logs:
            stored = logs.stored_between(start, end + STORED_AFTER)
    except TailerError:
        return  # that it does not answer is said of the spend logs themselves
    if not stored:
        what = f"LiteLLM has no row of the last day, though {callbacks} callbacks came: it does not store spend logs"
        hint = "remove disable_spend_logs from LiteLLM's general_settings: what callbacks lose stays overdue otherwise"
        yield failed("spend logs", what, hint)
