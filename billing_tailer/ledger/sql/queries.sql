-- Every statement of the ledger by name. Unqualified names: the session's search_path is the schema.

-- name: positions
select file_id, path, device, inode, generation, previous_file_id, head, committed_offset, frontier_sha256,
       frontier_bytes, size_seen, state, blocked_reason, dead_letter_bytes, first_seen_at, last_commit_at
from tail_files where source_id = %(source_id)s and file_id > %(after_file_id)s order by file_id

-- name: insert_file
insert into tail_files (source_id, path, device, inode, generation, previous_file_id, head, committed_offset,
                        frontier_sha256, frontier_bytes, size_seen, state)
values (%(source_id)s, %(path)s, %(device)s, %(inode)s, %(generation)s, %(previous_file_id)s, %(head)s,
        %(committed_offset)s, %(frontier_sha256)s, %(frontier_bytes)s, %(size_seen)s, %(state)s)
returning file_id, first_seen_at

-- name: update_file
update tail_files
set path = %(path)s, device = %(device)s, inode = %(inode)s, size_seen = %(size_seen)s, state = %(state)s,
    blocked_reason = %(blocked_reason)s
where file_id = %(file_id)s and committed_offset = %(committed_offset)s

-- name: delete_gaps_of_revived
-- What was given up as lost has come back: it will be read, and must not stand as a gap too.
delete from log_gaps
where file_id = %(file_id)s and start_offset >= %(committed_offset)s
  and (select state from tail_files where file_id = %(file_id)s) = 'final'

-- name: insert_gap
insert into log_gaps (file_id, start_offset, end_offset, reason)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(reason)s)
on conflict do nothing

-- name: insert_hole
insert into log_gaps (file_id, start_offset, end_offset, reason)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(reason)s)

-- name: move_position
update tail_files
set committed_offset = %(end_offset)s, head = %(head)s, frontier_sha256 = %(frontier_sha256)s,
    frontier_bytes = %(frontier_bytes)s, size_seen = %(size_seen)s, dead_letter_bytes = %(dead_letter_bytes)s,
    last_commit_at = now()
where file_id = %(file_id)s and committed_offset = %(old_offset)s

-- name: insert_batch
insert into tail_batches (file_id, start_offset, end_offset, sha256, counts)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(sha256)s, %(counts)s)

-- name: grow_batch
update tail_batches
set end_offset = %(end_offset)s, sha256 = %(sha256)s, counts = %(counts)s, committed_at = now()
where file_id = %(file_id)s and start_offset = %(start_offset)s and end_offset = %(grows_from)s

-- name: insert_skipped
insert into skipped_calls (call_id, file_id, start_offset)
select * from unnest(%(call_id)s::text[], %(file_id)s::bigint[], %(start_offset)s::bigint[])
on conflict do nothing

-- name: insert_skipped_letter
insert into skipped_calls (call_id, file_id, start_offset)
select %(call_id)s, file_id, start_offset from dead_letters where dead_letter_id = %(dead_letter_id)s
on conflict do nothing

-- name: forget_skipped
delete from skipped_calls where seq <= (select max(seq) from skipped_calls) - %(kept)s

-- name: insert_dead_letter
insert into dead_letters (file_id, start_offset, end_offset, reason, detail, raw, sha256)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(reason)s, %(detail)s, %(raw)s, %(sha256)s)
on conflict (file_id, start_offset) do nothing

-- name: insert_fact
insert into usage_facts ({columns}) values ({values})

-- name: copy_facts
copy usage_facts ({columns}) from stdin with (null '')

-- name: copy_staged
copy staged_facts ({columns}, line_number) from stdin with (null '')

-- name: insert_unsettled
insert into unsettled_facts (call_id, started_at)
values (%s, %s::timestamptz - make_interval(secs => coalesce(%s::float8, 0)))

-- name: insert_unlisted
insert into unlisted_facts (file_id, start_offset, end_offset, facts, ended_from)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(facts)s, to_timestamp(%(second)s))

-- name: unsettle_staged
insert into unsettled_facts (call_id, started_at)
select call_id, occurred_at - make_interval(secs => coalesce(request_seconds, 0)::float8)
from staged_facts where line_number = any(%(inserted)s)

-- name: insert_records
-- Both sources send a record again and again; the first one stands.
insert into spend_records ({columns})
select {columns} from unnest({arrays}) as r ({columns})
on conflict do nothing
returning call_id, source, record_id

-- name: touch_calls
insert into touched_calls (call_id) select unnest(%(call_ids)s::text[]) on conflict do nothing

-- name: create_staging
create temporary table staged_facts (like usage_facts including defaults, line_number integer not null) on commit drop

-- name: insert_staged
insert into usage_facts ({columns})
select distinct on (call_id) {columns}
from staged_facts order by call_id, line_number
on conflict (call_id) do nothing
returning call_id

-- name: known_lines
-- What identifies the requests of these calls: nginx's id, or, where the log has none, the line itself. A further line
-- of one of them is a replay.
select call_id, nginx_request_id, line_sha256 from usage_facts where call_id = any(%(call_ids)s)
union all
select call_id, nginx_request_id, line_sha256 from call_conflicts where call_id = any(%(call_ids)s)

-- name: insert_conflicts
insert into call_conflicts (call_id, file_id, start_offset, end_offset, nginx_request_id, line_sha256, run_id,
                            billing_account_id, status, occurred_at)
select call_id, file_id, start_offset, end_offset, nginx_request_id, line_sha256, run_id, billing_account_id, status,
       occurred_at
from staged_facts where line_number = any(%(conflicts)s)
on conflict do nothing

-- name: newest_reset
select count(*), max(applied_at) from offset_resets where source_id = %(source_id)s

-- name: reset_by_id
select source_id, path, requested, new_offset, applied_at from offset_resets where reset_id = %(reset_id)s

-- name: insert_reset
insert into offset_resets (reset_id, source_id, file_id, path, requested, old_offset, new_offset, source, reason,
                           applied_by)
