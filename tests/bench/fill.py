"""Millions of settled calls that have long been there, as the daemon would have left them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import sql

from tests.bench.logs import ACCOUNTS, CREDITS, MODELS

DAYS: Final = 30
"""Their time: evenly over so many days up to now."""
TABLES: Final = ("usage_facts", "spend_records", "charge_receipts", "llm_charge_details")

_MODEL: Final = f"(array{list(MODELS)})[1 + start_offset / 1000 % {len(MODELS)}]"
STATEMENTS: Final = (
    f"""
insert into usage_facts (call_id, nginx_request_id, proxy_call_id, id_echoed, run_id, attempt, graph_id,
                         billing_account_id, method, path, status, request_completed, provenance, requested_model,
                         header_model_group, request_seconds, occurred_at, file_id, start_offset, end_offset,
                         committed_at)
select id, id, id, true, 'old-run-' || i / 20, 1, 'planner', 'account-' || i % {ACCOUNTS}, 'POST',
       '/v1/chat/completions', 200, true, 'response', 'gpt-4o-mini', 'gpt-4o-mini', 0.778, at, 0, i * 1000,
       (i + 1) * 1000, at
from generate_series(0, {{count}}::bigint - 1) i,
     lateral (select md5(i::text) as id,
                     now() - interval '{DAYS} days' + i * (interval '{DAYS} days' / {{count}}) as at) made
""",
    f"""
insert into spend_records (call_id, source, record_id, status, model_group, model, provider, prompt_tokens,
                           completion_tokens, cached_tokens, reasoning_tokens, cost_usd, cost_text, cache_hit,
                           request_id, started_at, ended_at, file_id, start_offset, received_at)
select call_id, 'callback', md5('record' || call_id), 'success', {_MODEL}, 'gpt-4o-mini', 'openai', 1000, 200, 600, 64,
       0.000225, '0.000225', false, 'chatcmpl-' || call_id, occurred_at - interval '1 second', occurred_at, 0,
       start_offset, occurred_at
from usage_facts
""",
    f"""
insert into charge_receipts (source_system, source_reference, billing_account_id, run_id, attempt, litellm_call_id,
                             charged_credits, provider_cost_usd, user_cost_usd, markup_factor, provenance,
                             spend_source, record_ids, occurred_at, created_at)
select 'litellm', call_id, billing_account_id, run_id, attempt, call_id, {CREDITS}, 0.000225, 0.000225, 1,
       'response', 'callback', array[md5('record' || call_id)], occurred_at, occurred_at
from usage_facts
""",
    f"""
insert into llm_charge_details (source_system, source_reference, provider_call_id, model, provider_model, provider,
                                tokens_in, tokens_out, cached_tokens, reasoning_tokens, response_cost_usd, cache_hit,
                                latency_ms, graph_id, created_at)
select 'litellm', call_id, 'chatcmpl-' || call_id, {_MODEL}, 'gpt-4o-mini', 'openai', 1000, 200, 600, 64, 0.000225,
       false, 778, 'planner', occurred_at
from usage_facts
""",
)


def settled_calls(dsn: str, count: int) -> None:
    """Into an empty schema. Indexes are built afterwards, which takes a fraction of the time."""
    if not count:
        return
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        connection.execute("set maintenance_work_mem to '512MB'")
        with _without_indexes(connection):
            for statement in STATEMENTS:
                connection.execute(statement.format(count=count).encode())
        connection.execute("vacuum analyze")


@contextmanager
def _without_indexes(connection: psycopg.Connection) -> Iterator[None]:
    """Drops keys and indexes of TABLES, and makes the very same ones again."""
    tables = list(TABLES)
    keys = connection.execute(
        "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint "
        "where conrelid = any(%s::regclass[]) and contype = 'p'",
        [tables],
    ).fetchall()
    indexes = connection.execute(
        "select indexrelid::regclass::text, pg_get_indexdef(indexrelid) from pg_index "
        "where indrelid = any(%s::regclass[]) and not indisprimary",
        [tables],
    ).fetchall()
    for table, name, _ in keys:
        connection.execute(sql.SQL("alter table {} drop constraint {}").format(_id(table), _id(name)))
    for name, _ in indexes:
        connection.execute(sql.SQL("drop index {}").format(_id(name)))
    yield
    for table, name, definition in keys:
        words = sql.SQL(definition)
        connection.execute(sql.SQL("alter table {} add constraint {} {}").format(_id(table), _id(name), words))
    for _, definition in indexes:
        connection.execute(definition)


def _id(name: str) -> sql.Identifier:
    return sql.Identifier(name)
