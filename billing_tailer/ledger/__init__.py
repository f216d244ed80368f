"""Postgres: the only room that knows SQL and psycopg."""

from billing_tailer.ledger.connection import migrate, reason_of
from billing_tailer.ledger.reports import Reports, probe, reports
from billing_tailer.ledger.resets import Reset
from billing_tailer.ledger.settlement import Waiting, Window
from billing_tailer.ledger.sqlfile import migrations
from billing_tailer.ledger.writer import Changes, Committed, Ledger, LedgerState, NewFile

__all__ = [
    "Changes",
    "Committed",
    "Ledger",
    "LedgerState",
    "NewFile",
    "Reports",
    "Reset",
    "Waiting",
    "Window",
    "migrate",
    "migrations",
    "probe",
    "reason_of",
    "reports",
]
