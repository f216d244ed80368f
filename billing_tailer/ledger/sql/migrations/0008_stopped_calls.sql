-- A call that an exception stops (held, unattributed, overdue, conflict) stays unsettled, and only a record or a person
-- brings it on: it is not looked at every few seconds. ask_at: null while time may decide it, else when LiteLLM is to be
-- asked about it by name.
alter table unsettled_facts add column ask_at timestamptz;
update unsettled_facts u set ask_at = now()
where exists (select from call_exceptions e
              where e.call_id = u.call_id and e.closed_at is null
                and e.kind in ('held_zero_cost', 'held_bad_cost', 'unattributed', 'overdue', 'conflict'));

-- A fact still makes two index entries. The sweep and the polls go by the calls' starts; counting reads the table.
drop index unsettled_facts_age;
create index unsettled_facts_waiting on unsettled_facts (started_at) where ask_at is null;
create index unsettled_facts_stopped on unsettled_facts (ask_at) where ask_at is not null;

-- Open exceptions are walked through, a page at a time, where settings have changed.
drop index call_exceptions_open;
create index call_exceptions_open on call_exceptions (kind, call_id) where closed_at is null;
