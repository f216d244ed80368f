"""What the text of a fact's row says."""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing_tailer.fastlane import AuditLines
from billing_tailer.model import FactRow, Rejected, Skip, UsageFact
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


def read_line(lines: AuditLines, text: bytes) -> tuple[FactRow | Skip | Rejected, bool]:
    """What `plan` makes of one line without its newline, and whether it is a common one."""
    facts = lines.common(text.decode("latin-1") + "\n", 0, 1, len(text), 7, 100)
    if not facts:
        return lines(text), False
    call_id, row, second, *place = facts[0]
    values, *written = row.rsplit("\t", 3)
    assert written == [str(number) for number in place] == ["7", "100", str(100 + len(text) + 1)]
    return FactRow(call_id, values, second), True
