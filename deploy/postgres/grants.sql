-- What each database role may do in the schema. As its owner, after every `billing-tailer migrate`:
--
--   psql postgresql://billing_owner@db/billing -v schema=billing -v owner=billing_owner -v daemon=billing_tailer -v readonly=billing_readonly \
--        -f deploy/postgres/grants.sql
--
-- The roles are there already: this file makes none, and gives nobody a password. It may be run again at any time, in
-- front of a running daemon: one transaction takes everything away, from PUBLIC too, and gives what is listed here.
-- So what an earlier version gave is revoked with it.
--
-- There are no default privileges for tables of later versions: each table says here what it is for, and a table that
-- is not listed is closed. `billing-tailer check` names what the daemon's role lacks, or may do to money.
--
-- owner     made the schema, migrates and prunes. No daemon connects as it: it could grant itself everything.
-- daemon    `run`, and all verbs but `migrate` and `prune`. It adds rows of money and of what they follow from, and
--           changes or deletes none of them (tests/test_grants.py). All daemons of a database share this role: who takes
--           over from a frozen one ends its session.
-- readonly  dashboards and analysts: reads, but not the bytes of log lines (`dead_letters.raw`, `tail_files.head`). A
--           line that was not understood may hold anything that a client sent. `select *` fails on these two tables.

\set ON_ERROR_STOP on
\if :{?schema}   \else \set schema billing          \endif
\if :{?owner}    \else \set owner billing_owner     \endif
\if :{?daemon}   \else \set daemon billing_tailer   \endif
\if :{?readonly} \else \set readonly billing_readonly \endif

begin;
set local client_min_messages = warning;

select set_config('grants.schema', :'schema', true), set_config('grants.owner', :'owner', true),
       set_config('grants.daemon', :'daemon', true), set_config('grants.readonly', :'readonly', true) \g /dev/null
do $$
declare
    name text;
    part text;
begin
    foreach part in array array['owner', 'daemon', 'readonly'] loop
        name := current_setting('grants.' || part);
        if not exists (select from pg_roles where rolname = name) then
            raise exception 'there is no role %', name using hint = format('create it, or name another one: -v %s=ROLE', part);
        end if;
    end loop;
    if to_regnamespace(quote_ident(current_setting('grants.schema'))) is null then
        raise exception 'there is no schema %', current_setting('grants.schema')
            using hint = 'run `billing-tailer migrate` first, or name another one: -v schema=SCHEMA';
    end if;
    if not pg_has_role(current_user, current_setting('grants.owner'), 'USAGE') then
        raise exception 'role % is not the owner %', current_user, current_setting('grants.owner')
            using hint = 'connect as the owner of the schema';
    end if;
    foreach part in array array['daemon', 'readonly'] loop
        name := current_setting('grants.' || part);
        if pg_has_role(name, current_setting('grants.owner'), 'MEMBER') then
            raise exception 'role % may become the owner %', name, current_setting('grants.owner')
                using hint = 'give the ' || part || ' a role of its own: no superuser, and no member of the owner';
        end if;
    end loop;
    select string_agg(relname, ', ') into name from pg_class
    where relnamespace = quote_ident(current_setting('grants.schema'))::regnamespace and relkind in ('r', 'p')
      and not pg_has_role(current_setting('grants.owner'), relowner, 'USAGE');
    if name is not null then
        raise exception 'role % does not own %', current_setting('grants.owner'), name
            using hint = 'name the role that has run `billing-tailer migrate`: -v owner=ROLE';
    end if;
end
$$;

-- `run` and `backfill` sort out known calls in a temporary table; most databases let everybody make them.
select not has_database_privilege(:'daemon', current_database(), 'TEMPORARY') as no_temporary,
       not has_database_privilege(:'daemon', current_database(), 'CONNECT') as no_daemon,
       not has_database_privilege(:'readonly', current_database(), 'CONNECT') as no_readonly \gset
\if :no_temporary \echo :daemon 'needs as well: GRANT TEMPORARY ON DATABASE' :DBNAME \endif
\if :no_daemon    \echo :daemon 'needs as well: GRANT CONNECT ON DATABASE' :DBNAME   \endif
\if :no_readonly  \echo :readonly 'needs as well: GRANT CONNECT ON DATABASE' :DBNAME \endif

revoke all on schema :"schema" from public, :"daemon", :"readonly";
revoke all on all tables in schema :"schema" from public, :"daemon", :"readonly";
revoke all on all sequences in schema :"schema" from public, :"daemon", :"readonly";
revoke all on all functions in schema :"schema" from public, :"daemon", :"readonly";
grant usage on schema :"schema" to :"daemon", :"readonly";
set local search_path to :"schema";

-- Money, and what it follows from: the daemon adds, and changes nothing.
grant select, insert on
    usage_facts, call_conflicts, spend_records, charge_receipts, llm_charge_details, charge_adjustments to :"daemon";

-- Trouble with a call: opened, and closed once. Of the whole table: before its version 13.1 Citus does not pass grants
-- of columns on to the shards.
grant select, insert, update on call_exceptions to :"daemon";

-- Work lists. What is done leaves them.
grant select, insert, update, delete on unsettled_facts to :"daemon";
grant select, insert, delete on unlisted_facts, touched_calls, skipped_calls to :"daemon";
grant select on unaudited_progress to :"daemon";
grant update (counted_to) on unaudited_progress to :"daemon";

-- Positions. A rewind takes ranges, gaps and open dead letters back.
grant select, insert on tail_files to :"daemon";
grant update (path, device, inode, head, committed_offset, frontier_sha256, frontier_bytes, size_seen, state,
              blocked_reason, dead_letter_bytes, last_commit_at) on tail_files to :"daemon";
grant select, insert, delete on tail_batches to :"daemon";
grant update (end_offset, sha256, counts, committed_at) on tail_batches to :"daemon";
grant select, insert, delete on log_gaps to :"daemon";
grant select, insert, delete on dead_letters to :"daemon";
grant update (resolved_at, resolution, resolved_by, resolved_reason) on dead_letters to :"daemon";

-- What people ordered, kept. `prune` and `migrate` are the owner's.
grant select, insert on offset_resets, backfills to :"daemon";
grant select on prunes, schema_migrations to :"daemon";

-- Everything but the bytes of lines.
grant select on
    usage_facts, call_conflicts, spend_records, charge_receipts, llm_charge_details, charge_adjustments,
    call_exceptions, unsettled_facts, unlisted_facts, touched_calls, skipped_calls, unaudited_progress, tail_batches,
    log_gaps, offset_resets, backfills, prunes, schema_migrations to :"readonly";
grant select (file_id, source_id, path, device, inode, generation, previous_file_id, committed_offset,
              frontier_sha256, frontier_bytes, size_seen, state, blocked_reason, dead_letter_bytes, first_seen_at,
              last_commit_at) on tail_files to :"readonly";
grant select (dead_letter_id, file_id, start_offset, end_offset, reason, detail, sha256, created_at, resolved_at,
              resolution, resolved_by, resolved_reason) on dead_letters to :"readonly";

commit;
