-- What the activity page, GET /v1/activity and the verb export ask. Times are those of the calls (occurred_at, the end of
-- a request), and only what LiteLLM charged counts: source_system litellm.

-- name: activity_memory
set local work_mem = '32MB'

-- name: activity_sums
-- Receipts and adjustments by bucket and model, and, in rows of their own, by account: each receipt is looked at twice,
-- since Citus plans no grouping sets. `name` is the model's or the account's: of three keys the planner would expect so
-- many groups that it sorts. A receipt and its details have one created_at, which finds them through the index of block
-- ranges; the key decides which belong together.
with bounds as materialized (
    select min(created_at) as first, max(created_at) as last from charge_receipts
    where source_system = 'litellm' and occurred_at >= %(start)s and occurred_at < %(end)s
), sums as materialized (  -- the limit is not to choose a plan
    select case when not by_account then date_bin(%(bucket)s, r.occurred_at, %(origin)s) end as bucket,
           case when by_account then r.billing_account_id else d.model end as name, by_account,
           count(*) as charged_calls,
           coalesce(sum(d.tokens_in), 0)::bigint as tokens_in, coalesce(sum(d.tokens_out), 0)::bigint as tokens_out,
           coalesce(sum(d.cached_tokens), 0)::bigint as cached_tokens,
           sum(r.provider_cost_usd) + coalesce(sum(a.cost), 0) as cost_usd,
           (sum(r.charged_credits) + coalesce(sum(a.credits), 0))::numeric as charged_credits
    from charge_receipts r
    left join llm_charge_details d
        on d.source_system = 'litellm' and d.source_reference = r.source_reference
           and d.created_at between (select first from bounds) and (select last from bounds)
    left join (select source_reference, sum(delta_credits) as credits, sum(delta_cost_usd) as cost
               from charge_adjustments
               where source_reference in (select source_reference from charge_receipts
                                          where source_system = 'litellm'
                                            and occurred_at >= %(start)s and occurred_at < %(end)s)
               group by source_reference) a on a.source_reference = r.source_reference
    cross join (values (false), (true)) as twice (by_account)
    where r.source_system = 'litellm' and r.occurred_at >= %(start)s and r.occurred_at < %(end)s {conditions}
    group by 1, 2, 3
)
select * from sums order by by_account limit %(limit)s

-- name: activity_of_account
and r.billing_account_id = %(account)s

-- name: activity_of_model
and d.model = %(model)s

-- name: activity_of_run
and r.run_id = %(run_id)s
and r.source_reference = any(array(select call_id from usage_facts where run_id = %(run_id)s))

-- name: activity_calls_of_account
-- Goes behind reconcile_calls, which ends with its conditions: the receipt's account, else the line's.
and coalesce(r.billing_account_id, f.billing_account_id) = %(account)s

-- name: activity_receipts
-- The newest before a place in the order of (occurred_at, call id), chosen before anything else is joined to them. Each
-- look goes by a table's key, on the call's own shard.
select r.source_reference as call_id, r.occurred_at, r.billing_account_id, r.run_id, r.attempt, d.graph_id, d.model,
       d.provider_model, d.provider, d.tokens_in, d.tokens_out, d.cached_tokens, d.reasoning_tokens, d.cache_hit,
       d.latency_ms, r.provenance, r.spend_source, r.markup_factor, r.provider_cost_usd,
       coalesce(a.cost, 0) as adjusted_cost_usd, r.provider_cost_usd + coalesce(a.cost, 0) as total_cost_usd,
       r.charged_credits, coalesce(a.credits, 0)::bigint as adjusted_credits,
       (r.charged_credits + coalesce(a.credits, 0))::bigint as total_credits, r.created_at
from charge_receipts r
left join lateral (select * from llm_charge_details
                   where source_system = 'litellm' and source_reference = r.source_reference
                   group by source_system, source_reference) d on true
left join lateral (select sum(delta_credits) as credits, sum(delta_cost_usd) as cost
                   from charge_adjustments where source_reference = r.source_reference
                   group by source_reference) a on true