values (%(reset_id)s, %(source_id)s, %(file_id)s, %(path)s, %(requested)s, %(old_offset)s, %(new_offset)s, %(source)s,
        %(reason)s, %(by)s)

-- name: rule_on_file
-- Only as the operator saw it: a daemon that has found its file, or seen more of it, was faster.
update tail_files
set path = %(path)s, device = %(device)s, inode = %(inode)s, state = %(state)s, blocked_reason = null
where file_id = %(file_id)s and committed_offset = %(committed_offset)s and size_seen = %(size_seen)s
  and state = %(state_was)s and blocked_reason is not distinct from %(blocked_reason_was)s

-- name: end_empty_files
update tail_files set state = 'final', blocked_reason = null
where file_id = any(%(file_ids)s) and committed_offset = 0

-- name: other_holder
select file_id from tail_files
where source_id = %(source_id)s and device = %(device)s and inode = %(inode)s and file_id <> %(file_id)s
  and state <> 'final' limit 1

-- name: gaps
select g.file_id, g.start_offset, g.end_offset, g.reason, g.declared_at
from tail_files f join log_gaps g using (file_id)
where f.source_id = %(source_id)s order by g.file_id, g.start_offset

-- name: range_start
-- Where the tile that contains an offset begins.
select max(start_offset) from (
    select start_offset from tail_batches where file_id = %(file_id)s and start_offset <= %(offset)s
    union all
    select start_offset from log_gaps where file_id = %(file_id)s and start_offset <= %(offset)s
) tiles

-- name: delete_batches_from
delete from tail_batches where file_id = %(file_id)s and start_offset >= %(offset)s

-- name: delete_gaps_from
delete from log_gaps where file_id = %(file_id)s and start_offset >= %(offset)s

-- name: recount_letter_bytes
update tail_files
set dead_letter_bytes = (select coalesce(sum(octet_length(raw)), 0) from dead_letters where file_id = %(file_id)s)
where file_id = %(file_id)s

-- name: delete_open_dead_letters_from
delete from dead_letters where file_id = %(file_id)s and start_offset >= %(offset)s and resolved_at is null

-- name: rewind_position
update tail_files
set committed_offset = %(new_offset)s, head = %(head)s, frontier_sha256 = %(frontier_sha256)s,
    frontier_bytes = %(frontier_bytes)s, size_seen = %(new_offset)s, state = case state when 'final' then 'rotated' else state end
where file_id = %(file_id)s and committed_offset = %(old_offset)s

-- name: dead_letters
select d.dead_letter_id, d.file_id, f.path, d.start_offset, d.end_offset, d.reason, d.detail, d.created_at,
       d.resolved_at, d.resolution, d.resolved_by, d.resolved_reason
from dead_letters d join tail_files f using (file_id)
where f.source_id in (%(source_id)s, %(source_id)s || '.backfill') and (%(all)s or d.resolved_at is null)
order by d.dead_letter_id desc limit %(limit)s

-- name: dead_letter
select d.dead_letter_id, d.file_id, f.source_id, f.path, d.start_offset, d.end_offset, d.reason, d.detail, d.created_at,
       d.resolved_at, d.resolution, d.resolved_by, d.resolved_reason, d.raw, d.sha256
from dead_letters d join tail_files f using (file_id)
where d.dead_letter_id = %(dead_letter_id)s

-- name: open_dead_letters
-- Asked every few seconds: counting millions of them would take longer than that.
select count(*) from (
    select from dead_letters d join tail_files f using (file_id)
    where f.source_id in (%(source_id)s, %(source_id)s || '.backfill') and d.resolved_at is null limit %(count_max)s
) letters

-- name: gap_counts
-- Asked as often.
select reason, count(*), coalesce(sum(end_offset - start_offset), 0)::bigint from (
    select g.reason, g.start_offset, g.end_offset from log_gaps g join tail_files f using (file_id)
    where f.source_id = %(source_id)s limit %(count_max)s
) gaps group by reason

-- name: totals
with source as (select file_id from tail_files where source_id in (%(source_id)s, %(source_id)s || '.backfill'))
select (select count(*) from source join usage_facts using (file_id)) as facts,
       (select count(*) from source join call_conflicts using (file_id)) as conflicts,
       (select count(*) from source join dead_letters using (file_id) where resolved_at is null) as dead_letters_open,
       (select count(*) from source join log_gaps using (file_id)) as gaps,
       (select coalesce(sum(end_offset - start_offset), 0)::bigint
        from source join log_gaps using (file_id)) as gap_bytes

-- name: end_frozen_owner
-- The owner pings its session. Where that has been silent for longer than Postgres' own time-outs allow (none of them
-- runs while a COPY waits for its client), its process is frozen or gone: take the lock away from it.
select pg_terminate_backend(a.pid, 2000) from pg_stat_activity a join pg_locks l using (pid)
where l.locktype = 'advisory' and l.granted and l.objsubid = 1
  and l.database = (select oid from pg_database where datname = current_database())
  and l.classid::bigint = %(high)s and l.objid::bigint = %(low)s
  and a.state_change < now() - make_interval(secs => %(seconds)s)
  and (a.state <> 'active' or a.wait_event = 'ClientRead')

-- name: owner
select a.application_name from pg_stat_activity a join pg_locks l on l.pid = a.pid
where l.locktype = 'advisory' and l.granted and a.application_name = left(%(application)s, 63) limit 1

-- name: may_not_use_schema
select to_regnamespace(%(schema)s) is not null and not has_schema_privilege(to_regnamespace(%(schema)s), 'USAGE'),
       current_user::text

-- name: probe_server
select current_setting('server_version') as server_version, current_user::text as role,
       session_user::text as login, current_database()::text as database

-- name: probe_collation
-- By the rules of a language the small letter comes first.
select 'B'::text < 'a'::text as by_bytes

-- name: excess_grants
-- What the daemon's role is better off without: facts and records are kept, as what receipts follow from.
select coalesce(array_agg(format('%%s on %%s', privilege, t.relname) order by t.relname, privilege), '{}') as excess
from pg_class t cross join unnest(array['UPDATE', 'DELETE', 'TRUNCATE']) privilege
where t.relnamespace = to_regnamespace(%(schema)s) and t.relname in ('usage_facts', 'spend_records')
  and has_table_privilege(t.oid, privilege)

