"""End-to-end tests: the daemon as a process, real nginx, real Postgres, `make run` from a clean copy."""
