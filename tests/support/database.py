"""Databases for tests: one template with the schema per session, one clone per test."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.daemon import ROOT


def create(admin_dsn: str, template: str | None = None, prefix: str = "test") -> str:
    """Creates a database with a fresh name, as a clone of `template` if given, and returns its name."""
    name = f"billing_tailer_{prefix}_{secrets.token_hex(6)}"
    statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if template is not None:
        statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
    _execute(admin_dsn, statement)
    return name


def drop(admin_dsn: str, name: str) -> None:
    """Drops a database and ends its connections."""
    _execute(admin_dsn, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def dsn_of(admin_dsn: str, name: str) -> str:
    """`admin_dsn` with another database."""
    return make_conninfo(admin_dsn, dbname=name)


def grants() -> str:
    """The SQL of docs/operating.md that gives the daemon's role, `tailer`, what it needs."""
    (block,) = re.findall(
        r"^```sql\n(grant .*?)^```", (ROOT / "docs/operating.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(block)


@contextmanager
def daemon_role(dsn: str) -> Iterator[str]:
    """The DSN of a role with those grants. dsn: the owner's."""
    role = f"tailer_{secrets.token_hex(6)}"
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(f"create role {role}".encode())
        try:
            owner.execute(re.sub(r"\btailer\b", role, grants()).encode())
            yield make_conninfo(dsn, options=f"-c role={role}")
        finally:
            owner.execute(f"drop owned by {role}".encode())
            owner.execute(f"drop role {role}".encode())


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
