"""deploy/postgres/grants.sql: what each role may do to each table is what the daemon's statements do, and no more."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from billing_tailer.ledger import migrate, probing
from billing_tailer.ledger.sqlfile import QUERIES
from tests.support import database
from tests.support.daemon import ROOT, Daemon
from tests.support.follow import following
from tests.support.loglines import lines
from tests.support.proof import count, outcomes, rows
from tests.support.spendlines import payload, spool_line
from tests.support.verbs import Verb

WRITES = ("INSERT", "UPDATE", "DELETE")
BYTES = {("tail_files", "head"), ("dead_letters", "raw")}
"""Bytes of log lines: not for everybody who may read."""


class May(NamedTuple):
    """A privilege on a table; on one column only for UPDATE, and for reading a table that has bytes of lines."""

    privilege: str
    table: str
    column: str | None = None


def tables(dsn: str) -> dict[str, list[str]]:
    """Every table of the schema, with its columns."""
    found = rows(
        dsn,
        "select c.relname::text as name, array_agg(a.attname::text order by attnum) as columns from pg_class c "
        "join pg_attribute a on a.attrelid = c.oid and attnum > 0 and not attisdropped "
        "where relnamespace = 'billing'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f') group by 1",
    )
    return {row["name"]: row["columns"] for row in found}


def held(dsn: str, role: str) -> set[May]:
    """What a role may do to tables, and to columns of those of which it may not do it to all."""
    found = rows(
        dsn,
        """
        select privilege, c.relname::text as relation, null as attribute
        from pg_class c,
             unnest(array['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) privilege
        where relnamespace = 'billing'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f')
          and has_table_privilege(%s, c.oid, privilege)
        union all
        select privilege, c.relname::text, a.attname::text
        from pg_class c join pg_attribute a on a.attrelid = c.oid and attnum > 0 and not attisdropped,
             unnest(array['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) privilege
        where relnamespace = 'billing'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f')
          and not has_table_privilege(%s, c.oid, privilege) and has_column_privilege(%s, c.oid, a.attnum, privilege)
        """,
        role,
        role,
        role,
    )
    return {May(row["privilege"], row["relation"], row["attribute"]) for row in found}


# --- the one source: the daemon's statements ------------------------------------------------------------------------


def written() -> set[May]:
    """What the statements of the ledger change, but for those of `prune`, which is the owner's."""
    prune = set(re.findall(r'query\("(\w+)"\)', (ROOT / "billing_tailer/ledger/pruning.py").read_text()))
    found = {may for name, text in QUERIES.items() if name not in prune for may in changes(text)}
    return {may for may in found if may.table != "staged_facts"}  # temporary


def changes(statement: str) -> Iterator[May]:
    """Parsed by form: one statement each, as queries.sql is written."""
    for verb, name in re.findall(r"^\s*(insert into|copy|delete from) (\w+)", statement, re.MULTILINE):
        yield May("DELETE" if verb == "delete from" else "INSERT", name)
    for name, settings in re.findall(
        r"^\s*update (\w+)(?: \w+)?\s+set (.*?)\s(?:where|from)\b",
        _without_parentheses(statement),
        re.MULTILINE | re.DOTALL,
    ):
        for setting in settings.split(","):
            yield May("UPDATE", name, setting.split("=")[0].strip())


def _without_parentheses(text: str) -> str:
    while (shorter := re.sub(r"\([^()]*\)", "", text)) != text:
        text = shorter
    return text


def needed(dsn: str) -> set[May]:
    """What `check` asks for: everything that is missing to a role that has nothing."""
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("create role billing_tailer_nobody")
        try:
            owner.execute("grant usage on schema billing to billing_tailer_nobody")
            owner.execute("grant select (version) on billing.schema_migrations to billing_tailer_nobody")
            with probing(make_conninfo(dsn, options="-c role=billing_tailer_nobody"), "billing") as probe:
                missing = probe.missing_grants()
        finally:
            owner.execute("drop owned by billing_tailer_nobody")
            owner.execute("drop role billing_tailer_nobody")
    found = set()
    for words in missing:
        match = re.fullmatch(r"([A-Z]+)(?: \((.+)\))? on (\w+)", words)
        assert match is not None, words
        columns = match[2].split(", ") if match[2] else [None]
        found |= {May(match[1], match[3], column) for column in columns}
    return found


def test_check_asks_for_what_the_statements_need(dsn: str) -> None:
    """Of tables that Citus distributes UPDATE is on the whole table: of columns, older ones tell the shards nothing."""
    asked, tables_ = needed(dsn), tables(dsn)
    whole = {table for privilege, table, column in asked if privilege == "UPDATE" and column is None}
    assert whole == {"call_exceptions", "unsettled_facts"}
    changed = {May(may.privilege, may.table) if may.table in whole else may for may in written()}
    assert {may for may in asked if may.privilege in WRITES} == changed
    assert asked - changed == {May("SELECT", table) for table in tables_}


def test_the_daemon_may_do_what_is_needed_and_nothing_else(dsn: str, daemon_dsn: str, roles: database.Roles) -> None:
    """A new table is closed, and named here, until grants.sql says what it is for."""
    assert held(dsn, roles.daemon) == needed(dsn)
    with probing(daemon_dsn, "billing") as probe:
        assert probe.missing_grants() == []


def test_the_others(dsn: str, roles: database.Roles) -> None:
    expected = {May("SELECT", table) for table in tables(dsn)} - {May("SELECT", table) for table, _ in BYTES}
    for table in {table for table, _ in BYTES}:
        expected |= {May("SELECT", table, c) for c in tables(dsn)[table] if (table, c) not in BYTES}
    assert held(dsn, roles.readonly) == expected
    assert held(dsn, "public") == set()


def test_every_table_is_named_for_each_role(dsn: str) -> None:
    """As text: also where a table would be forgotten for both roles."""
    script = (ROOT / "deploy/postgres/grants.sql").read_text()
    for role in ("daemon", "readonly"):
        named = " ".join(re.findall(rf'^grant ([^;]+?) to :"{role}";', script, re.MULTILINE))
        assert {table for table in tables(dsn) if not re.search(rf"\b{table}\b", named)} == set()


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def owner(dsn: str) -> Iterator[Mapping[str, str]]:
    """Three roles as an administrator makes them, with names that need quotes, and the owner's DSN."""
    names = {"owner": 'Owner "x" of it', "daemon": "the daemon", "readonly": "some-reader"}
    quoted = {part: sql.Identifier(name) for part, name in names.items()}
    with psycopg.connect(dsn, autocommit=True) as admin:
        for name in quoted.values():
            admin.execute(sql.SQL("create role {}").format(name))
        admin.execute(
            sql.SQL("grant create on database {} to {}").format(sql.Identifier(admin.info.dbname), quoted["owner"])
        )
        escaped = names["owner"].replace("\\", "\\\\").replace(" ", "\\ ")
        yield {**names, "dsn": make_conninfo(dsn, options=f"-c role={escaped}")}
        for name in quoted.values():
            admin.execute(sql.SQL("drop owned by {} cascade").format(name))
            admin.execute(sql.SQL("drop role {}").format(name))


def given(owner: Mapping[str, str], schema: str = "other schema") -> dict[str, str]:
    return {"schema": schema, **{part: owner[part] for part in ("owner", "daemon", "readonly")}}


def rights(connection: psycopg.Connection[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Who may do what to the schema, its tables and their columns."""
    return connection.execute(
        "select 'schema', nspacl::text from pg_namespace where nspname = 'other schema' union all "
        "select relname, relacl::text from pg_class where relnamespace = '\"other schema\"'::regnamespace union all "
        "select relname || '.' || attname, attacl::text from pg_attribute a join pg_class c on c.oid = attrelid "
        "where relnamespace = '\"other schema\"'::regnamespace and attacl is not null order by 1, 2"
    ).fetchall()


def test_by_the_owner_again_and_again(owner: Mapping[str, str]) -> None:
    """Another schema, odd names; what was granted too much, to whomever, is taken back."""
    migrate(owner["dsn"], "other schema")
    database.grant(owner["dsn"], **given(owner))
    with psycopg.connect(owner["dsn"], autocommit=True) as connection:
        connection.execute('set search_path to "other schema"')
        before = rights(connection)
        connection.execute('grant update, delete on charge_receipts to "the daemon"')
        connection.execute('grant update (charged_credits) on charge_receipts to "some-reader"')
        connection.execute('grant select (raw) on dead_letters to "some-reader"')
        connection.execute('grant all on schema "other schema" to public, "the daemon"')
        connection.execute('grant all on all tables in schema "other schema" to public')
        assert rights(connection) != before
        database.grant(owner["dsn"], **given(owner))
        assert rights(connection) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"daemon": "nobody's"}, "there is no role nobody's"),
        ({"schema": "no such"}, "there is no schema no such"),
        ({"daemon": 'Owner "x" of it'}, "may become the owner"),
        ({"owner": "the daemon"}, "is not the owner the daemon"),
    ],
)
def test_what_it_refuses(owner: Mapping[str, str], change: dict[str, str], words: str) -> None:
    migrate(owner["dsn"], "other schema")
    done = database.run_script(owner["dsn"], "postgres/grants.sql", **{**given(owner), **change})
    assert done.returncode == 3
    assert words in done.stderr
    assert "HINT" in done.stderr


def test_a_schema_of_somebody_else_is_refused(dsn: str, owner: Mapping[str, str]) -> None:
    done = database.run_script(dsn, "postgres/grants.sql", **given(owner, "billing"))
    assert "does not own" in done.stderr


# --- in use ---------------------------------------------------------------------------------------------------------


def test_the_reader_reads_and_writes_nothing(dsn: str, roles: database.Roles, log: Path) -> None:
    log.write_bytes(lines(0, 3) + b"not json\n")
    (log.parent / f"callbacks-{'0' * 32}-000000.jsonl").write_bytes(spool_line(payload(1)))
    with following(dsn, log.parent):
        pass
    with psycopg.connect(roles.dsn(roles.readonly, dsn), autocommit=True) as reader:
        reader.execute("set search_path to billing")
        assert reader.execute("select charged_credits from charge_receipts").fetchall() == [(2250,)]
        assert reader.execute("select count(*) from dead_letters").fetchone() == (1,)
        assert reader.execute("select reason, octet_length(sha256) from dead_letters").fetchone() == (
            "invalid_json",
            32,
        )
        forbidden = ["select raw from dead_letters", "select * from dead_letters", "select head from tail_files"]
        for table, columns in tables(dsn).items():
            forbidden += [f"delete from {table}", f"update {table} set {columns[-1]} = null", f"truncate {table}"]
            forbidden.append(f"insert into {table} default values")
        for statement in [*forbidden, "create table x ()", "drop table touched_calls"]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                reader.execute(statement.encode())


def test_the_daemon_runs_and_settles(verb: Verb, dsn: str, daemon_dsn: str, log: Path, tmp_path: Path) -> None:
    """The process, with these grants alone; that all verbs work beside it is in the tests of the verbs."""
    spool = tmp_path / "spool"
    spool.mkdir()
    events = [payload(0), payload(1, 0.0), payload(2)]
    (spool / f"callbacks-{'0' * 32}-000000.jsonl").write_bytes(b"".join(map(spool_line, events)))
    log.write_bytes(lines(0, 3) + b"not json\n")
    verb.environment(SPOOL_DIR=str(spool))
    environment = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{log.parent}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": daemon_dsn,
        "BILLING_TAILER_CALLBACK_TOKEN": "t" * 32,
        "BILLING_TAILER_SPOOL_DIR": str(spool),
    }
    with Daemon(environment, tmp_path / "daemon.log") as daemon:
        daemon.wait_until(lambda: count(dsn, "charge_receipts") == 2 and count(dsn, "call_exceptions") == 1)
        verb("exceptions", "release", "call-00000001", "--cost-usd", "0.5", "--reason", "r")
        verb("offsets", "reset", f"{log}=beginning", "--reason", "r")
        daemon.wait_until(lambda: outcomes(dsn).get("replayed") == 3)
        assert [one["topic"] for one in verb.json("check", code=1) if not one["ok"]] == ["log format"]
        assert "commit_failed" not in daemon.log()
        assert "not_append_only" not in daemon.log()
        assert daemon.terminate() == 0
    assert verb.json("verify", "--settlement")["receipts"] == 3


def test_migrating_is_the_owners(verb: Verb) -> None:
    """As is pruning (tests/test_verbs.py::test_who_may_prune)."""
    verb("migrate", code=2)
    assert "BILLING_TAILER_MIGRATE_DATABASE_URL to the DSN of the role that owns the schema" in verb.stderr
