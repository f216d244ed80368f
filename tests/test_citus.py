"""deploy/citus.sql: the schema and the statements keep to what Citus needs, as far as a plain Postgres can tell.

Held here, from the catalog after all migrations: what is distributed, and by which column; unique keys contain it; no
triggers, rules, foreign keys, identities, sequences, generated or volatile defaults on distributed tables. And from the
text of every statement: no row locks that skip, no grouping sets, no recursive or data-modifying WITH, no LATERAL
beside a WITH, no volatile function in what is updated on conflict. Not held here: whether Citus can plan a statement.
That was tried on a cluster (docs/growing.md says which one, and what).
"""

import re
from collections.abc import Mapping

import pytest

from billing_tailer.ledger.sqlfile import QUERIES
from tests.support.daemon import ROOT
from tests.support.proof import rows

SCRIPT = (ROOT / "deploy/citus.sql").read_text()
DISTRIBUTED: Mapping[str, str] = dict(re.findall(r"^    \('(\w+)', '(\w+)'\)", SCRIPT, re.MULTILINE))
REFERENCE = set(re.findall(r"create_reference_table\(oid\) from \(select format\('%I\.(\w+)'", SCRIPT))
LOCAL = {
    "tail_files",
    "tail_batches",
    "log_gaps",
    "dead_letters",
    "offset_resets",
    "backfills",
    "skipped_calls",
    "unaudited_progress",
    "prunes",
    "schema_migrations",
}


def test_every_table_is_distributed_or_local(dsn: str) -> None:
    """A new table is neither until somebody decides. What has a call's id is distributed, but for the skipped ones."""
    found = rows(
        dsn,
        "select relname::text as name from pg_class "
        "where relkind in ('r', 'p') and relnamespace = 'billing'::regnamespace",
    )
    assert {row["name"] for row in found} == {*DISTRIBUTED, *REFERENCE, *LOCAL}
    assert len(REFERENCE) == 1
    keyed = rows(
        dsn,
        "select distinct c.relname::text as name from pg_class c join pg_attribute a on a.attrelid = c.oid "
        "where relkind = 'r' and relnamespace = 'billing'::regnamespace and attname in ('call_id', 'source_reference')",
    )
    assert {row["name"] for row in keyed} == {*DISTRIBUTED, "skipped_calls"}


def test_unique_keys_contain_the_call_id(dsn: str) -> None:
    """A shard knows of no other: a key without it could not be held. There is one on each table."""
    found = rows(
        dsn,
        "select c.relname::text as name, (select array_agg(attname::text) from pg_attribute a "
        "where a.attrelid = c.oid and a.attnum = any(i.indkey)) as columns "
        "from pg_index i join pg_class c on c.oid = i.indrelid "
        "where (indisunique or indisexclusion) and relnamespace = 'billing'::regnamespace",
    )
    distributed = [row for row in found if row["name"] in DISTRIBUTED]
    assert {row["name"] for row in distributed} == set(DISTRIBUTED)
    assert [row for row in distributed if DISTRIBUTED[row["name"]] not in row["columns"]] == []


def test_the_call_id_is_a_text_that_is_there(dsn: str) -> None:
    """The same type everywhere: rows of one call are on one shard because their ids hash alike."""
    for table, column in DISTRIBUTED.items():
        (found,) = rows(
            dsn,
            "select atttypid::regtype::text as type, attnotnull, attcollation = (select oid from pg_collation "
            "where collname = 'default') as plain from pg_attribute "
            "where attrelid = %s::regclass and attname = %s",
            table,
            column,
        )
        assert found == {"type": "text", "attnotnull": True, "plain": True}, table


