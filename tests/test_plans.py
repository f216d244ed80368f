"""Hot statements keep their indexes: plans on a Postgres with 50,000 calls.

A statement is in HOT, with what it may be read by, or in NOT_HOT, with the reason why its plan does not matter.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.types.json import Jsonb

from billing_tailer.ledger.activity import GROUPS_MAX, LETTERS_COUNTED_MAX, ORIGIN, Chosen
from billing_tailer.ledger.connection import connect, query
from billing_tailer.ledger.runs import EXCEPTIONS_MAX, FILES_MAX, WINDOW_COUNTS
from billing_tailer.ledger.sqlfile import QUERIES
from billing_tailer.ledger.writer import GAPS_COUNTED_MAX
from tests.support import database
from tests.support.proof import rows

CALLS = 50_000
START = datetime(2026, 1, 1, tzinfo=UTC)
"""A call ends every two seconds from then on; they are in 40 files, of two sources and a backfill."""

FILL = f"""
insert into tail_files (source_id, path, device, inode, generation, head, committed_offset, frontier_sha256,
                        frontier_bytes, size_seen, state)
select (array['default', 'other', 'default.backfill'])[1 + n % 3], '/billing/audit.jsonl.' || n, 1, n, 1, '', 0,
       sha256(''), 0, 0, case when n > 37 then 'live' else 'final' end
from generate_series(1, 40) n;

insert into usage_facts (call_id, nginx_request_id, id_echoed, run_id, billing_account_id, status, request_completed,
                         provenance, request_seconds, occurred_at, committed_at, file_id, start_offset, end_offset)
select md5(n::text), md5('n' || n), true, 'run-' || n / 20, 'account-' || n % 50, 200, true, 'stream', 1.5,
       '{START.isoformat()}'::timestamptz + n * interval '2 s', '{START.isoformat()}'::timestamptz + n * interval '2 s',
       1 + n * 40 / {CALLS + 1}, n * 600, n * 600 + 599
from generate_series(1, {CALLS}) n;

insert into spend_records (call_id, source, record_id, status, model_group, prompt_tokens, completion_tokens, cost_usd,
                           received_at)
select call_id, source, md5(call_id || source), 'success', 'gpt', 1000, 200, 0.000225, occurred_at
from usage_facts cross join (values ('callback'), ('spend_logs')) as sources (source)
where start_offset / 600 % 10 > 1 order by occurred_at;

insert into charge_receipts (source_system, source_reference, billing_account_id, run_id, litellm_call_id,
                             charged_credits, provider_cost_usd, user_cost_usd, markup_factor, provenance, spend_source,
                             record_ids, occurred_at, created_at)
select 'litellm', call_id, billing_account_id, run_id, call_id, 2250, 0.000225, 0.000225, 1, 'stream', 'callback',
       array[md5(call_id)], occurred_at, occurred_at
from usage_facts where start_offset / 600 % 10 > 1 order by occurred_at;

insert into llm_charge_details (source_system, source_reference, model, tokens_in, tokens_out, created_at)
select 'litellm', source_reference, 'model-' || ascii(source_reference) % 3, 1000, 200, created_at
from charge_receipts order by created_at;

insert into charge_adjustments (source_reference, evidence_hash, delta_credits, delta_cost_usd, reason, evidence,
                                created_by)
select source_reference, '', 1, 0.0000001, 'late', '{{}}', 'settler'
from charge_receipts tablesample bernoulli (60) repeatable (1);

-- of ten calls one waits, one is stopped, most of them by nothing any more
insert into unsettled_facts (call_id, started_at, committed_at, ask_at)
select call_id, occurred_at - interval '1.5 s', committed_at, case when start_offset / 600 % 10 = 1 then now() end
from usage_facts where start_offset / 600 % 10 <= 1;
insert into call_exceptions (call_id, kind, seq, detail, opened_at, closed_at, closed_by)
select call_id, case start_offset / 600 % 3 when 0 then 'overdue' else 'held_zero_cost' end, 1, '{{}}', occurred_at,
       case when start_offset / 600 % 100 > 1 then now() end, case when start_offset / 600 % 100 > 1 then 'settler' end
