"""Databases for tests: one template with the schema per session, one clone per test."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from billing_tailer.embedded import find_binaries
from tests.support.daemon import ROOT, clean_environment


def create(admin_dsn: str, template: str | None = None, prefix: str = "test") -> str:
    """Creates a database with a fresh name, as a clone of `template` if given, and returns its name."""
    name = f"billing_tailer_{prefix}_{secrets.token_hex(6)}"
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
        sql.Identifier(name), sql.Identifier(template or "template0")
    )
    if template is None:  # a server that was set up without a locale has SQL_ASCII
        statement += sql.SQL(" ENCODING 'UTF8'")
    _execute(admin_dsn, statement)
    return name


def drop(admin_dsn: str, name: str) -> None:
    """Drops a database and ends its connections."""
    _execute(admin_dsn, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def dsn_of(admin_dsn: str, name: str) -> str:
    """`admin_dsn` with another database."""
    return make_conninfo(admin_dsn, dbname=name)


def psql() -> str:
    """The program, of the Postgres that the tests run."""
    given = os.environ.get("BILLING_TAILER_POSTGRES_BIN")
    beside = find_binaries(Path(given) if given else None) / "psql"
    found = str(beside) if beside.is_file() else shutil.which("psql")
    assert found is not None, "there is no psql, neither beside Postgres nor on PATH"
    return found


def run_script(dsn: str, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of deploy/ with psql."""
    command = [psql(), dsn, "--no-psqlrc", "--quiet", "--file", str(ROOT / "deploy" / script)]
    command += [f"--set={name}={value}" for name, value in variables.items()]
    return subprocess.run(command, env=clean_environment({}), text=True, capture_output=True, timeout=60, check=False)


def grant(dsn: str, schema: str = "billing", **roles: str) -> None:
    """deploy/postgres/grants.sql. dsn: the owner's; roles: owner, daemon, readonly."""
    done = run_script(dsn, "postgres/grants.sql", schema=schema, **roles)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@dataclass(frozen=True)
class Roles:
    """Roles of a server that tests share, which may log in and have no rights of their own."""

    daemon: str
    readonly: str

    def dsn(self, role: str, dsn: str) -> str:
        """The DSN of one of them."""
        return make_conninfo(dsn, user=role, password="x")


@contextmanager
def roles(admin_dsn: str) -> Iterator[Roles]:
    """Makes the roles; their grants must be gone with their databases at the end."""
    made = Roles(*(f"billing_tailer_{part}_{secrets.token_hex(6)}" for part in ("daemon", "readonly")))
    for role in (made.daemon, made.readonly):
        _execute(admin_dsn, sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(role)))
    try:
        yield made
    finally:
        for role in (made.daemon, made.readonly):
            _execute(admin_dsn, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@contextmanager
def temporary(admin_dsn: str, template: str | None = None) -> Iterator[str]:
    """The DSN of a database that is dropped at the end."""
    name = create(admin_dsn, template)
    try:
        yield dsn_of(admin_dsn, name)
    finally:
        drop(admin_dsn, name)


def _execute(admin_dsn: str, statement: sql.Composed) -> None:
    with psycopg.connect(admin_dsn, autocommit=True, connect_timeout=10) as connection:
        connection.execute(statement)
