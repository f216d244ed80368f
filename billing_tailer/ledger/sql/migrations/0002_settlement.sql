-- What LiteLLM says of each attempt of a call. file_id and start_offset: where in the spool a callback's record stands.
create table spend_records (
    call_id text not null,
    source text not null check (source in ('callback', 'spend_logs')),
    record_id text not null,
    status text not null check (status in ('success', 'failure')),
    model_group text,
    model text,
    provider text,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    cost_usd numeric,
    cost_text text,
    cache_hit boolean,
    end_user text,
    run_id text,
    error_code text,
    request_id text,
    started_at timestamptz,
    ended_at timestamptz,
    file_id bigint,
    start_offset bigint,
    received_at timestamptz not null default now(),
    primary key (call_id, source, record_id)
);

-- Work lists. A fact without a receipt, and a call about which a record has come that was not looked at yet.
create table unsettled_facts (
    call_id text primary key,
    started_at timestamptz not null,
    committed_at timestamptz not null default now()
);
create index unsettled_facts_age on unsettled_facts (committed_at);
create table touched_calls (call_id text primary key);

create table charge_receipts (
    source_system text not null,
    source_reference text not null,
    billing_account_id text not null,
    run_id text,
    attempt integer,
    litellm_call_id text not null check (litellm_call_id = source_reference),
    charged_credits bigint not null check (charged_credits >= 0),
    provider_cost_usd numeric(24, 12) not null,
    user_cost_usd numeric(24, 12) not null,
    markup_factor numeric not null,
    provenance text not null check (provenance in ('stream', 'response', 'manual')),
    spend_source text check (spend_source in ('callback', 'spend_logs')),
    record_ids text[] not null,
    charge_reason text not null default 'llm_usage',
    receipt_kind text not null default 'llm',
    occurred_at timestamptz not null,
    created_at timestamptz not null default now(),
    primary key (source_system, source_reference),
    -- the credits follow from the receipt's own columns
    check (charged_credits = ceil(user_cost_usd * 10000000))
);

create table llm_charge_details (
    source_system text not null,
    source_reference text not null,
    provider_call_id text,
    model text,
    provider_model text,
    provider text,
    tokens_in bigint,
    tokens_out bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    response_cost_usd numeric,
    cache_hit boolean,
    latency_ms bigint,
    graph_id text,
    created_at timestamptz not null default now(),
    primary key (source_system, source_reference)
);

create table charge_adjustments (
    source_reference text not null,
    evidence_hash text not null,
    delta_credits bigint not null,
    delta_cost_usd numeric(24, 12) not null,
    reason text not null,
    evidence jsonb not null,
    created_at timestamptz not null default now(),
    created_by text not null,
    primary key (source_reference, evidence_hash)
);

create table call_exceptions (
    call_id text not null,
    kind text not null,
    seq integer not null,
    detail jsonb not null,
    opened_at timestamptz not null default now(),
    closed_at timestamptz,
    closed_by text,
    reason text,
    primary key (call_id, kind, seq),
    check ((closed_at is null) = (closed_by is null))
);
create index call_exceptions_open on call_exceptions (kind) where closed_at is null;

insert into unsettled_facts (call_id, started_at)
select call_id, occurred_at - make_interval(secs => coalesce(request_seconds, 0)::float8) from usage_facts;
