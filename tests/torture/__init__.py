"""The daemon under torture: killed at every step, its Postgres killed under it, its files changed behind its back.

`make torture` runs all of it and prints one table; the tests in `test_torture.py` run a small share of it.
"""