-- name: callbacks_between
select count(*) as n from spend_records
where source = 'callback' and received_at >= %(start)s and received_at < %(end)s

-- name: may_change_money
-- By a grant, or because it may become the tables' owner, who could grant it to itself.
select coalesce(bool_or(has_any_column_privilege(t.oid, 'UPDATE') or has_table_privilege(t.oid, 'DELETE')
                        or has_table_privilege(t.oid, 'TRUNCATE') or pg_has_role(t.relowner, 'MEMBER')), false)
from pg_class t where t.relnamespace = to_regnamespace(%(schema)s)
  and t.relname in ('charge_receipts', 'llm_charge_details', 'charge_adjustments')

-- name: missing_grants
-- What the daemon's role needs is what deploy/postgres/grants.sql gives it, no more and no less (tests/test_grants.py).
with needed (privilege, relname, columns) as (
    select 'SELECT', relname, null::text[] from pg_class
    where relnamespace = to_regnamespace(%(schema)s) and relkind = 'r'
    union all values
        ('INSERT', 'usage_facts'::name, null::text[]),
        ('INSERT', 'call_conflicts', null),
        ('INSERT', 'spend_records', null),
        ('INSERT', 'charge_receipts', null),
        ('INSERT', 'llm_charge_details', null),
        ('INSERT', 'charge_adjustments', null),
        ('INSERT', 'call_exceptions', null),
        ('UPDATE', 'call_exceptions', null),
        ('INSERT', 'unsettled_facts', null),
        ('UPDATE', 'unsettled_facts', null),
        ('DELETE', 'unsettled_facts', null),
        ('INSERT', 'unlisted_facts', null),
        ('DELETE', 'unlisted_facts', null),
        ('INSERT', 'touched_calls', null),
        ('DELETE', 'touched_calls', null),
        ('INSERT', 'skipped_calls', null),
        ('DELETE', 'skipped_calls', null),
        ('UPDATE', 'unaudited_progress', array['counted_to']),
        ('INSERT', 'tail_files', null),
        ('UPDATE', 'tail_files', array['path', 'device', 'inode', 'head', 'committed_offset', 'frontier_sha256',
                                       'frontier_bytes', 'size_seen', 'state', 'blocked_reason', 'dead_letter_bytes',
                                       'last_commit_at']),
        ('INSERT', 'tail_batches', null),
        ('UPDATE', 'tail_batches', array['end_offset', 'sha256', 'counts', 'committed_at']),
        ('DELETE', 'tail_batches', null),
        ('INSERT', 'log_gaps', null),
        ('DELETE', 'log_gaps', null),
        ('INSERT', 'dead_letters', null),
        ('UPDATE', 'dead_letters', array['resolved_at', 'resolution', 'resolved_by', 'resolved_reason']),
        ('DELETE', 'dead_letters', null),
        ('INSERT', 'offset_resets', null),
        ('INSERT', 'backfills', null)
), missing as (
    select format('%%s on %%s', privilege || coalesce(' (' || array_to_string(columns, ', ') || ')', ''), relname) as name
    from needed join pg_class t using (relname)
    where t.relnamespace = to_regnamespace(%(schema)s) and t.relkind = 'r'
      and case when columns is null then not has_table_privilege(t.oid, privilege)
               else exists (select from unnest(columns) c where not has_column_privilege(t.oid, c, privilege)) end
    union all
    select 'TEMPORARY on database ' || current_database()
    where not has_database_privilege(current_database(), 'TEMPORARY')
)
select coalesce(array_agg(name order by name), '{}') as missing from missing

-- name: touched
select call_id from touched_calls order by call_id limit %(limit)s

-- name: waiting_calls
-- A page of the calls that time may decide, by their start; what an exception stops is not among them.
select call_id, committed_at, started_at, committed_at < now() - make_interval(secs => %(deadline)s) as deadline_passed
from unsettled_facts
where ask_at is null and started_at >= %(after_start)s and (started_at, call_id) > (%(after_start)s, %(after_call)s)
order by started_at, call_id limit %(limit)s

-- name: own_calls
-- Those of the calls that this source has read, and whether the line says what the call costs.
select call_id, coalesce(header_cost_usd > 0 and provenance = 'response' and cache_key is null
                         and status between 200 and 299, false) as by_line
from usage_facts
where call_id = any(%(call_ids)s)
  and file_id in (select file_id from tail_files where source_id in (%(source_id)s, %(source_id)s || '.backfill'))

-- name: with_records
-- A join: of thousands of ids within ANY the planner looks at each, which takes longer than the answer where there is
-- none, and without statistics it reads the whole table for them.
select distinct s.call_id from spend_records s join unnest(%(call_ids)s::text[]) as wanted (call_id) using (call_id)

-- name: settle_facts
select f.*, f.occurred_at - make_interval(secs => coalesce(f.request_seconds, 0)::float8) as started_at,
       f.committed_at < now() - make_interval(secs => %(deadline)s) as deadline_passed,
       f.committed_at < now() - make_interval(secs => %(quiet)s) as quiet_over
from usage_facts f where f.call_id = any(%(call_ids)s)

-- name: settle_records
select call_id as key, *, received_at < now() - make_interval(secs => %(quiet)s) as quiet_over
from spend_records where call_id = any(%(call_ids)s) order by call_id, source, record_id

-- name: settle_receipts
select source_reference as key, * from charge_receipts
where source_system = 'litellm' and source_reference = any(%(call_ids)s)

-- name: settle_adjustments
select source_reference as key, * from charge_adjustments
where source_reference = any(%(call_ids)s) order by source_reference, created_at, evidence_hash

-- name: settle_exceptions
select call_id as key, * from call_exceptions where call_id = any(%(call_ids)s) order by call_id, kind, seq

-- name: settle_conflicts
select call_id as key, billing_account_id from call_conflicts
where call_id = any(%(call_ids)s) order by call_id, file_id, start_offset

