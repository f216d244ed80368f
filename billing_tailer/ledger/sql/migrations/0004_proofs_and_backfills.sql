-- Who decided a dead letter, and why.
alter table dead_letters add column resolved_by text, add column resolved_reason text;

-- `verify` looks for conflicts by their place in a file. There are few of them.
create index call_conflicts_range on call_conflicts (file_id, start_offset);

-- Why an old log was read by `backfill`, and who wanted it: a row for each run that read some of it.
create table backfills (
    backfill_id bigint generated always as identity primary key,
    file_id bigint not null references tail_files,
    path text not null,
    from_offset bigint not null check (from_offset >= 0),
    reason text not null,
    started_by text not null,
    started_at timestamptz not null default now()
);
