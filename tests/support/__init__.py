"""What several tests share: a Postgres proxy that can be cut, and the daemon as a process."""
