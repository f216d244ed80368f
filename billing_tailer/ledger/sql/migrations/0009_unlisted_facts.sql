-- The facts of a large batch go on the work list (unsettled_facts) as one row, range by range, and call by call when there
-- is time: until then most of them have their receipt, and no entry has to be made and deleted again.
create table unlisted_facts (
    file_id bigint not null,
    start_offset bigint not null,
    end_offset bigint not null check (end_offset > start_offset),
    facts bigint not null,
    ended_from timestamptz not null,  -- no earlier than this did one of these calls end
    committed_at timestamptz not null default now(),
    primary key (file_id, start_offset)
);