from usage_facts where start_offset / 600 % 10 between 1 and 6;
insert into unlisted_facts (file_id, start_offset, end_offset, facts, ended_from)
select 1 + n % 40, n * 100, n * 100 + 100, 1, now() from generate_series(1, 400) n;
insert into touched_calls select call_id from unsettled_facts limit 5000;

insert into call_conflicts (call_id, file_id, start_offset, end_offset, status, occurred_at)
select call_id, file_id, end_offset, end_offset + 1, 200, occurred_at
from usage_facts tablesample bernoulli (10) repeatable (2);
insert into skipped_calls (call_id, file_id, start_offset)
select md5('s' || n), 1, n from generate_series(1, 20000) n;
insert into tail_batches (file_id, start_offset, end_offset, sha256, counts)
select 1 + n % 40, n * 100, n * 100 + 100, sha256(''), '{{}}' from generate_series(1, 20000) n;
insert into log_gaps (file_id, start_offset, end_offset, reason)
select 1 + n % 40, n * 100 + 50, n * 100 + 51, 'hole' from generate_series(1, 5000) n;
insert into dead_letters (file_id, start_offset, end_offset, reason, detail, raw, sha256, resolved_at, resolution)
select 1 + n % 40, n * 100 + 60, n * 100 + 70, 'not_json', '', '\\x00', sha256(''),
       case when n % 10 > 0 then now() end, case when n % 10 > 0 then 'discarded' end
from generate_series(1, 5000) n;
insert into offset_resets (reset_id, source_id, file_id, path, requested, old_offset, new_offset, source, reason)
select n::text, 'default', 1 + n % 40, '/x', 'end', 0, 0, 'cli', '' from generate_series(1, 2000) n;
vacuum analyze;
"""

IDS = [f"{number:032x}" for number in range(10)]
HOUR = timedelta(hours=1)
BY_KEYS = {"poll_window", "late_calls", "stragglers", "list_facts"}
"""Asked in a transaction that begins with go_by_keys."""
USUAL: Mapping[str, Any] = {
    "source_id": "default",
    "call_id": IDS[0],
    "call_ids": IDS,
    "file_id": 3,
    "run_id": "run-7",
    "account": "account-7",
    "model": "model-1",
    "limit": 100,
    "after": "",
    "start": START + 10 * HOUR,
    "end": START + 10 * HOUR + timedelta(minutes=15),
    "seconds": 900,
}
"""What a statement is asked with, where nothing else is said."""


@dataclass(frozen=True)
class Hot:
    """A statement that is asked often, or while somebody waits. by: the indexes that it may use, and tables that it may
    read whole. words: what it is asked with beside USUAL. text: where it is put together of several."""

    by: str
    words: Mapping[str, Any] = field(default_factory=dict)
    text: LiteralString | None = None


def composed(name: str, chosen: Chosen) -> LiteralString:
    """activity_sums or activity_receipts."""
    details = query("activity_with_details") if chosen.model is not None else ""
    return query(name).format(conditions=chosen.conditions(), details=details)


CHOSEN = {
    "all": Chosen(),
    "an account": Chosen(account="account-7"),
    "a model": Chosen(model="model-1"),
    "a run": Chosen(run_id="run-7"),
}
OF_SOURCE = "tail_files tail_files_pkey tail_files_source"
"""Files are few beside calls: which of them are the source's may be found out by reading all."""
STANDINGS = "charge_receipts_pkey charge_adjustments_pkey call_exceptions_pkey"
PLACE = {"committed_offset": 1_000_000, "start_offset": 1000, "end_offset": 1100, "grows_from": 1100, "old_offset": 1}
NONE_YET = dict.fromkeys(("frontier_bytes", "size_seen", "dead_letter_bytes"), 0)
SPAN = {"after": START + HOUR, "to": START + HOUR + timedelta(seconds=60)}
RANGE = {"start": 6000 * 600, "end": 6100 * 600}
MINUTES = {"end": START + 10 * HOUR + timedelta(minutes=2)}
SUMS = {"bucket": HOUR, "origin": ORIGIN, "limit": GROUPS_MAX}
PAGE = {"start": START + 10 * HOUR, "end": START + 10 * HOUR + timedelta(minutes=15), "before": "f"}
WAITING = {"after_start": START + HOUR, "after_call": "", "started_after": START, "deadline": 900}
NEWEST = {"all": False, "kind": None, "opened_at": None, "after_kind": "", "seq": 0, "before": None, "raw_bytes": 10}

