"""`check`: everything that is wrong with an installation, at once, each with the next step.

A check that breaks off becomes a finding of its own, so that nothing hides anything else
(tests/test_checks.py::test_everything_is_broken_at_once). Nothing is written, neither to a file nor to Postgres.
"""

from billing_tailer.checks.costs import check_callbacks, check_sources, check_spend_logs, check_spool
from billing_tailer.checks.database import check_database
from billing_tailer.checks.finding import Finding, collected
from billing_tailer.checks.logs import check_logs
from billing_tailer.checks.volume import check_volume
from billing_tailer.settings import Settings

__all__ = ["Finding", "run_checks"]


def run_checks(settings: Settings) -> list[Finding]:
    """Look at the log volume, the logs' format, the database and the sources of costs."""
    return [
        *collected("log volume", check_volume(settings)),
        *collected("log format", check_logs(settings)),
        *collected("database", check_database(settings)),
        *collected("cost source", check_sources(settings)),
        *collected("callbacks", check_callbacks(settings)),
        *collected("spool", check_spool(settings)),
        *collected("spend logs", check_spend_logs(settings)),
    ]
