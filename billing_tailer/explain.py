"""One call from the line to the money: everything that is committed about it, in one answer for people and programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing_tailer import pricing, settle
from billing_tailer.files import LogFiles
from billing_tailer.ledger import Told
from billing_tailer.model import SETTLER, Position, Provenance, SpendSource, SpendStatus, Verdict
from billing_tailer.printing import plain
from billing_tailer.settle import CallState, Rules

_FACT_FIELDS = (
    "call_id",
    "nginx_request_id",
    "proxy_call_id",
    "id_echoed",
    "run_id",
    "attempt",
    "graph_id",
    "billing_account_id",
    "method",
    "path",
    "status",
    "request_completed",
    "provenance",
    "requested_model",
    "header_cost_usd",
    "header_model_group",
    "cache_key",
    "request_seconds",
    "occurred_at",
    "committed_at",
)


@dataclass(frozen=True, slots=True)
class RawLine:
    """The bytes of a line as text, or why they cannot be shown."""

    raw: str | None
    unavailable: str | None


def raw_line(fact: Mapping[str, Any], positions: list[Position], files: LogFiles, bytes_max: int) -> RawLine:
    """Read a fact's line again, if its file is in sight and still what was committed."""
    position = next((one for one in positions if one.file_id == fact["file_id"]), None)
    if position is None:
        return RawLine(None, f"the file belongs to source {fact['source_id']}")
    file = next((one for one in files.scan({position.locator}).files if one.locator == position.locator), None)
    if file is None:
        return RawLine(None, "the file is not in sight")
    if files.judge(position, file) is not Verdict.AGREES:
        return RawLine(None, f"{file.path} is not what was committed any more")
    length = fact["end_offset"] - fact["start_offset"]
    try:
        raw = files.read_at(file, fact["start_offset"], min(length, bytes_max))
    except OSError as error:
        return RawLine(None, f"cannot read {file.path}: {error.strerror}")
    return RawLine(raw.decode("utf-8", "backslashreplace").rstrip("\n"), None)


def explained(call_id: str, told: Told, line: RawLine | None, rules: Rules) -> dict[str, Any]:
    """The answer of `explain`; plain JSON with money as decimal strings."""
    fact, state = told.fact, told.state
    answer = {
        "call_id": call_id,
        "standing": "unaudited" if state is None else str(_standing(state, rules)),
        "line": None if fact is None or line is None else _line(fact, line),
        "fact": None if fact is None else {name: fact[name] for name in _FACT_FIELDS},
        "spend_records": [_record(row) for row in told.records],
        "pricing": None if state is None else _pricing(state, rules),
        "receipt": told.receipt,
        "details": told.details,
        "adjustments": told.adjustments,
        "total_credits": _total_credits(told),
        "exceptions": told.exceptions,
        "conflicts": [_conflict(row) for row in told.conflicts],
    }
    found: dict[str, Any] = plain(answer)
    return found


def _standing(state: CallState, rules: Rules) -> settle.Standing:
    return settle.decide(state, rules).standing


def _total_credits(told: Told) -> int | None:
    if told.receipt is None:
        return None
    return int(told.receipt["charged_credits"]) + sum(int(row["delta_credits"]) for row in told.adjustments)


def _line(fact: Mapping[str, Any], line: RawLine) -> dict[str, Any]:
    return {
        "file_id": fact["file_id"],
        "path": fact["file_path"],
        "source_id": fact["source_id"],
        "start_offset": fact["start_offset"],
        "end_offset": fact["end_offset"],
        "raw": line.raw,
        "raw_unavailable": line.unavailable,
    }


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A spend record; a callback's stands at `start_offset` of a file of the spool."""
    return {name: value for name, value in row.items() if name != "call_id"}


def _conflict(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("call_id", "line_sha256")}


# --- pricing, step by step


def _pricing(state: CallState, rules: Rules) -> dict[str, Any] | None:
    """What the records of now cost. The receipt may name another sum: adjustments and exceptions say why."""
    markup = rules.markup if state.receipt is None else state.receipt.markup_factor
    state = settle.evident(state, rules)
    billed = settle.bill(state.records)
    if billed is None:
        return None
    price = pricing.price([billed.total_usd], markup)
    steps: dict[str, Any] = {
        "sums": [_sum(state, source) for source in SpendSource if any(r.source is source for r in state.records)],
        "billed_source": str(billed.source),
        "why": _why(state, billed),
        "markup_factor": markup,
        "provider_cost_usd": None,
        "user_cost_usd": None,
        "charged_credits": None,
        "unpriceable": None,
        "by_hand": _by_hand(state),
    }
    if isinstance(price, pricing.Unpriceable):
        return {**steps, "unpriceable": price.detail}
    return {
        **steps,
        "provider_cost_usd": price.provider_cost_usd,
        "user_cost_usd": price.user_cost_usd,
        "charged_credits": price.charged_credits,
    }


def _sum(state: CallState, source: SpendSource) -> dict[str, Any]:
    records = [record for record in state.records if record.source is source]
    return {
        "source": str(source),
        "records": len(records),
        "costs_usd": [record.cost_usd for record in records],
        "sum_usd": pricing.total(record.cost_usd or Decimal(0) for record in records),
    }


def _why(state: CallState, billed: settle.Bill) -> str:
    others = [record for record in state.records if record.source is not billed.source]
    if not others:
        return "the only source with records"
    other = settle.bill(others)
    if other is None or other.provider_cost_usd < billed.provider_cost_usd:
        return "the larger sum: both sources lose records, neither invents them"
    if other.main.status is not SpendStatus.SUCCESS and billed.main.status is SpendStatus.SUCCESS:
        return "the same sum, and only this source knows of the success"
    return "the same sum: the callback's records are taken"


def _by_hand(state: CallState) -> bool:
    """Whether a person named an amount: then that is charged."""
    named = state.receipt is not None and state.receipt.provenance is Provenance.MANUAL
    return named or any(adjustment.created_by != SETTLER for adjustment in state.adjustments)
