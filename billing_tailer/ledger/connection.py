"""Connections to Postgres and the border where psycopg's errors become ours.

Nothing outside this package sees a psycopg exception: `wrapped` sorts them into what the caller can do about them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString, TypeAlias

import psycopg
from psycopg import errors as pg
from psycopg import sql

from billing_tailer.errors import ConfigError, LedgerUnavailable, Overlap, PositionMoved, RowRejected, TailerError
from billing_tailer.ledger import arrays
from billing_tailer.ledger.sqlfile import QUERIES, Migration, migrations

CONNECT_TIMEOUT_SECONDS = 3
STATEMENT_TIMEOUT_SECONDS = 10
TCP_USER_TIMEOUT_SECONDS = 10

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

_TRANSIENT = (
    pg.OperationalError,  # includes admin shutdown, serialization, deadlock, disk full, too many connections, time-outs
    pg.InterfaceError,
    pg.InternalError,
)


@contextmanager
def wrapped() -> Iterator[None]:
    """Turn psycopg's exceptions into domain errors."""
    try:
        yield
    except pg.UniqueViolation as error:
        if (error.diag.table_name or "").startswith(("tail_", "log_")):
            raise PositionMoved(_first_line(error)) from error
        raise Overlap(_first_line(error)) from error
    except pg.InsufficientPrivilege as error:
        raise ConfigError(
            f"Postgres: {_first_line(error)}", "grant the daemon's role what `billing-tailer check` lists"
        ) from error
    except (pg.DataError, pg.CheckViolation, pg.NotNullViolation, pg.ProgramLimitExceeded) as error:
        raise RowRejected(_first_line(error)) from error
    except _TRANSIENT as error:
        hint = "look at Postgres; the daemon tries again by itself, a verb is to be run again"
        raise LedgerUnavailable(_first_line(error), hint) from error
    except psycopg.Error as error:
        raise TailerError(
            f"Postgres: {_first_line(error)}", "is the schema the one of this version? run `billing-tailer check`"
        ) from error


def reason_of(error: BaseException) -> str:
    """A short label for a failure: the SQLSTATE's name, or `connection`."""
    cause = error.__cause__
    state = getattr(cause, "sqlstate", None)
    if state is None:
        return "connection"
    name = type(cause).__name__
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def connect(dsn: str, schema: str, *, application_name: str = "billing_tailer") -> Connection:
    """A connection with our time-outs and search path. Raises LedgerUnavailable or ConfigError.

    What psycopg prepares is planned each time it is asked: a plan for all values, made while a table was small, would
    read all of it until autovacuum has looked at it again.
    """
    try:
        psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise ConfigError(
            f"BILLING_TAILER_DATABASE_URL: {_first_line(error)}",
            "write it as postgresql://user:password@host:5432/database, or as key=value pairs",
        ) from None
    _refuse_what_libpq_refuses(dsn)
    with wrapped():
        connection: Connection = psycopg.connect(
            dsn,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            tcp_user_timeout=TCP_USER_TIMEOUT_SECONDS * 1000,
            keepalives_idle=5,
            keepalives_interval=2,
            keepalives_count=3,
            application_name=application_name,
        )
        arrays.register(connection)
        try:
            connection.execute(
                "select set_config('search_path', %s, false), set_config('statement_timeout', %s, false), "
                "set_config('timezone', 'UTC', false), set_config('plan_cache_mode', 'force_custom_plan', false)",
                (_quoted(connection, schema), f"{STATEMENT_TIMEOUT_SECONDS}s"),
            )
            _require_utf8(connection)
        except (psycopg.Error, ConfigError):
            connection.close()
            raise
    return connection