HOT: Mapping[str, Hot] = {
    # the loop: a commit
    "move_position": Hot(
        "tail_files",
        {
            **PLACE,
            "head": b"",
            "frontier_sha256": bytes(32),
            "frontier_bytes": 0,
            "size_seen": 0,
            "dead_letter_bytes": 0,
        },
    ),
    "grow_batch": Hot("tail_batches_pkey", {**PLACE, "sha256": bytes(32), "counts": Jsonb({})}),
    "forget_skipped": Hot("skipped_calls_seq", {"kept": 200_000}),
    "delete_gaps_of_revived": Hot("log_gaps_pkey tail_files", PLACE),
    "known_lines": Hot("usage_facts_pkey call_conflicts_pkey"),
    "open_dead_letters": Hot(f"dead_letters_open {OF_SOURCE}", {"count_max": LETTERS_COUNTED_MAX}),
    "gap_counts": Hot(f"log_gaps log_gaps_pkey {OF_SOURCE}", {"count_max": GAPS_COUNTED_MAX}),
    "range_start": Hot("tail_batches_pkey log_gaps_pkey", {"offset": 10_000}),
    # the loop: the settler
    "touched": Hot("touched_calls_pkey"),
    "forget_touched": Hot("touched_calls_pkey"),
    "waiting_calls": Hot("unsettled_facts_waiting", WAITING),
    "own_calls": Hot(f"usage_facts_pkey {OF_SOURCE}"),
    "with_records": Hot("spend_records_pkey"),
    "settle_facts": Hot("usage_facts_pkey", {"deadline": 900, "quiet": 10}),
    "settle_records": Hot("spend_records_pkey", {"quiet": 10}),
    "settle_receipts": Hot("charge_receipts_pkey"),
    "settle_adjustments": Hot("charge_adjustments_pkey"),
    "settle_exceptions": Hot("call_exceptions_pkey"),
    "settle_conflicts": Hot("call_conflicts_pkey"),
    "close_exception": Hot(
        "call_exceptions_pkey call_exceptions_open",
        {"kind": "overdue", "seq": 1, "closed_by": "settler", "reason": "", "detail": Jsonb({})},
    ),
    "forget_unsettled": Hot("unsettled_facts_pkey"),
    "list_facts": Hot(
        "usage_facts_range charge_receipts_pkey call_exceptions_pkey",
        {"start_offset": 6000 * 600, "end_offset": 6500 * 600},
    ),
    "unsettle_calls": Hot("usage_facts_pkey"),
    "stop_calls": Hot("unsettled_facts_pkey call_exceptions_pkey call_exceptions_open"),
    "resume_calls": Hot("unsettled_facts_pkey call_exceptions_pkey call_exceptions_open"),
    "stopped_page": Hot("unsettled_facts_pkey", WAITING),
    "open_page": Hot("call_exceptions_open", {**WAITING, "after_kind": ""}),
    "open_exceptions": Hot("call_exceptions_open"),
    # the loop: the poller
    "poll_window": Hot(f"unsettled_facts_waiting usage_facts_pkey {OF_SOURCE}", WAITING),
    "late_calls": Hot(f"unsettled_facts_waiting usage_facts_pkey {OF_SOURCE}", WAITING),
    "stragglers": Hot(f"unsettled_facts_stopped usage_facts_pkey {OF_SOURCE}", WAITING),
    "ask_later": Hot("unsettled_facts_pkey", {"ask_at": START}),
    "unaudited": Hot("spend_records_time usage_facts_pkey skipped_calls_pkey", {**SPAN, "named_max": 20}),
    # the run API
    "run_status": Hot(
        f"usage_facts_run {STANDINGS} tail_files",
        {"named": IDS, "exceptions_max": EXCEPTIONS_MAX, "files_max": FILES_MAX},
        query("run_status").format(standings=query("call_standings")),
    ),
    "run_calls": Hot(
        f"usage_facts_run usage_facts_pkey llm_charge_details_pkey {STANDINGS}",
        text=query("run_calls").format(standings=query("call_standings")),
    ),
    "call_fact": Hot("usage_facts_pkey"),
    "call_details": Hot("llm_charge_details_pkey"),
    "call_conflicts": Hot("call_conflicts_pkey"),
    "call_records": Hot("spend_records_pkey"),
    "announce": Hot("usage_facts_pkey", {"channel": "x"}),
    "reconcile_window": Hot(
        "usage_facts_time charge_receipts_time charge_receipts_pkey charge_adjustments_pkey call_exceptions_pkey "
        "unsettled_facts_pkey unlisted_facts unlisted_facts_pkey",
        MINUTES,
        WINDOW_COUNTS,
    ),
    # the page
    "activity_sums of ten hours": Hot(
        "charge_receipts_time llm_charge_details_time charge_adjustments",
        {**SUMS, "end": START + 20 * HOUR},
        composed("activity_sums", Chosen()),
    ),
    **{
        f"activity_sums of {of}": Hot(
            "charge_receipts_time charge_receipts_pkey llm_charge_details_time llm_charge_details_pkey usage_facts_run "
            "charge_adjustments_pkey",
            {**SUMS, **MINUTES},
            composed("activity_sums", chosen),
        )
        for of, chosen in CHOSEN.items()
    },
    **{
        f"activity_receipts of {of}": Hot(
            "charge_receipts_time charge_receipts_pkey llm_charge_details_pkey usage_facts_run charge_adjustments_pkey",
            PAGE,
            composed("activity_receipts", chosen),
        )
        for of, chosen in CHOSEN.items()
    },
    "activity_exceptions": Hot("call_exceptions_open usage_facts_pkey", NEWEST),
    "activity_letters": Hot(f"dead_letters_open dead_letters_pkey {OF_SOURCE}", NEWEST),
    "activity_open": Hot("call_exceptions_open dead_letters_open", {"letters_max": LETTERS_COUNTED_MAX}),
    "activity_last_call": Hot("usage_facts_range", PLACE),
    # verbs about one call, a page of the newest, or a range
    "explain_fact": Hot(f"usage_facts_pkey {OF_SOURCE}"),
    "explain_records": Hot(f"spend_records_pkey {OF_SOURCE}"),
    "explain_receipt": Hot("charge_receipts_pkey"),
    "explain_details": Hot("llm_charge_details_pkey"),
    "explain_adjustments": Hot("charge_adjustments_pkey"),
    "explain_exceptions": Hot("call_exceptions_pkey"),
    "explain_conflicts": Hot(f"call_conflicts_pkey {OF_SOURCE}"),
    "known_calls": Hot("usage_facts_pkey"),
    "callbacks_between": Hot("spend_records_time"),
    "dead_letters": Hot(f"dead_letters_open {OF_SOURCE}", NEWEST),
    "dead_letter": Hot(f"dead_letters_pkey {OF_SOURCE}", {"dead_letter_id": 7}),
    "resolve_letter": Hot(
        "dead_letters_pkey dead_letters_open", {"dead_letter_id": 7, "resolution": "discarded", "by": "", "reason": ""}
    ),
    "insert_skipped_letter": Hot("dead_letters_pkey", {"dead_letter_id": 7}),
    "receipts of a run": Hot(
        "usage_facts_run charge_receipts_pkey llm_charge_details_pkey charge_adjustments_pkey",
        {"account": None, "since": None},
        query("receipts"),
    ),
    "receipts of an hour": Hot(
        "charge_receipts_time llm_charge_details_pkey charge_adjustments_pkey",
        {"account": None, "run_id": None, "since": START + CALLS * timedelta(seconds=2) - HOUR, "limit": 10},
        query("receipts"),
    ),
    "exceptions": Hot("call_exceptions_open usage_facts_pkey", NEWEST),
    # verify, page by page
    "proof_files": Hot(
        f"{OF_SOURCE} tail_batches_pkey offset_resets_file dead_letters_open dead_letters_file_id_start_offset_key",
        {"after": 0},
    ),
    "proof_beyond": Hot(f"usage_facts_range {OF_SOURCE}", {"file_ids": [3]}),
    "proof_tiles": Hot("tail_batches_pkey log_gaps_pkey", {"after": 1000, "kind": 0, "before": 100_000}),
    "proof_facts": Hot("usage_facts_range", RANGE),
    "proof_letters": Hot("dead_letters_file_id_start_offset_key", RANGE),
    "proof_conflicts": Hot("call_conflicts_range", RANGE),
    "proof_receipts": Hot(
        "charge_receipts_pkey usage_facts_pkey llm_charge_details_pkey touched_calls_pkey", {"system": ""}
    ),
    "proof_page_unreceipted": Hot("usage_facts_pkey"),
    "proof_page_odd_details": Hot("llm_charge_details_pkey"),
    "proof_page_odd_adjustments": Hot("charge_adjustments_pkey"),
    "proof_unreceipted": Hot(
        "usage_facts_pkey charge_receipts_pkey unsettled_facts_pkey call_exceptions_pkey unlisted_facts "
        "unlisted_facts_pkey"
    ),
    "proof_odd_details": Hot("llm_charge_details_pkey charge_receipts_pkey"),
    "proof_odd_adjustments": Hot("charge_adjustments_pkey charge_receipts_pkey"),
}

