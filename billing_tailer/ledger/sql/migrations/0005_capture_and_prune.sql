-- Calls whose lines were skipped as refused before a model was asked, the newest ones: to know them again in a spend
-- record that says otherwise. Like the positions, local to the coordinator on Citus.
create table skipped_calls (
    call_id text primary key,
    seq bigint generated always as identity,
    file_id bigint not null,
    start_offset bigint not null,
    committed_at timestamptz not null default now()
);
create index skipped_calls_seq on skipped_calls (seq);

-- One row: up to which received_at it was looked for spend records without a line.
create table unaudited_progress (
    only_row boolean primary key default true check (only_row),
    counted_to timestamptz not null
);
insert into unaudited_progress (counted_to) values (now());

-- Every removal of spend records without a line, written as it goes.
create table prunes (
    prune_id bigint generated always as identity primary key,
    received_before timestamptz not null,
    records bigint not null,
    calls bigint not null,
    cost_usd numeric not null default 0,
    reason text not null,
    pruned_by text not null,
    started_at timestamptz not null default now(),
    finished_at timestamptz
);

-- COST_SOURCE=header
alter table charge_receipts drop constraint charge_receipts_spend_source_check;
alter table charge_receipts add constraint charge_receipts_spend_source_check
    check (spend_source in ('callback', 'spend_logs', 'header'));

-- A range of time must not mean a look at everything. Rows come in the order of these times, nearly: an index of block
-- ranges is a thousandth of another one's size and costs inserts next to nothing.
create index usage_facts_time on usage_facts using brin (occurred_at) with (pages_per_range = 32, autosummarize = on);
create index charge_receipts_time on charge_receipts using brin (created_at, occurred_at)
    with (pages_per_range = 32, autosummarize = on);
create index spend_records_time on spend_records using brin (received_at)
    with (pages_per_range = 32, autosummarize = on);
