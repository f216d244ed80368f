-- Spreads what is kept per call over the workers of a Citus cluster, by call id. On the coordinator, as the owner of the
-- schema, after every `billing-tailer migrate`, and before grants.sql; stop the daemons for it where there are rows:
--
--   psql postgresql://billing_owner@db/billing -v schema=billing -f deploy/citus.sql
--
-- It may be run again: tables that are distributed are left alone. docs/growing.md has the whole way.
--
-- All these tables are co-located: the rows of one call are on one shard, so that they are joined there, and each unique
-- key contains the call id, since a shard knows of no other. The daemon's COPY and INSERT into them and its UPDATE of
-- the local position are one transaction (two-phase where several workers take part).
--
-- unlisted_facts has byte ranges, and is looked at beside the facts: a copy of these few rows is on each worker.
-- Positions (tail_*, log_gaps, dead_letters, offset_resets, backfills), skipped_calls, unaudited_progress, prunes and
-- schema_migrations stay plain tables of the coordinator: they are small, their keys are file ids and sequences, and who
-- commits is decided there. Nothing of them has to be known to Citus. Daemons connect to the coordinator alone, whose
-- advisory locks keep them apart: a lock taken on a worker would be another one.
--
-- tests/test_citus.py holds the schema to what this needs, without a cluster.

\set ON_ERROR_STOP on
\if :{?schema} \else \set schema billing \endif

begin;
set local client_min_messages = warning;
-- one connection a worker, so that all tables can be distributed in one transaction
set local citus.multi_shard_modify_mode = 'sequential';

create temporary table citus_plan on commit drop as
select row_number() over () as step, relation, call_column, format('%I.%I', :'schema', relation)::regclass as oid
from (values
    ('usage_facts', 'call_id'),  -- the first one: the others go where it is
    ('call_conflicts', 'call_id'),
    ('spend_records', 'call_id'),
    ('unsettled_facts', 'call_id'),
    ('touched_calls', 'call_id'),
    ('call_exceptions', 'call_id'),
    ('charge_receipts', 'source_reference'),
    ('llm_charge_details', 'source_reference'),
    ('charge_adjustments', 'source_reference')
) plan (relation, call_column);

-- `none`: a group of its own, whatever else the cluster has
select count(create_distributed_table(
           oid, call_column,
           colocate_with => case step when 1 then 'none' else format('%I.usage_facts', :'schema') end)) as distributed
from (select * from citus_plan
      where not exists (select from pg_dist_partition p where p.logicalrelid = citus_plan.oid) order by step) todo
\g /dev/null

select create_reference_table(oid) from (select format('%I.unlisted_facts', :'schema')::regclass as oid) u
where not exists (select from pg_dist_partition p where p.logicalrelid = oid)
\g /dev/null

commit;

-- Where there were rows, they have been copied to the shards: the coordinator's own copies are not seen any more.
\o /dev/null
select truncate_local_data_after_distributing_table(p.logicalrelid)
from pg_dist_partition p join pg_class c on c.oid = p.logicalrelid
where c.relnamespace = quote_ident(:'schema')::regnamespace and p.partmethod = 'h';
\o

select table_name, distribution_column, colocation_id, shard_count from citus_tables
where table_name in (select oid::regclass from pg_class where relnamespace = quote_ident(:'schema')::regnamespace)
order by 1;