-- name: insert_receipts
-- All of a batch as one JSON array: a statement of its own for each would cost more than the rows.
insert into charge_receipts (source_system, source_reference, billing_account_id, run_id, attempt, litellm_call_id,
                             charged_credits, provider_cost_usd, user_cost_usd, markup_factor, provenance, spend_source,
                             record_ids, charge_reason, receipt_kind, occurred_at)
select source_system, source_reference, billing_account_id, run_id, attempt, litellm_call_id,
       charged_credits, provider_cost_usd, user_cost_usd, markup_factor, provenance, spend_source,
       record_ids, charge_reason, receipt_kind, occurred_at
from json_to_recordset(%(rows)s::json) as r (
    source_system text, source_reference text, billing_account_id text, run_id text, attempt integer,
    litellm_call_id text, charged_credits bigint, provider_cost_usd numeric, user_cost_usd numeric,
    markup_factor numeric, provenance text, spend_source text, record_ids text[], charge_reason text,
    receipt_kind text, occurred_at timestamptz)

-- name: insert_details
insert into llm_charge_details (source_system, source_reference, provider_call_id, model, provider_model, provider,
                                tokens_in, tokens_out, cached_tokens, reasoning_tokens, response_cost_usd, cache_hit,
                                latency_ms, graph_id)
select source_system, source_reference, provider_call_id, model, provider_model, provider, tokens_in, tokens_out,
       cached_tokens, reasoning_tokens, response_cost_usd, cache_hit, latency_ms, graph_id
from json_to_recordset(%(rows)s::json) as r (
    source_system text, source_reference text, provider_call_id text, model text, provider_model text, provider text,
    tokens_in bigint, tokens_out bigint, cached_tokens bigint, reasoning_tokens bigint, response_cost_usd numeric,
    cache_hit boolean, latency_ms bigint, graph_id text)

-- name: insert_adjustment
insert into charge_adjustments (source_reference, evidence_hash, delta_credits, delta_cost_usd, reason, evidence,
                                created_by)
values (%(source_reference)s, %(evidence_hash)s, %(delta_credits)s, %(delta_cost_usd)s, %(reason)s, %(evidence)s,
        %(created_by)s)
on conflict do nothing

-- name: open_exception
insert into call_exceptions (call_id, kind, seq, detail) values (%(call_id)s, %(kind)s, %(seq)s, %(detail)s)

-- name: close_exception
update call_exceptions set closed_at = now(), closed_by = %(closed_by)s, reason = %(reason)s, detail = %(detail)s
where call_id = %(call_id)s and kind = %(kind)s and seq = %(seq)s and closed_at is null

-- name: unsettle_calls
insert into unsettled_facts (call_id, started_at)
select call_id, occurred_at - make_interval(secs => coalesce(request_seconds, 0)::float8)
from usage_facts where call_id = any(%(call_ids)s)
on conflict do nothing

-- name: open_page
-- A page of the open exceptions that other settings may decide, in the order of their index.
select kind, call_id from call_exceptions
where closed_at is null and kind in ('held_zero_cost', 'held_bad_cost', 'unattributed', 'cost_mismatch', 'overdue')
  and kind >= %(after_kind)s and (kind, call_id) > (%(after_kind)s, %(after_call)s)
order by kind, call_id limit %(limit)s

-- name: stop_calls
-- What an exception stops leaves the sweep's way.
update unsettled_facts u set ask_at = now() + make_interval(secs => %(seconds)s)
where u.call_id = any(%(call_ids)s) and u.ask_at is null
  and exists (select from call_exceptions e
              where e.call_id = u.call_id and e.closed_at is null
                and e.kind in ('held_zero_cost', 'held_bad_cost', 'unattributed', 'overdue', 'conflict'))

-- name: stopped_page
-- A page of the calls that are out of the sweep's way.
select call_id from unsettled_facts
where ask_at is not null and call_id > %(after_call)s order by call_id limit %(limit)s

-- name: resume_calls
update unsettled_facts u set ask_at = null
where u.call_id = any(%(call_ids)s) and u.ask_at is not null
  and not exists (select from call_exceptions e
                  where e.call_id = u.call_id and e.closed_at is null
                    and e.kind in ('held_zero_cost', 'held_bad_cost', 'unattributed', 'overdue', 'conflict'))

-- name: any_unlisted
select exists (select from unlisted_facts)

-- name: take_unlisted
-- The ranges of the oldest batch: one of each file that it read.
delete from unlisted_facts where committed_at = (select min(committed_at) from unlisted_facts)
returning file_id, start_offset, end_offset

-- name: list_facts
-- Whatever of a range still waits: `proof_unreceipted` says what does not.
insert into unsettled_facts (call_id, started_at, committed_at)
select f.call_id, f.occurred_at - make_interval(secs => coalesce(f.request_seconds, 0)::float8), f.committed_at
from usage_facts f
where f.file_id = %(file_id)s and f.start_offset >= %(start_offset)s and f.start_offset < %(end_offset)s
  and not exists (select from charge_receipts r where r.source_system = 'litellm' and r.source_reference = f.call_id)
  and not exists (select from call_exceptions e where e.call_id = f.call_id
                  and (e.kind = 'not_charged' and e.closed_at is null
                       or e.closed_by <> 'settler' and e.kind in ('held_zero_cost', 'held_bad_cost', 'unattributed',
                                                                  'overdue', 'conflict', 'not_charged')))
on conflict do nothing

-- name: forget_unsettled
delete from unsettled_facts where call_id = any(%(call_ids)s)

-- name: forget_touched
delete from touched_calls where call_id = any(%(call_ids)s)

-- name: unaudited_span
select counted_to, now() - make_interval(secs => %(grace)s) from unaudited_progress

-- name: claim_unaudited
update unaudited_progress set counted_to = %(to)s where counted_to = %(after)s

-- name: unaudited
-- Spend records without a line, and those of them whose line was skipped.
with skipped as (select call_id from skipped_calls)
select count(*) as records, count(k.call_id) as with_line,
       coalesce((array_agg(distinct k.call_id) filter (where k.call_id is not null))[:%(named_max)s], '{}') as call_ids