def _require_utf8(connection: Connection) -> None:
    """Text of another encoding comes back as bytes (SQL_ASCII), or cannot hold what clients send (all others)."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in ("UTF8", None):
        raise ConfigError(
            f"Postgres: database {connection.info.dbname} has encoding {encoding}, and it must be UTF8",
            "make a database for this: CREATE DATABASE billing TEMPLATE template0 ENCODING 'UTF8'",
        )


def _quoted(connection: Connection, schema: str) -> str:
    return sql.Identifier(schema).as_string(connection)


def _refuse_what_libpq_refuses(dsn: str) -> None:
    """A value such as `sslmode=perhaps` fails before anything is sent, and always will: it is no outage."""
    attempt = psycopg.pq.PGconn.connect_start(dsn.encode())
    refused = attempt.status == psycopg.pq.ConnStatus.BAD and attempt.error_message.decode(errors="replace")
    attempt.finish()
    if refused and refused.startswith("invalid "):
        raise ConfigError(f"BILLING_TAILER_DATABASE_URL: {refused.strip()}", "correct the DSN; libpq's manual lists it")


def lock_key(purpose: str, schema: str, name: str = "") -> int:
    """The 64-bit key of an advisory lock."""
    digest = hashlib.sha256(f"billing_tailer/{purpose}/{schema}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def migrate(dsn: str, schema: str = "billing", *, dry_run: bool = False) -> list[str]:
    """Apply the migrations that are missing; returns their names. Needs the owner's role. dry_run: roll them back.

    The lock is taken before CREATE SCHEMA, which is not safe against itself.
    """
    with connect(dsn, schema) as connection, wrapped(), connection.transaction(force_rollback=dry_run):
        connection.execute("set local statement_timeout = 0")
        connection.execute("select pg_advisory_xact_lock(%s)", (lock_key("migrate", schema),))
        try:
            missing = _apply(connection, schema)
        except pg.InsufficientPrivilege as error:
            raise ConfigError(
                f"role {connection.info.user} may not migrate schema {schema}: {_first_line(error)}",
                "set BILLING_TAILER_MIGRATE_DATABASE_URL to the DSN of the role that owns the schema",
            ) from error
    return [migration.name for migration in missing]


def _apply(connection: Connection, schema: str) -> list[Migration]:
    """Apply what is missing; returns it."""
    if connection.execute("select to_regnamespace(%s)", (_quoted(connection, schema),)).fetchone() == (None,):
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    connection.execute(
        "create table if not exists schema_migrations "
        "(version integer primary key, name text not null, sha256 text not null, "
        "applied_at timestamptz not null default now())"
    )
    missing = unapplied(connection, schema)
    for migration in missing:
        connection.execute(migration.text)
        connection.execute(
            "insert into schema_migrations (version, name, sha256) values (%s, %s, %s)",
            (migration.version, migration.name, migration.sha256),
        )
    return missing


def require_schema(connection: Connection, schema: str) -> None:
    """Raise ConfigError unless the schema is exactly the one of this program, and may be used."""
    require_usage(connection, schema)
    with wrapped():
        version = schema_version(connection)
        missing = unapplied(connection, schema) if version else migrations()
    if missing:
        raise ConfigError(
            f"schema {schema} is at version {version}, this program needs {missing[-1].version}",
            "run `billing-tailer migrate` with BILLING_TAILER_MIGRATE_DATABASE_URL set to the owner's DSN",
        )


def require_usage(connection: Connection, schema: str) -> None:
    """Raise ConfigError where the schema is there, but closed to our role."""
    with wrapped():
        row = connection.execute(query("may_not_use_schema"), {"schema": schema}).fetchone()
    assert row is not None
    closed, role = row
    if closed:
        raise ConfigError(f"role {role} may not use schema {schema}", f"grant usage on schema {schema} to {role}")


def schema_version(connection: Connection) -> int:
    """The newest applied migration; 0 without a schema."""
    if connection.execute("select to_regclass('schema_migrations')").fetchone() == (None,):
        return 0
    row = connection.execute("select coalesce(max(version), 0) from schema_migrations").fetchone()
    assert row is not None
    return int(row[0])


def unapplied(connection: Connection, schema: str) -> list[Migration]:
    """The migrations that are not applied yet. Raises ConfigError where others were, or others than ours."""
    applied: dict[int, str] = dict(connection.execute("select version, sha256 from schema_migrations").fetchall())
    ours = {migration.version: migration for migration in migrations()}
    newest = max(applied, default=0)
    if newest > max(ours):
        raise ConfigError(
            f"schema {schema} is at version {newest}, newer than this program's {max(ours)}",
            "run the newer billing_tailer",
        )
    for version, digest in applied.items():
        if ours[version].sha256 != digest:
            raise ConfigError(
                f"schema {schema}: migration {ours[version].name} is not the one that was applied",
                "run the version of billing_tailer that applied it, or restore that file",
            )
    return [migration for migration in ours.values() if migration.version not in applied]


def may_change_money(connection: Connection, schema: str) -> bool:
    """Whether our role may change or delete receipts, their details or adjustments, or may become the role that can."""
    with wrapped():
        row = connection.execute(query("may_change_money"), {"schema": schema}).fetchone()
    return row == (True,)


def query(name: str) -> LiteralString:
    """A named statement of queries.sql."""
    return QUERIES[name]
