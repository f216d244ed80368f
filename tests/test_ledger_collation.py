"""How the database compares texts: by bytes, or by a language's rules, which `check` warns of."""

import re
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from billing_tailer import ledger
from tests.support import database
from tests.support.daemon import ROOT
from tests.support.proof import rows
from tests.support.verbs import Verb


@pytest.fixture
def english(admin_dsn: str) -> Iterator[str]:
    """The DSN of an empty database that compares as in English."""
    if not rows(admin_dsn, "select from pg_collation where collname = 'en-US-x-icu'"):
        pytest.skip("this Postgres has no ICU: no language to compare by (.ci/run repeats it on Debian's)")
    name = f"billing_tailer_english_{secrets.token_hex(4)}"
    statement = sql.SQL("create database {} template template0 encoding 'UTF8' locale 'C' locale_provider icu {}")
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        connection.execute(statement.format(sql.Identifier(name), sql.SQL("icu_locale 'en-US'")))
    yield database.dsn_of(admin_dsn, name)
    database.drop(admin_dsn, name)


def found(verb: Verb) -> list[dict[str, object]]:
    return [one for one in verb.json("check", code=1) if one["topic"] == "collation"]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("docs/operating.md", r"create database billing owner billing_owner (.+);"),
        ("deploy/postgres/init.sh", r"create database %I (.+)', :'name'"),
    ],
)
def test_ours_compare_bytes(verb: Verb, admin_dsn: str, file: str, pattern: str) -> None:
    """Whatever the server was set up with."""
    (options,) = re.findall(pattern, (ROOT / file).read_text())
    options = options.replace("''", "'")
    assert "lc_collate 'C'" in options
    name = f"billing_tailer_bytes_{secrets.token_hex(4)}"
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        connection.execute(f"create database {name} {options}".encode())
    try:
        verb.environment(DATABASE_URL=database.dsn_of(admin_dsn, name))
        assert found(verb) == []
    finally:
        database.drop(admin_dsn, name)


def test_a_language_is_warned_of(verb: Verb, english: str) -> None:
    ledger.migrate(english)
    verb.environment(DATABASE_URL=english)
    (one,) = found(verb)
    assert (one["ok"], one["warning"]) == (True, True)
    assert "LC_COLLATE 'C'" in str(one["hint"])