from spend_records s left join skipped k on k.call_id = s.call_id
where s.received_at > %(after)s and s.received_at <= %(to)s
  and not exists (select from usage_facts f where f.call_id = s.call_id)

-- name: announce
select pg_notify(%(channel)s, run_id) from usage_facts where call_id = %(call_id)s and run_id is not null

-- name: may_prune
select has_table_privilege('spend_records', 'DELETE') as may_delete, now() - make_interval(days => %(days)s) as before,
       current_user::text as role,
       (select relowner::regrole::text from pg_class where oid = 'spend_records'::regclass) as owner

-- name: begin_prune
insert into prunes (received_before, records, calls, reason, pruned_by)
values (%(before)s, 0, 0, %(reason)s, %(person)s) returning prune_id

-- name: prune_page
-- The next records by call id, and the calls among them that may go.
with page as (
    select call_id, received_at < %(before)s
                    and not exists (select from usage_facts f where f.call_id = s.call_id) as may_go
    from spend_records s where call_id > %(after)s order by call_id limit %(rows)s
)
select max(call_id) as last, coalesce(array_agg(distinct call_id) filter (where may_go), '{}') as call_ids from page

-- name: old_unaudited
-- Part of the next two. All records of a call go, or none: what it costs is the sum of all.
from spend_records s
where s.call_id = any(%(call_ids)s)
  and not exists (select from usage_facts f where f.call_id = s.call_id)
  and not exists (select from spend_records n where n.call_id = s.call_id and n.received_at >= %(before)s)

-- name: count_unaudited
select count(distinct call_id) as calls, count(*) as records, coalesce(sum(cost_usd), 0) as cost_usd {unaudited}

-- name: delete_unaudited
delete {unaudited} returning s.call_id, s.cost_usd

-- name: hold_facts
lock table usage_facts in share mode

-- name: count_prune
update prunes set records = records + %(records)s, calls = calls + %(calls)s, cost_usd = cost_usd + %(cost_usd)s
where prune_id = %(prune_id)s

-- name: end_prune
update prunes set finished_at = now() where prune_id = %(prune_id)s

-- name: go_by_keys
-- For a transaction of the next three: of few calls among millions, however the planner estimates them.
select set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)

-- name: poll_window
-- An hour of starts, from the first call on that waits.
with own as (
    select file_id from tail_files where source_id in (%(source_id)s, %(source_id)s || '.backfill')
), first as (
    select u.started_at as at from unsettled_facts u join usage_facts f using (call_id)
    where u.ask_at is null and u.started_at > %(started_after)s and f.file_id in (select file_id from own)
    order by u.started_at limit 1
)
select now() as asked_at, min(u.started_at) as started_from, max(u.started_at) as started_to,
       max(f.occurred_at) as ended_to
from unsettled_facts u join usage_facts f using (call_id)
where u.ask_at is null and f.file_id in (select file_id from own)
  and u.started_at >= (select at from first) and u.started_at <= (select at from first) + interval '1 hour'

-- name: stragglers
-- Given up, and their turn has come: asked for by name, a few at a time.
select u.call_id, u.committed_at from unsettled_facts u join usage_facts f using (call_id)
where u.ask_at <= now()
  and f.file_id in (select file_id from tail_files where source_id in (%(source_id)s, %(source_id)s || '.backfill'))
order by u.ask_at limit %(limit)s

-- name: late_calls
-- Waiting for longer than LiteLLM takes to write its rows.
select u.call_id, u.committed_at, u.started_at from unsettled_facts u join usage_facts f using (call_id)
where u.ask_at is null and u.started_at >= %(after_start)s
  and (u.started_at, u.call_id) > (%(after_start)s, %(after_call)s) and u.committed_at < now() - interval '30 seconds'
  and f.file_id in (select file_id from tail_files where source_id in (%(source_id)s, %(source_id)s || '.backfill'))
order by u.started_at, u.call_id limit %(limit)s

-- name: ask_later
update unsettled_facts set ask_at = %(ask_at)s where call_id = %(call_id)s and ask_at is not null

-- name: settle_counts
-- Of those not listed yet, some may be settled.
select (select count(*) from unsettled_facts) + (select coalesce(sum(facts), 0)::bigint from unlisted_facts) as pending,
       extract(epoch from least((select min(committed_at) from unsettled_facts),
                                (select min(committed_at) from unlisted_facts)))::float8 as oldest_pending

-- name: open_exceptions
select kind, count(*) as n from call_exceptions where closed_at is null group by kind

-- name: read_only_session
select set_config('default_transaction_read_only', 'on', false), set_config('statement_timeout', %(timeout)s, false)

-- name: call_standings
-- Part of the next two, which say of which calls. What a person closed as not charged stays so. Each look goes by a
-- table's key, on the call's own shard: the groups are of one row, or of one call, and keep a planner from reading a table
-- whole, whatever it believes of a run's size. opened: of `kinds`, one by one.
select f.call_id, f.occurred_at, f.status, r.source_reference is not null as charged,
       r.source_reference is not null or (coalesce(e.not_charged, false) and not coalesce(e.stopped, false)) as settled,
       e.kinds, e.opened, coalesce(r.charged_credits, 0) + coalesce(a.credits, 0) as charged_credits,
       coalesce(r.provider_cost_usd, 0) + coalesce(a.cost_usd, 0) as provider_cost_usd,
       coalesce(r.user_cost_usd, 0) + coalesce(a.cost_usd * r.markup_factor, 0) as user_cost_usd
from usage_facts f
left join lateral (select source_reference, charged_credits, provider_cost_usd, user_cost_usd, markup_factor
                   from charge_receipts where source_system = 'litellm' and source_reference = f.call_id
                   group by source_system, source_reference) r on true
left join lateral (select sum(delta_credits)::bigint as credits, sum(delta_cost_usd) as cost_usd
                   from charge_adjustments where source_reference = f.call_id group by source_reference) a on true