@pytest.mark.parametrize(
    ("what", "query"),
    [
        ("triggers, those of foreign keys too", "select tgrelid as oid from pg_trigger"),
        ("rules", "select ev_class as oid from pg_rewrite"),
        ("foreign keys", "select conrelid as oid from pg_constraint where contype = 'f'"),
        ("foreign keys to it", "select confrelid as oid from pg_constraint where contype = 'f'"),
        (
            "identities and generated columns",
            "select attrelid as oid from pg_attribute where attidentity <> '' or attgenerated <> ''",
        ),
        (
            "defaults that are volatile",
            """select adrelid as oid from pg_attrdef where pg_get_expr(adbin, adrelid) ~*
            '(nextval|random|clock_timestamp|timeofday|uuid|statement_timestamp)'""",
        ),
        ("row level security", "select oid from pg_class where relrowsecurity"),
        (
            "unlogged tables, partitions and heirs",
            "select oid from pg_class where relpersistence <> 'p' or relispartition or relhassubclass",
        ),
    ],
)
def test_distributed_tables_have_no(dsn: str, what: str, query: str) -> None:
    found = rows(
        dsn,
        f"select relname::text as name from pg_class c join ({query}) x using (oid) "
        "where relnamespace = 'billing'::regnamespace and relkind = 'r'",
    )
    assert {row["name"] for row in found} & set(DISTRIBUTED) == set(), what


# --- statements ------------------------------------------------------------------------------------------------------


def plain(statement: str) -> str:
    """Without comments and strings, in lower case."""
    return re.sub(r"'[^']*'", "''", re.sub(r"--.*", "", statement)).lower()


FORBIDDEN = {
    "row locks that skip or wait": r"\bfor (no key )?update\b|\bfor (key )?share\b|\bskip locked\b",
    "grouping sets": r"\bgrouping sets\b|\bcube\s*\(|\brollup\s*\(",
    "LATERAL beside a WITH": r"\bwith\b.*\blateral\b",
    "recursive queries": r"\bwith recursive\b",
    "data-modifying WITH": r"\bas (not )?(materialized )?\(\s*(insert|update|delete|merge)\b",
    "samples": r"\btablesample\b",
    "MERGE": r"\bmerge into\b",
    "DO UPDATE": r"\bdo update\b",
    "volatile functions": r"\b(random|nextval|clock_timestamp|gen_random_uuid|setseed|timeofday)\s*\(",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_statements_have_no(what: str) -> None:
    touching = {
        name: text for name, text in QUERIES.items() if any(re.search(rf"\b{table}\b", text) for table in DISTRIBUTED)
    }
    assert len(touching) > 50
    assert [name for name, text in touching.items() if re.search(FORBIDDEN[what], plain(text), re.DOTALL)] == []


@pytest.mark.parametrize(
    ("what", "statement"),
    [
        ("row locks that skip or wait", "select call_id from usage_facts for update skip locked"),
        ("data-modifying WITH", "with gone as (delete from usage_facts returning call_id) select from gone"),
        ("volatile functions", "select 1 from usage_facts order by random() limit 1"),
        ("DO UPDATE", "insert into touched_calls values ('') on conflict (call_id) do update set call_id = now()"),
        ("grouping sets", "select from usage_facts group by rollup (run_id)"),
        (
            "LATERAL beside a WITH",
            "with page as (select) select from page p\njoin join lateral (select from usage_facts where call_id = p.x)",
        ),
    ],
)
def test_what_is_forbidden_would_be_seen(what: str, statement: str) -> None:
    assert re.search(FORBIDDEN[what], plain(statement), re.DOTALL)


def test_updates_of_distributed_tables_call_nothing_with_their_columns() -> None:
    """STABLE functions in an UPDATE may not be given columns: a shard would compute something else."""
    for name, text in QUERIES.items():
        match = re.match(r"update (\w+)", plain(text).strip())
        if match and match[1] in DISTRIBUTED:
            for call in re.findall(r"\b(?:now|make_interval)\(([^()]*)\)", plain(text)):
                assert not re.search(r"\b[a-z]\.\w|_at\b", call), name
