"""Postgres: the only room that knows SQL and psycopg."""

from billing_tailer.ledger.activity import ORIGIN, Activity, Charged, Chosen, Place, Sums, activity_reads
from billing_tailer.ledger.connection import migrate, reason_of
from billing_tailer.ledger.news import listening
from billing_tailer.ledger.operator import Operator, Told, operator
from billing_tailer.ledger.probe import Probe, probing
from billing_tailer.ledger.proofs import Generation, OddCalls, PlacedRows, Proofs, ReceiptRow, Tile, proofs
from billing_tailer.ledger.pruning import Pruned, prune
from billing_tailer.ledger.reports import Reports, reports
from billing_tailer.ledger.resets import Reset, Ruling
from billing_tailer.ledger.runs import Reads, RunStatus, Unaudited
from billing_tailer.ledger.settlement import Waiting, Window
from billing_tailer.ledger.sqlfile import migrations
from billing_tailer.ledger.writer import Changes, Committed, Ledger, LedgerState, NewFile

__all__ = [
    "ORIGIN",
    "Activity",
    "Changes",
    "Charged",
    "Chosen",
    "Committed",
    "Generation",
    "Ledger",
    "LedgerState",
    "NewFile",
    "OddCalls",
    "Operator",
    "Place",
    "PlacedRows",
    "Probe",
    "Proofs",
    "Pruned",
    "Reads",
    "ReceiptRow",
    "Reports",
    "Reset",
    "Ruling",
    "RunStatus",
    "Sums",
    "Tile",
    "Told",
    "Unaudited",
    "Waiting",
    "Window",
    "activity_reads",
    "listening",
    "migrate",
    "migrations",
    "operator",
    "probing",
    "proofs",
    "prune",
    "reason_of",
    "reports",
]
