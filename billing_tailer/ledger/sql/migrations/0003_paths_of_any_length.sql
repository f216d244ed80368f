-- A path may be longer than an index entry: positions are looked up by their source alone.
drop index tail_files_source;
create index tail_files_source on tail_files (source_id);
