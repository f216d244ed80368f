"""`make bench`: speed, latency, memory and growth on an embedded Postgres with fsync on, as ratios of one run."""
