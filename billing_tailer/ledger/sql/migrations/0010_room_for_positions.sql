-- A position is rewritten with every commit. Postgres tidies a page up when less than a tenth of it is free, or less than
-- what is to be left free here. A row with the first kilobyte of its file may not fit into more than a tenth: then a
-- commit in six took a new page, which nothing uses again before the next autovacuum.
alter table tail_files set (fillfactor = 70);