NOT_HOT: Mapping[str, str] = {
    "rows are put in, nothing is looked for but their key": """
        insert_file insert_gap insert_hole insert_batch insert_skipped insert_dead_letter insert_fact copy_facts
        copy_staged insert_unsettled insert_unlisted insert_records touch_calls insert_reset insert_receipts
        insert_details insert_adjustment open_exception begin_prune insert_backfill""",
    "a staging table of one batch": "create_staging unsettle_staged insert_staged insert_conflicts",
    "a part of others, which are here": """
        call_standings reconcile_calls old_unaudited activity_of_account activity_of_model activity_of_run
        activity_calls_of_account activity_with_details""",
    "no table but the catalog's": """
        may_not_use_schema probe_server probe_collation excess_grants may_change_money missing_grants may_prune
        proof_keys owner end_frozen_owner server_time closed_window read_only_session activity_memory go_by_keys
        hold_facts deciding""",
    "files only: few rows": """
        positions update_file rule_on_file end_empty_files other_holder rewind_position files_elsewhere call_files
        activity_files""",
    "offset resets and prunes: as many as an operator ordered": "newest_reset reset_by_id count_prune end_prune",
    "one row": "unaudited_span claim_unaudited",
    "byte ranges: a few rows for a batch that waits to be listed": "any_unlisted take_unlisted",
    "an operator's reset of a file": """
        delete_batches_from delete_gaps_from recount_letter_bytes delete_open_dead_letters_from""",
    "counts all, for `status`": "totals settlement_totals settlement_exceptions",
    "counts the calls that wait, with a pause in between that grows with what it took": "settle_counts",
    "looks at all calls that wait, within the page's five seconds": "activity_unsettled",
    "all gaps of a source, for `files` and `verify`": "gaps",
    "all records, for `check`": "models_seen",
    "`prune`, under the owner's role: as much of the tables as it has to go through": """
        prune_page count_unaudited delete_unaudited""",
}


