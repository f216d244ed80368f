"""What settings mean to more than one room: which database is meant, and the rules about money.

Apart from `app`, so that a verb does not load the daemon's rooms (HTTP, metrics) to ask Postgres one question.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from billing_tailer.embedded import EmbeddedPostgres, attach, default_data_dir
from billing_tailer.errors import ConfigError
from billing_tailer.ledger import Reports, migrate, reports
from billing_tailer.model import Corrections
from billing_tailer.settings import Settings
from billing_tailer.settle import Rules


def rules(settings: Settings) -> Rules:
    """What decides about money, as configured."""
    return Rules(
        markup=settings.markup_factor,
        free_models=settings.free_models,
        corrections=Corrections(settings.corrections),
        trust_litellm_end_user=settings.trust_litellm_end_user,
        header_cost_max_usd=settings.cost_max_usd if settings.cost_source == "header" else None,
    )


def spool_directory(settings: Settings) -> Path | None:
    """Where callbacks wait for Postgres; None where nobody may send any."""
    if settings.callback_token is None and settings.spool_dir is None:
        return None
    return settings.spool_dir or (settings.data_dir or default_data_dir(os.environ)) / "spool"


def given_dsn(settings: Settings) -> str:
    """DATABASE_URL. Raises ConfigError where only the owner's DSN is set."""
    if settings.database_url is None:
        raise ConfigError(
            "BILLING_TAILER_MIGRATE_DATABASE_URL is set, but BILLING_TAILER_DATABASE_URL is not",
            "set both: the first with the owner's role, the second with the daemon's",
        )
    return settings.database_url.get_secret_value()


@contextmanager
def database_for_verbs(settings: Settings) -> Iterator[str]:
    """The DSN for a verb: the one given, else that of a running daemon's embedded Postgres, else a started one."""
    if not settings.uses_embedded_postgres:
        yield given_dsn(settings)
        return
    data_dir = settings.data_dir or default_data_dir(os.environ)
    running = attach(data_dir)
    if running is not None:
        yield running
        return
    with EmbeddedPostgres(data_dir, settings.postgres_bin) as postgres:
        migrate(postgres.dsn, settings.db_schema)
        yield postgres.dsn


@contextmanager
def reports_for_verbs(settings: Settings) -> Iterator[Reports]:
    """The source's positions, letters and counts. Raises LedgerUnavailable, or ConfigError where the schema is not this
    program's."""
    with (
        database_for_verbs(settings) as dsn,
        reports(dsn, settings.db_schema, settings.source_id) as ledger,
    ):
        yield ledger
