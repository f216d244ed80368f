-- Every statement of the ledger by name. Unqualified names: the session's search_path is the schema.

-- name: positions
select file_id, path, device, inode, generation, previous_file_id, head, committed_offset, frontier_sha256,
       frontier_bytes, size_seen, state, blocked_reason, dead_letter_bytes, first_seen_at, last_commit_at
from tail_files where source_id = %(source_id)s order by file_id

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

-- name: insert_gap
insert into log_gaps (file_id, start_offset, end_offset, reason)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(reason)s)
on conflict do nothing

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

-- name: insert_dead_letter
insert into dead_letters (file_id, start_offset, end_offset, reason, detail, raw, sha256)
values (%(file_id)s, %(start_offset)s, %(end_offset)s, %(reason)s, %(detail)s, %(raw)s, %(sha256)s)
on conflict (file_id, start_offset) do nothing

-- name: insert_fact
insert into usage_facts ({columns}) values ({values})

-- name: copy_facts
copy usage_facts ({columns}) from stdin

-- name: copy_staged
copy staged_facts ({columns}, line_number) from stdin

-- name: create_staging
create temporary table staged_facts (like usage_facts including defaults, line_number integer not null) on commit drop

-- name: insert_staged
insert into usage_facts ({columns})
select distinct on (call_id) {columns}
from staged_facts order by call_id, line_number
on conflict (call_id) do nothing
returning call_id

-- name: classify_staged
-- The line that made the fact is the one at the fact's own range, unless that range was read before: then it is a
-- replay like any other second line of the same request. Compared on what identifies a request: nginx's id, or, where
-- the log has none, the line itself.
select s.line_number, s.file_id,
       (f.nginx_request_id is not distinct from s.nginx_request_id
        and f.line_sha256 is not distinct from s.line_sha256)
       or exists (select from call_conflicts c
                  where c.call_id = s.call_id
                    and c.nginx_request_id is not distinct from s.nginx_request_id
                    and c.line_sha256 is not distinct from s.line_sha256) as replayed
from staged_facts s join usage_facts f using (call_id)
where not s.line_number = any(%(inserted)s)
order by s.line_number

-- name: insert_conflicts
insert into call_conflicts (call_id, file_id, start_offset, end_offset, nginx_request_id, line_sha256, run_id,
                            billing_account_id, status, occurred_at)
select call_id, file_id, start_offset, end_offset, nginx_request_id, line_sha256, run_id, billing_account_id, status,
       occurred_at
from staged_facts where line_number = any(%(conflicts)s)
on conflict do nothing

-- name: newest_reset
select max(applied_at) from offset_resets where source_id = %(source_id)s

-- name: reset_by_id
select source_id, path, requested, new_offset, applied_at from offset_resets where reset_id = %(reset_id)s

-- name: insert_reset
insert into offset_resets (reset_id, source_id, file_id, path, requested, old_offset, new_offset, source, reason)
values (%(reset_id)s, %(source_id)s, %(file_id)s, %(path)s, %(requested)s, %(old_offset)s, %(new_offset)s, %(source)s,
        %(reason)s)

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

-- name: delete_open_dead_letters_from
delete from dead_letters where file_id = %(file_id)s and start_offset >= %(offset)s and resolved_at is null

-- name: rewind_position
update tail_files
set committed_offset = %(new_offset)s, head = %(head)s, frontier_sha256 = %(frontier_sha256)s,
    frontier_bytes = %(frontier_bytes)s, size_seen = %(new_offset)s, state = case state when 'final' then 'rotated' else state end
where file_id = %(file_id)s and committed_offset = %(old_offset)s

-- name: dead_letters
select d.dead_letter_id, d.file_id, f.path, d.start_offset, d.end_offset, d.reason, d.detail, d.created_at,
       d.resolved_at, d.resolution
from dead_letters d join tail_files f using (file_id)
where f.source_id = %(source_id)s and (%(all)s or d.resolved_at is null)
order by d.dead_letter_id desc limit %(limit)s

-- name: dead_letter
select d.dead_letter_id, d.file_id, f.path, d.start_offset, d.end_offset, d.reason, d.detail, d.created_at,
       d.resolved_at, d.resolution, d.raw, d.sha256
from dead_letters d join tail_files f using (file_id)
where d.dead_letter_id = %(dead_letter_id)s

-- name: open_dead_letters
select count(*) from dead_letters d join tail_files f using (file_id)
where f.source_id = %(source_id)s and d.resolved_at is null

-- name: totals
-- Lines as they stand in the ranges, which are few; counting the facts themselves would read all of them.
with source as (select file_id from tail_files where source_id = %(source_id)s),
     lines as (select key, sum(value::bigint)::bigint as n from source join tail_batches using (file_id),
                      jsonb_each_text(counts) group by key)
select coalesce((select n from lines where key = 'fact'), 0) as facts,
       coalesce((select n from lines where key = 'replayed'), 0) as replayed,
       coalesce((select n from lines where key = 'conflict'), 0) as conflicts,
       (select count(*) from source join dead_letters using (file_id) where resolved_at is null) as dead_letters_open,
       (select count(*) from source join log_gaps using (file_id)) as gaps,
       (select coalesce(sum(end_offset - start_offset), 0)::bigint
        from source join log_gaps using (file_id)) as gap_bytes

-- name: owner
select a.application_name from pg_stat_activity a join pg_locks l on l.pid = a.pid
where l.locktype = 'advisory' and l.granted and a.application_name = left(%(application)s, 63) limit 1

-- name: may_not_use_schema
select to_regnamespace(%(schema)s) is not null and not has_schema_privilege(to_regnamespace(%(schema)s), 'USAGE')

-- name: probe
select current_setting('server_version') as server_version, current_user::text as role,
       extract(epoch from now())::float8 as server_time,
       (select coalesce(array_agg(format('%%s on %%s', privilege, t.relname) order by t.relname, privilege), '{}')
        from pg_class t
        cross join unnest(case t.relname
                              when 'schema_migrations' then array['SELECT']
                              when 'tail_files' then array['SELECT', 'INSERT', 'UPDATE']
                              when 'tail_batches' then array['SELECT', 'INSERT', 'UPDATE', 'DELETE']
                              when 'log_gaps' then array['SELECT', 'INSERT', 'DELETE']
                              when 'dead_letters' then array['SELECT', 'INSERT', 'DELETE']
                              else array['SELECT', 'INSERT'] end) privilege
        where t.relnamespace = to_regnamespace(%(schema)s) and t.relkind = 'r'
          and not has_table_privilege(t.oid, privilege)) as missing_grants