where r.source_system = 'litellm' and r.source_reference = any(array(
    select r.source_reference from charge_receipts r {details}
    where r.source_system = 'litellm' and r.occurred_at >= %(start)s and r.occurred_at <= %(end)s
      and (r.occurred_at, r.source_reference) < (%(end)s, %(before)s) {conditions}
    order by r.occurred_at desc, r.source_reference desc limit %(limit)s))
order by r.occurred_at desc, r.source_reference desc

-- name: activity_with_details
join llm_charge_details d on d.source_system = 'litellm' and d.source_reference = r.source_reference

-- name: activity_exceptions
with page as materialized (
    select * from call_exceptions
    where (%(all)s or closed_at is null) and (%(kind)s::text is null or kind = %(kind)s)
      and (%(opened_at)s::timestamptz is null
           or (opened_at, call_id, kind, seq) < (%(opened_at)s, %(call_id)s, %(after_kind)s, %(seq)s))
    order by opened_at desc, call_id desc, kind desc, seq desc limit %(limit)s
), facts as (
    select call_id, run_id, billing_account_id, occurred_at from usage_facts
    where call_id = any(array(select call_id from page))
)
select p.call_id, p.kind, p.seq, p.opened_at, p.closed_at, p.closed_by, p.reason, p.detail, f.run_id,
       f.billing_account_id, f.occurred_at
from page p left join facts f using (call_id)
order by p.opened_at desc, p.call_id desc, p.kind desc, p.seq desc

-- name: activity_letters
with page as materialized (
    select * from dead_letters
    where (%(all)s or resolved_at is null) and (%(before)s::bigint is null or dead_letter_id < %(before)s)
    order by dead_letter_id desc limit %(limit)s
)
select p.dead_letter_id, p.file_id, t.source_id, t.path, p.start_offset, p.end_offset, p.reason, p.detail,
       substring(p.raw for %(raw_bytes)s) as raw, p.created_at, p.resolved_at, p.resolution, p.resolved_by,
       p.resolved_reason
from page p join tail_files t using (file_id)
order by p.dead_letter_id desc

-- name: activity_open
-- Counted to a limit: a page must not wait for millions of them.
select (select coalesce(jsonb_object_agg(kind, n), '{}')
        from (select kind, count(*) as n from call_exceptions where closed_at is null group by kind) k) as exceptions,
       (select count(*) from (select 1 from dead_letters where resolved_at is null limit %(letters_max)s) l)
           as dead_letters,
       statement_timestamp() as time

-- name: activity_unsettled
-- When the oldest call ended that is not settled, of all, and of those that do not wait for a person. A call that began
-- after the end of the one that began first cannot have ended before it: few are looked up by key.
with stopped as materialized (
    select call_id from call_exceptions
    where closed_at is null and kind in ('held_zero_cost', 'held_bad_cost', 'unattributed', 'overdue', 'conflict')
), waiting as materialized (
    select call_id, started_at from unsettled_facts u
    where not exists (select from stopped s where s.call_id = u.call_id)
), first_of_all as materialized (
    select occurred_at from usage_facts
    where call_id = (select call_id from unsettled_facts order by started_at limit 1)
), first_waiting as materialized (
    select occurred_at from usage_facts where call_id = (select call_id from waiting order by started_at limit 1)
)
select least((select min(ended_from) from unlisted_facts),
             (select min(occurred_at) from usage_facts
              where call_id = any(array(select call_id from unsettled_facts
                                        where started_at <= (select occurred_at from first_of_all)))))
           as unsettled_since,
       least((select min(ended_from) from unlisted_facts),
             (select min(occurred_at) from usage_facts
              where call_id = any(array(select call_id from waiting
                                        where started_at <= (select occurred_at from first_waiting)))))
           as waiting_since

-- name: activity_files
-- The files that are not finished.
select file_id, source_id, path, state, committed_offset, size_seen
from tail_files where state <> 'final' and source_id not like '%%.backfill' order by file_id

-- name: activity_last_call
-- When the last call ended of which a file has the line, below an offset.
select occurred_at from usage_facts
where file_id = %(file_id)s and start_offset < %(committed_offset)s order by start_offset desc limit 1