left join lateral (select bool_or(kind = 'not_charged' and (closed_at is null or closed_by <> 'settler')) as not_charged,
                          bool_or(closed_at is null and kind in ('held_zero_cost', 'held_bad_cost', 'unattributed',
                                                                 'overdue', 'conflict')) as stopped,
                          array_agg(kind order by kind, seq) filter (where closed_at is null) as kinds,
                          array_agg(opened_at order by kind, seq) filter (where closed_at is null) as opened
                   from call_exceptions where call_id = f.call_id group by call_id) e on true

-- name: run_status
-- One statement, so that the sums, the exceptions and as_of are of one moment.
with standings as materialized ({standings}
    where f.run_id = %(run_id)s
), sums as (
    select count(*) as calls, count(*) filter (where settled) as settled,
           coalesce(sum(charged_credits), 0)::bigint as charged_credits,
           coalesce(sum(provider_cost_usd), 0) as provider_cost_usd, coalesce(sum(user_cost_usd), 0) as user_cost_usd,
           coalesce(array_agg(call_id) filter (where settled and call_id = any(%(named)s)), array[]::text[])
               as settled_named
    from standings
), exceptions as (
    select s.call_id, e.kind, e.opened_at from standings s cross join unnest(s.kinds, s.opened) e (kind, opened_at)
    where s.kinds is not null and e.kind not in ('model_mismatch', 'call_id_not_forwarded')
    order by e.opened_at, s.call_id, e.kind limit %(exceptions_max)s
), files as (
    select path, committed_offset from tail_files where source_id = %(source_id)s and state <> 'final'
    order by last_commit_at desc nulls last, file_id desc limit %(files_max)s
)
select sums.*, statement_timestamp() as time,
       (select coalesce(jsonb_agg(to_jsonb(exceptions)), '[]') from exceptions) as exceptions,
       (select coalesce(jsonb_agg(to_jsonb(files) order by path), '[]') from files) as files
from sums

-- name: run_calls
with standings as materialized ({standings}
    where f.call_id = any(array(select call_id from usage_facts
                                where run_id = %(run_id)s and call_id > %(after)s order by call_id limit %(limit)s))
), details as (
    select source_reference, model, tokens_in, tokens_out, cache_hit from llm_charge_details
    where source_system = 'litellm' and source_reference = any(array(select call_id from standings))
)
select s.call_id, s.occurred_at, s.status as http_status, s.charged, s.settled, s.kinds, s.charged_credits,
       s.provider_cost_usd, s.user_cost_usd, d.model, d.tokens_in, d.tokens_out, d.cache_hit
from standings s left join details d on d.source_reference = s.call_id
order by s.call_id

-- name: call_fact
select * from usage_facts where call_id = %(call_id)s

-- name: call_details
select * from llm_charge_details where source_system = 'litellm' and source_reference = %(call_id)s

-- name: call_conflicts
select * from call_conflicts where call_id = %(call_id)s order by file_id, start_offset limit %(limit)s

-- name: call_records
select * from spend_records where call_id = %(call_id)s order by source, record_id limit %(limit)s

-- name: call_files
select file_id, source_id, path, generation, device, inode, head, state, committed_offset
from tail_files where file_id = any(%(file_ids)s)

-- name: deciding
-- Taken by a settler for a batch, and by an operator's verb.
select pg_advisory_xact_lock(%(key)s)

-- name: settlement_totals
-- All receipts are this source's where there is no other one: a join of all of them is slow.
select (select count(*) from unsettled_facts join usage_facts f using (call_id)
        where f.file_id in (select file_id from tail_files
                            where source_id in (%(source_id)s, %(source_id)s || '.backfill')))
       + (select coalesce(sum(facts), 0)::bigint from unlisted_facts join tail_files using (file_id)
          where source_id in (%(source_id)s, %(source_id)s || '.backfill')) as pending_calls,
       case when not exists (select 1 from tail_files
                             where source_id in (%(source_id)s, %(source_id)s || '.backfill')) then 0
            when not exists (select 1 from tail_files
                             where source_id not in (%(source_id)s, %(source_id)s || '.backfill'))
            then (select count(*) from charge_receipts)
            else (select count(*) from charge_receipts r join usage_facts f on f.call_id = r.source_reference
                  where f.file_id in (select file_id from tail_files
                                      where source_id in (%(source_id)s, %(source_id)s || '.backfill'))) end as receipts

-- name: settlement_exceptions
select e.kind, count(*) as n
from call_exceptions e join usage_facts using (call_id) join tail_files using (file_id)
where e.closed_at is null and source_id in (%(source_id)s, %(source_id)s || '.backfill')
group by e.kind order by e.kind

-- name: explain_fact
select f.*, t.path as file_path, t.source_id
from usage_facts f left join tail_files t using (file_id) where f.call_id = %(call_id)s

-- name: explain_records
select s.*, t.path as file_path
from spend_records s left join tail_files t using (file_id)
where s.call_id = %(call_id)s order by s.source, s.started_at, s.record_id

-- name: explain_receipt
select * from charge_receipts where source_system = 'litellm' and source_reference = %(call_id)s

-- name: explain_details
select * from llm_charge_details where source_system = 'litellm' and source_reference = %(call_id)s

-- name: explain_adjustments
select * from charge_adjustments where source_reference = %(call_id)s order by created_at, evidence_hash

-- name: explain_exceptions
select * from call_exceptions where call_id = %(call_id)s order by opened_at, kind, seq

-- name: explain_conflicts
select c.*, t.path as file_path
from call_conflicts c left join tail_files t using (file_id)
where c.call_id = %(call_id)s order by c.file_id, c.start_offset

-- name: receipts
-- The newest are chosen before anything is joined to them.
with newest as (
    select * from charge_receipts
    where (%(run_id)s::text is null
           or run_id = %(run_id)s and source_system = 'litellm'
              and source_reference = any(array(select call_id from usage_facts where run_id = %(run_id)s)))
      and (%(account)s::text is null or billing_account_id = %(account)s)
      and (%(since)s::timestamptz is null or created_at >= %(since)s)
    order by created_at desc, source_reference limit %(limit)s
)
select n.source_reference as call_id, n.billing_account_id, n.run_id, n.attempt, n.charged_credits,
       n.provider_cost_usd, n.user_cost_usd, n.markup_factor, n.provenance, n.spend_source, n.record_ids,
       n.occurred_at, n.created_at, d.model, d.provider_model, d.tokens_in, d.tokens_out, d.cache_hit,
       coalesce(a.credits, 0)::bigint as adjusted_credits, coalesce(a.cost, 0) as adjusted_cost_usd,
       (n.charged_credits + coalesce(a.credits, 0))::bigint as total_credits
