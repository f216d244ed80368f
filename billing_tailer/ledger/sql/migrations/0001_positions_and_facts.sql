-- Where each file stands. Local to the coordinator on Citus; everything keyed by call_id below may be distributed.
create table tail_files (
    file_id bigint generated always as identity primary key,
    source_id text not null,
    path text not null,
    device numeric(20) not null,
    inode numeric(20) not null,
    generation integer not null check (generation > 0),
    previous_file_id bigint references tail_files,
    head bytea not null,
    committed_offset bigint not null check (committed_offset >= 0),
    frontier_sha256 bytea not null check (octet_length(frontier_sha256) = 32),
    frontier_bytes integer not null,
    size_seen bigint not null,
    state text not null check (state in ('live', 'rotated', 'missing', 'blocked', 'final')),
    blocked_reason text,
    dead_letter_bytes bigint not null default 0,
    first_seen_at timestamptz not null default now(),
    last_commit_at timestamptz,
    -- a damaged position must not be believed: these follow from each other
    check (octet_length(head) = least(1024, committed_offset)),
    check (frontier_bytes = least(4096, committed_offset)),
    check ((state = 'blocked') = (blocked_reason is not null))
);
create index tail_files_source on tail_files (source_id, path);

create table tail_batches (
    file_id bigint not null references tail_files,
    start_offset bigint not null check (start_offset >= 0),
    end_offset bigint not null check (end_offset > start_offset),
    sha256 bytea not null check (octet_length(sha256) = 32),
    counts jsonb not null,
    committed_at timestamptz not null default now(),
    primary key (file_id, start_offset)
);

create table log_gaps (
    file_id bigint not null references tail_files,
    start_offset bigint not null check (start_offset >= 0),
    end_offset bigint check (end_offset > start_offset),
    reason text not null,
    declared_at timestamptz not null default now(),
    primary key (file_id, start_offset)
);

create table dead_letters (
    dead_letter_id bigint generated always as identity primary key,
    file_id bigint not null references tail_files,
    start_offset bigint not null,
    end_offset bigint not null check (end_offset > start_offset),
    reason text not null,
    detail text not null,
    raw bytea not null,
    sha256 bytea not null check (octet_length(sha256) = 32),
    created_at timestamptz not null default now(),
    resolved_at timestamptz,
    resolution text,
    unique (file_id, start_offset),
    check ((resolved_at is null) = (resolution is null))
);
create index dead_letters_open on dead_letters (dead_letter_id) where resolved_at is null;

create table offset_resets (
    reset_id text primary key,
    source_id text not null,
    file_id bigint not null references tail_files,
    path text not null,
    requested text not null,
    old_offset bigint not null,
    new_offset bigint not null,
    source text not null check (source in ('env', 'cli')),
    reason text not null,
    applied_at timestamptz not null default now()
);
create index offset_resets_file on offset_resets (file_id, applied_at);

create table usage_facts (
    call_id text primary key,
    nginx_request_id text,
    proxy_call_id text,
    id_echoed boolean not null,
    run_id text,
    attempt integer,
    graph_id text,
    billing_account_id text,
    method text,
    path text,
    status smallint not null,
    request_completed boolean not null,
    provenance text not null check (provenance in ('stream', 'response')),
    requested_model text,
    header_cost_usd numeric,
    header_model_group text,
    cache_key text,
    request_seconds numeric,
    occurred_at timestamptz not null,
    line_sha256 bytea,
    file_id bigint not null,
    start_offset bigint not null,
    end_offset bigint not null check (end_offset > start_offset),
    committed_at timestamptz not null default now()
);
create index usage_facts_run on usage_facts (run_id) where run_id is not null;
create index usage_facts_range on usage_facts (file_id, start_offset);

-- Further lines under a call id that is already taken by another request.
create table call_conflicts (
    call_id text not null,
    file_id bigint not null,
    start_offset bigint not null,
    end_offset bigint not null check (end_offset > start_offset),
    nginx_request_id text,
    line_sha256 bytea,
    run_id text,
    billing_account_id text,
    status smallint not null,
    occurred_at timestamptz not null,
    committed_at timestamptz not null default now(),
    primary key (call_id, file_id, start_offset)
);