def name_of(case: str) -> str:
    return case.partition(" ")[0]


def test_every_statement_is_hot_or_not() -> None:
    """A new one must be looked at."""
    cold = " ".join(NOT_HOT.values()).split()
    assert sorted([*cold, *{name_of(case) for case in HOT}]) == sorted(QUERIES)


@pytest.fixture(scope="module")
def full(admin_dsn: str, template_database: str) -> Iterator[str]:
    with database.temporary(admin_dsn, template_database) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("set search_path to billing")
            for statement in FILL.split(";\n"):
                connection.execute(statement.encode())
        yield dsn


@pytest.fixture
def connection(full: str, case: str) -> Iterator[psycopg.Connection[Any]]:
    """As the statement finds it. What is written is rolled back."""
    with psycopg.connect(full) as connection:
        connection.execute("set search_path to billing")
        if case in BY_KEYS:
            connection.execute(QUERIES["go_by_keys"])
        yield connection
        connection.rollback()


def ways(plan: Mapping[str, Any], *, is_limited: bool = False) -> Iterator[str]:
    """How a plan reads tables: an index's name, ` whole` behind it where all of it may be read, or a table's name."""
    is_limited = is_limited or plan["Node Type"] == "Limit"
    if "Index Name" in plan:
        yield plan["Index Name"] + ("" if "Index Cond" in plan or is_limited else " whole")
    elif "Relation Name" in plan and plan["Node Type"] not in ("ModifyTable", "Bitmap Heap Scan"):
        yield plan["Relation Name"]
    for part in plan.get("Plans", ()):
        yield from ways(part, is_limited=is_limited)