from newest n
left join llm_charge_details d on d.source_system = n.source_system and d.source_reference = n.source_reference
left join (select source_reference, sum(delta_credits) as credits, sum(delta_cost_usd) as cost
           from charge_adjustments where source_reference in (select source_reference from newest)
           group by source_reference) a on a.source_reference = n.source_reference
order by n.created_at desc, n.source_reference

-- name: exceptions
with newest as (
    select * from call_exceptions
    where (%(all)s or closed_at is null) and (%(kind)s::text is null or kind = %(kind)s)
    order by opened_at desc, call_id, kind, seq limit %(limit)s
)
select n.call_id, n.kind, n.seq, n.opened_at, n.closed_at, n.closed_by, n.reason, f.run_id, f.billing_account_id,
       f.occurred_at, n.detail
from newest n left join usage_facts f using (call_id)
order by n.opened_at desc, n.call_id, n.kind, n.seq

-- name: reconcile_calls
-- Where each call of a window stands. A person who closes the last exception of a call without a receipt has decided
-- that it is not charged: `closed`. Exceptions and adjustments of all other calls, however many, are left alone.
with kinds as (
    select call_id, array_agg(kind) filter (where closed_at is null) as open,
           bool_or(kind = 'not_charged' and (closed_by is null or closed_by <> 'settler')) as not_charged
    from call_exceptions
    where call_id in (select call_id from usage_facts where occurred_at >= %(start)s and occurred_at < %(end)s)
    group by call_id
), adjusted as (
    select source_reference, sum(delta_credits) as credits, sum(delta_cost_usd) as cost
    from charge_adjustments
    where source_reference in (select call_id from usage_facts
                               where occurred_at >= %(start)s and occurred_at < %(end)s)
    group by source_reference
)
select f.call_id, f.occurred_at - make_interval(secs => coalesce(f.request_seconds, 0)::float8) as started_at,
       case when r.source_reference is not null
                 and k.open && array['cost_mismatch', 'held_zero_cost', 'held_bad_cost', 'conflict'] then 'unapplied'
            when r.source_reference is not null then 'settled'
            when k.open && array['held_zero_cost', 'held_bad_cost', 'conflict'] then 'held'
            when 'unattributed' = any(k.open) then 'unattributed'
            when 'overdue' = any(k.open) then 'overdue'
            when k.not_charged then 'not_charged'
            when u.call_id is not null then 'pending'
            -- one transaction made both; by ranges, each of these calls would be held against all of its file's
            when (f.file_id, f.committed_at) in (select file_id, committed_at from unlisted_facts) then 'pending'
            else 'closed' end as standing,
       r.provider_cost_usd + coalesce(a.cost, 0) as provider_cost_usd,
       r.charged_credits + coalesce(a.credits, 0)::bigint as credits,
       exists (select from spend_records s where s.call_id = f.call_id) as has_records
from usage_facts f
left join charge_receipts r on r.source_system = 'litellm' and r.source_reference = f.call_id
                               and r.occurred_at >= %(start)s and r.occurred_at < %(end)s  -- it is the fact's
left join adjusted a on a.source_reference = f.call_id
left join kinds k on k.call_id = f.call_id
left join unsettled_facts u on u.call_id = f.call_id
where f.occurred_at >= %(start)s and f.occurred_at < %(end)s

-- name: closed_window
select moment - interval '15 minutes' as start, moment as "end"
from date_trunc('minute', now() - make_interval(secs => %(closed)s)) as moment

-- name: reconcile_window
with calls as ({calls})
select count(*) as billable,
       count(*) filter (where standing = 'settled') as settled,
       count(*) filter (where standing = 'not_charged') as not_charged,
       count(*) filter (where standing = 'pending') as pending,
       count(*) filter (where standing = 'held') as held,
       count(*) filter (where standing = 'unattributed') as unattributed,
       count(*) filter (where standing = 'overdue') as overdue,
       count(*) filter (where standing = 'unapplied') as unapplied,
       count(*) filter (where standing = 'closed') as closed,
       coalesce(sum(provider_cost_usd), 0) as provider_cost_usd,
       coalesce(sum(credits), 0)::bigint as charged_credits
from calls

-- name: known_calls
select call_id from usage_facts where call_id = any(%(call_ids)s)

-- name: server_time
select now()

-- name: models_seen
select distinct model_group, model from spend_records

-- name: proof_files
-- A generation with its last committed range and how far back it was ever rewound, at one moment: what is committed
-- afterwards is not looked at. Rows behind the offset are left by a rewind alone.
select f.file_id, f.path, f.device, f.inode, f.generation, f.previous_file_id, f.head, f.committed_offset,
       f.frontier_sha256, f.frontier_bytes, f.size_seen, f.state, f.blocked_reason, f.dead_letter_bytes,
       f.first_seen_at, f.last_commit_at, f.source_id,
       b.start_offset as last_start, b.end_offset as last_end, b.sha256 as last_sha256, b.counts as last_counts,
       (select min(new_offset) from offset_resets r
        where r.file_id = f.file_id and r.new_offset < r.old_offset) as rewound_to,
       (select count(*) from offset_resets r where r.file_id = f.file_id) as resets,
       (select min(start_offset) from tail_batches t
        where t.file_id = f.file_id and t.end_offset > f.committed_offset) as batch_beyond,
       (select count(*) from dead_letters d where d.file_id = f.file_id and d.resolved_at is null) as letters_open
from tail_files f
left join lateral (select start_offset, end_offset, sha256, counts from tail_batches t
                   where t.file_id = f.file_id order by t.start_offset desc limit 1) b on true
