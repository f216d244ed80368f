"""What the text of a fact's row says."""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing_tailer.model import FactRow, UsageFact
from billing_tailer.rows import COLUMNS, values_of

READ: dict[str, Callable[[str], Any]] = {
    "id_echoed": "t".__eq__,
    "attempt": int,
    "status": int,
    "request_completed": "t".__eq__,
    "header_cost_usd": Decimal,
    "request_seconds": Decimal,
    "occurred_at": datetime.fromisoformat,
    "line_sha256": lambda text: bytes.fromhex(text.removeprefix("\\x")),
}


def fact_of(row: FactRow) -> UsageFact:
    """The fact that a row's text says."""
    pairs = zip(COLUMNS, values_of(row.text), strict=True)
    values: dict[str, Any] = {name: None if text is None else READ.get(name, str)(text) for name, text in pairs}
    return UsageFact(**values)
