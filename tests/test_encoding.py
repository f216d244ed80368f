"""A database whose encoding is not UTF8: everything that opens it says so, and touches nothing.

In SQL_ASCII, which a cluster has that was made without a locale, text comes back as bytes, and nothing equals what was
written; in any other encoding a client's header is a row that cannot be stored.
"""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.support import database
from tests.support.verbs import Verb, run_verb


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def other(admin_dsn: str, encoding: str) -> Iterator[str]:
    """The DSN of an empty database with that encoding."""
    name = f"billing_tailer_{encoding.lower()}"
    statement = sql.SQL("create database {} template template0 encoding {} locale 'C'")
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        connection.execute(statement.format(sql.Identifier(name), sql.Literal(encoding)))
    yield database.dsn_of(admin_dsn, name)
    database.drop(admin_dsn, name)


def test_it_is_refused(verb: Verb, other: str, encoding: str) -> None:
    verb.environment(DATABASE_URL=other)
    said = f"database billing_tailer_{encoding.lower()} has encoding {encoding}, and it must be UTF8"
    for arguments in (["migrate"], ["migrate", "--wait-seconds", "60"], ["status"]):
        verb(*arguments, code=2)
        assert said in verb.stderr
        assert "ENCODING 'UTF8'" in verb.stderr, "no next step"
    (found,) = [one for one in verb.json("check", code=1) if one["topic"] == "database"]
    assert not found["ok"]
    assert said in found["message"]
    with psycopg.connect(other) as connection:
        assert connection.execute("select to_regnamespace('billing') is null").fetchone() == (True,)


@pytest.mark.parametrize("encoding", ["SQL_ASCII"])
def test_the_daemon_does_not_start(other: str, encoding: str, log: Path) -> None:
    log.write_bytes(b"")
    settings = {"AUDIT_GLOBS": f"{log.parent}/*", "DATABASE_URL": other, "COST_SOURCE": "header", "HTTP_PORT": "0"}
    for more in ({}, {"MIGRATE_DATABASE_URL": other}):
        found = run_verb({f"BILLING_TAILER_{name}": value for name, value in (settings | more).items()}, "run")
        assert found.returncode == 2, found.stdout + found.stderr
        assert f"has encoding {encoding}, and it must be UTF8" in found.stderr