where f.source_id in (%(source_id)s, %(source_id)s || '.backfill') and f.file_id > %(after)s
order by f.file_id limit %(limit)s

-- name: proof_beyond
-- The first fact behind each offset, if there is one: in a transaction with the last one's moment.
select u.file_id, min(u.start_offset) as fact_beyond from usage_facts u join tail_files f using (file_id)
where f.file_id = any(%(file_ids)s) and u.start_offset >= f.committed_offset group by u.file_id

-- name: proof_tiles
-- Committed ranges and gaps below an offset, in order.
select start_offset, end_offset, sha256, counts from (
    select start_offset, end_offset, sha256, counts, 0 as kind from tail_batches where file_id = %(file_id)s
    union all
    select start_offset, end_offset, null, null, 1 from log_gaps where file_id = %(file_id)s
) tiles
where (start_offset, kind) > (%(after)s, %(kind)s) and start_offset < %(before)s
order by start_offset, kind limit %(limit)s

-- name: proof_facts
-- Packed: eight bytes an offset, big endian. Ordered once, by the index, not by each aggregate; the offset keeps the order
-- where the rows come from several shards.
select coalesce(string_agg(int8send(start_offset), ''::bytea), '') as starts,
       coalesce(string_agg(int8send(end_offset), ''::bytea), '') as ends,
       coalesce(array_agg(start_offset) filter (where line_sha256 is not null), '{}') as hashed,
       coalesce(array_agg(line_sha256) filter (where line_sha256 is not null), '{}') as hashes
from (select start_offset, end_offset, line_sha256 from usage_facts
      where file_id = %(file_id)s and start_offset >= %(start)s and start_offset < %(end)s
      order by start_offset offset 0) facts

-- name: proof_letters
select start_offset, end_offset, sha256 from dead_letters
where file_id = %(file_id)s and start_offset >= %(start)s and start_offset < %(end)s order by start_offset

-- name: proof_conflicts
select start_offset, end_offset from call_conflicts
where file_id = %(file_id)s and start_offset >= %(start)s and start_offset < %(end)s order by start_offset

-- name: proof_receipts
-- What stands beside each receipt is looked up by its key: of an EXISTS the planner may read the whole table, each time.
select r.source_system, r.source_reference, r.source_reference as call_id,
       (select true from usage_facts f where f.call_id = r.source_reference) is true as has_fact,
       (select true from llm_charge_details d
        where d.source_system = r.source_system and d.source_reference = r.source_reference) is true as has_details,
       (select true from touched_calls t where t.call_id = r.source_reference) is true as is_touched,
       (select true from charge_receipts o where o.source_system = 'litellm' and r.source_system <> 'litellm'
        and o.source_reference = r.source_reference) is true as is_second
from charge_receipts r where (r.source_system, r.source_reference) > (%(system)s, %(after)s)
order by r.source_system, r.source_reference limit %(limit)s

-- name: proof_page_unreceipted
select call_id from usage_facts where call_id > %(after)s order by call_id limit %(limit)s

-- name: proof_unreceipted
-- Facts that nothing waits for any more, without a receipt and without a reason why there is none: attempts that
-- failed and cost nothing, or what a person closed of that which keeps a call from having a receipt.
select call_id from usage_facts f
where call_id = any(%(call_ids)s)
  and not exists (select from charge_receipts r where r.source_system = 'litellm' and r.source_reference = f.call_id)
  and not exists (select from unsettled_facts u where u.call_id = f.call_id)
  and not exists (select from unlisted_facts l where l.file_id = f.file_id
                  and l.start_offset <= f.start_offset and l.end_offset > f.start_offset)
  and not exists (select from call_exceptions e where e.call_id = f.call_id
                  and (e.kind = 'not_charged' and e.closed_at is null
                       or e.closed_by <> 'settler' and e.kind in ('held_zero_cost', 'held_bad_cost', 'unattributed',
                                                                  'overdue', 'conflict', 'not_charged')))
order by call_id

-- name: proof_page_odd_details
select source_reference from llm_charge_details
where source_reference > %(after)s and source_system = 'litellm' order by source_system, source_reference limit %(limit)s

-- name: proof_odd_details
select source_reference from llm_charge_details d
where source_system = 'litellm' and source_reference = any(%(call_ids)s)
  and not exists (select from charge_receipts r where r.source_system = d.source_system
                  and r.source_reference = d.source_reference)
order by source_reference

-- name: proof_page_odd_adjustments
select distinct source_reference from charge_adjustments
where source_reference > %(after)s order by source_reference limit %(limit)s

-- name: proof_odd_adjustments
select distinct source_reference from charge_adjustments a
where source_reference = any(%(call_ids)s)
  and not exists (select from charge_receipts r where r.source_system = 'litellm'
                  and r.source_reference = a.source_reference)
order by source_reference

-- name: proof_keys
-- Which of the tables of money have the unique key that keeps a call from being charged twice.
select i.indrelid::regclass::text as name from pg_index i
where i.indrelid in ('charge_receipts'::regclass, 'llm_charge_details'::regclass)
  and i.indisunique and i.indisvalid and i.indpred is null
  and (select array_agg(a.attname::text order by a.attname) from pg_attribute a
       where a.attrelid = i.indrelid and a.attnum = any(i.indkey)) = array['source_reference', 'source_system']

-- name: resolve_letter
update dead_letters
set resolved_at = now(), resolution = %(resolution)s, resolved_by = %(by)s, resolved_reason = %(reason)s
where dead_letter_id = %(dead_letter_id)s and resolved_at is null

-- name: files_elsewhere
select file_id, path, device, inode, generation, previous_file_id, head, committed_offset, frontier_sha256,
       frontier_bytes, size_seen, state, blocked_reason, dead_letter_bytes, first_seen_at, last_commit_at
from tail_files where source_id not like '%%.backfill' order by file_id

-- name: insert_backfill
insert into backfills (file_id, path, from_offset, reason, started_by)
values (%(file_id)s, %(path)s, %(from_offset)s, %(reason)s, %(by)s)
