"""Fixtures of all tests: a real Postgres, a database per test, directories that every user may enter.

Postgres comes from `BILLING_TAILER_TEST_DATABASE_URL` (a superuser's DSN), else it is an embedded one in a temporary
directory, from `BILLING_TAILER_POSTGRES_BIN` if that is set.
"""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.events import configure_logging
from tests.support import database
from tests.support.verbs import Verb
from tests.torture.table import TALLIES, table

# how long an example takes says more of what else the machine does than of the code
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _quiet_log() -> None:
    """Errors only, to the session's own standard output: a test that sets up another log leaves it with that test's
    captured output, which is closed by then."""
    configure_logging("error", "json")


@pytest.fixture(scope="session")
def session_dir() -> Iterator[Path]:
    """A directory that every user may enter: pytest's own are closed to `nobody`, who runs Postgres for root."""
    path = Path(tempfile.mkdtemp(prefix="billing-tailer-tests-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def open_dir(session_dir: Path) -> Iterator[Path]:
    """As `session_dir`, but for one test."""
    path = Path(tempfile.mkdtemp(prefix="test-", dir=session_dir))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def admin_dsn(session_dir: Path) -> Iterator[str]:
    """The DSN of a superuser, on a server that all tests of the session share."""
    given = os.environ.get("BILLING_TAILER_TEST_DATABASE_URL")
    if given:
        yield given
        return
    bin_dir = os.environ.get("BILLING_TAILER_POSTGRES_BIN")
    server = EmbeddedPostgres(session_dir / "postgres", Path(bin_dir) if bin_dir else None)
    with server:
        yield server.dsn


@pytest.fixture(scope="session")
def roles(admin_dsn: str) -> Iterator[database.Roles]:
    """The roles of deploy/postgres/grants.sql, with its grants in every database that has the schema."""
    with database.roles(admin_dsn) as made:
        yield made


@pytest.fixture(scope="session")
def template_database(admin_dsn: str, roles: database.Roles) -> Iterator[str]:
    """The name of a database that has the schema, with its grants, and no rows."""
    from billing_tailer import ledger

    name = database.create(admin_dsn, prefix="template")
    dsn = database.dsn_of(admin_dsn, name)
    try:
        ledger.migrate(dsn)
        with psycopg.connect(dsn) as owner:
            database.grant(dsn, owner=owner.info.user, daemon=roles.daemon, readonly=roles.readonly)
        yield name
    finally:
        database.drop(admin_dsn, name)


@pytest.fixture
def dsn(admin_dsn: str, template_database: str) -> Iterator[str]:
    """The DSN of a database of the test's own, with the schema and no rows."""
    with database.temporary(admin_dsn, template_database) as own:
        yield own


@pytest.fixture
def daemon_dsn(dsn: str, roles: database.Roles) -> str:
    """As `dsn`, with a role that has the daemon's grants of deploy/postgres/grants.sql and no more."""
    return roles.dsn(roles.daemon, dsn)


@pytest.fixture
def empty_dsn(admin_dsn: str) -> Iterator[str]:
    """The DSN of a database of the test's own, without the schema."""
    with database.temporary(admin_dsn) as own:
        yield own


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log file of a volume of its own, not written yet."""
    volume = tmp_path / "billing"
    volume.mkdir()
    return volume / "audit.jsonl"


@pytest.fixture
def verb(daemon_dsn: str, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Verbs on the test's database and volume, with the daemon's role: an operator needs no other one but for `prune`
    and `migrate`."""
    verb = Verb(monkeypatch, capsys)
    verb.environment(
        AUDIT_GLOBS=f"{log.parent}/audit*.jsonl*", DATABASE_URL=daemon_dsn, CALLBACK_TOKEN="0123456789abcdef" * 2
    )
    return verb


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under BILLING_TAILER_TEST_REQUIRE_E2E=1 (CI) a skipped end-to-end test is a failed one."""
    report = yield
    required = os.environ.get("BILLING_TAILER_TEST_REQUIRE_E2E") == "1"
    if required and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("e2e"):
        report.outcome = "failed"
        report.longrepr = (
            f"BILLING_TAILER_TEST_REQUIRE_E2E=1, but {item.nodeid} was skipped: {_reason(report.longrepr)}"
        )
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tortured (tests/torture), as the table that `make torture` prints."""
    if TALLIES:
        terminalreporter.section("torture")
        terminalreporter.write_line(table(TALLIES))


def _reason(longrepr: Any) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
