-- What the roles may do in the schema. Run by the owner after every `billing-tailer migrate`, again and again:
--   psql --set schema=billing --set owner=... --set daemon=... --set readonly=... --file grants.sql
\set ON_ERROR_STOP on
set search_path = :"schema";
grant usage on schema :"schema" to :"daemon", :"readonly";
grant select, insert on all tables in schema :"schema" to :"daemon";
revoke insert on schema_migrations, prunes, unaudited_progress from :"daemon";
grant update on tail_files, tail_batches, call_exceptions, dead_letters, unaudited_progress to :"daemon";
grant delete on tail_batches, log_gaps, dead_letters, unsettled_facts, touched_calls, skipped_calls to :"daemon";
grant select on all tables in schema :"schema" to :"readonly";
