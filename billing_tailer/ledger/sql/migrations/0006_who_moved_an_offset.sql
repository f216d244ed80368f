-- Who moved an offset or decided a generation by a verb; null for OFFSET_RESET, and for what was done before.
alter table offset_resets add column applied_by text;