def asked_with(case: str) -> tuple[LiteralString, dict[str, Any]]:
    hot = HOT[case]
    text = hot.text or QUERIES[name_of(case)]
    words = {**USUAL, **hot.words}
    return text, {name: words[name] for name in re.findall(r"%\((\w+)\)s", text)}


def astray(used: Collection[str], allowed: str) -> list[str]:
    """What is not allowed. A partial index may be read whole: it is what a statement wants."""
    return [
        way for way in used if way not in {*allowed.split(), "call_exceptions_open whole", "dead_letters_open whole"}
    ]


def explained(connection: psycopg.Connection[Any], statement: str, words: Mapping[str, Any] | None = None) -> set[str]:
    """How a statement reads tables."""
    found = connection.execute(f"explain (format json) {statement}".encode(), words).fetchone()
    assert found is not None
    used = set(ways(found[0][0]["Plan"]))
    assert used, "it reads nothing"
    return used


@pytest.mark.parametrize("case", HOT)
def test_a_hot_statement_goes_by_its_index(case: str, connection: psycopg.Connection[Any]) -> None:
    used = explained(connection, *asked_with(case))
    assert astray(used, HOT[case].by) == []


def test_no_plan_is_for_all_values(full: str) -> None:
    """psycopg prepares what it is asked five times, and Postgres would keep one plan from then, for tables as small as
    they were."""
    with connect(full, "billing") as session:
        for _ in range(20):
            session.execute(*asked_with("with_records"))
        planned = session.execute(
            "select generic_plans, custom_plans > 10 from pg_prepared_statements where statement ~ 'spend_records'"
        )
        assert planned.fetchall() == [(0, True)]


def test_every_index_is_for_a_hot_statement(full: str) -> None:
    """Each costs every insert: who needs a new one says here what for. Keys are there for what they forbid, too."""
    indexes = rows(
        full,
        "select c.relname::text as name from pg_index i join pg_class c on c.oid = i.indexrelid "
        "where c.relnamespace = 'billing'::regnamespace and not i.indisunique",
    )
    assert {row["name"] for row in indexes} - set(" ".join(hot.by for hot in HOT.values()).split()) == set()


def test_a_position_stays_on_its_page(dsn: str) -> None:
    """It is rewritten with every commit: each time in place, which makes neither pages nor index entries. Whether it
    would without room left for it, depends on the length of its path."""
    file = {"source_id": "default", "device": 1, "inode": 1, "generation": 1, "previous_file_id": None, "state": "live"}
    place = {"head": bytes(1024), "frontier_sha256": bytes(32), "frontier_bytes": 4096, "size_seen": 0}
    pages = {}
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        for length in range(20, 500, 60):
            connection.execute("truncate tail_files cascade")
            words = {**file, **place, "path": "/" * length, "committed_offset": 5000}
            file_id, _ = connection.execute(QUERIES["insert_file"], words).fetchone() or (0, None)
            for offset in range(5000, 5050):
                words = {**place, "file_id": file_id, "old_offset": offset, "end_offset": offset + 1}
                assert connection.execute(QUERIES["move_position"], {**words, "dead_letter_bytes": 0}).rowcount == 1
            found = connection.execute("select pg_relation_size('tail_files') / current_setting('block_size')::int")
            pages[length] = (found.fetchone() or (0,))[0]
    assert set(pages.values()) == {1}, pages
