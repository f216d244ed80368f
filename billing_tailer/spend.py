"""What LiteLLM says of an attempt: callback payload, spool line or spend-log row -> spend record. Pure.

`slim` keeps the few fields that a bill needs, each at its place and made harmless; nothing else touches a disk. All
parsing goes through it, so that a record is the same whether it came through the spool or not. The field names were
measured; two kinds are told apart, as in `audit`:

- those that decide the bill (call id, record identity, status, cost): wrong ones reject the record, and a cost that is
  no amount is kept as text, for the settlement to hold the call;
- the others become None where they are not what they should be.

Holds
- LITELLM_IS_USAGE_TRUTH for its part: `response_cost` and `spend` are the only costs that are read, never the
  breakdown, which shows the full price on cache hits (tests/test_spend.py::test_payloads);
- PROMPTS_ARE_NEVER_STORED: tests/test_spend.py::test_nothing_else_survives plants text everywhere. Rejections name the
  field, never its content.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson

from billing_tailer import pricing
from billing_tailer.audit import DETAIL_CHARS_MAX, ID_CHARS_MAX
from billing_tailer.model import DeadLetterReason, Rejected, Skip, SkipReason, SpendRecord, SpendSource, SpendStatus

TEXT_CHARS_MAX = 256
"""Longest model, provider, account or run id that is kept; a longer one is none."""
KEY_BYTES_MAX = 512
"""Longest text of a record's identity that is kept, in UTF-8; a longer one is replaced by its hash. It goes into an
index entry beside the call id, and Postgres allows 2,700 bytes for both. The longest seen (responses API) has 457."""
CODE_CHARS_MAX = 64
TOKENS_MAX = 2**31 - 1
EMBEDDED_JSON_CHARS_MAX = 1 << 20
"""Metadata that is JSON inside a string is read up to this size."""
RUN_ID_HEADER = "x-cogni-run-id"
TORN_BYTE = b"\x18"
"""Ends a spool line whose writer died or failed while writing it."""
_SKIP_TORN = Skip(SkipReason.TORN)

_IDENTITY = ("id", "status", "model_id", "startTime", "endTime", "response_cost")
_NUMERIC = frozenset({"startTime", "endTime", "response_cost"})
_CLIENT_GONE = "499"
"""LiteLLM's error code of a success whose client left in mid-stream: the only error code of a success (seen)."""


class _Bad(Exception):
    """A field that decides the bill is missing or wrong."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        self.rejected = Rejected(reason, detail)


# --- one value each: what is kept of it. All of them are idempotent, and what they return is JSON.


def _is_clean(text: str) -> bool:
    """Whether Postgres takes it: no NUL, no half of a surrogate pair."""
    if text.isascii():
        return "\0" not in text
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _keep_call_id(value: object) -> object:
    """The key of a call, by the rules `audit` has for it; None where there is none, {} where it cannot be one."""
    if value in (None, "", "-"):
        return None
    if (
        type(value) is not str
        or len(value) > ID_CHARS_MAX
        or not _is_clean(value)
        or "\N{REPLACEMENT CHARACTER}" in value
        or value != value.strip()
    ):
        return {}
    return value


def _keep_key(value: object) -> object:
    """A part of a record's identity: text or number, nothing dropped; containers stay containers, without content."""
    if type(value) is str:
        if len(value) <= KEY_BYTES_MAX and _is_clean(value) and len(value.encode()) <= KEY_BYTES_MAX:
            return value
        return "sha256:" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    return _keep_number(value)


def _keep_number(value: object) -> object:
    """A number as JSON can carry it without loss: int64, float, else text. ijson gives Decimal, orjson float."""
    if value is None or isinstance(value, dict | list):
        return None if value is None else type(value)()
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    number = pricing.exact(value) if isinstance(value, Decimal) else None
    if number is not None and math.isfinite(near := float(number)) and Decimal(repr(near)) == number:
        return near
    return pricing.text_of(value)


def _keep_cost(value: object) -> object:
    """A cost in USD, or whatever stands in its place, as short text."""
    if type(value) is not str:
        return _keep_number(value)
    clean = value if _is_clean(value) else value.encode("ascii", "replace").decode().replace("\0", "?")
    return pricing.text_of(clean)


def _keep_text(value: object, chars_max: int = TEXT_CHARS_MAX) -> str | None:
    """Text that Postgres takes; None for anything else. Two accounts must not become one because the same replacement
    characters stand in both."""
    if type(value) is not str or value in ("", "-") or len(value) > chars_max or not _is_clean(value):
        return None
    return None if "\N{REPLACEMENT CHARACTER}" in value else value


def _keep_code(value: object) -> str | None:
    return str(value) if type(value) is int and 0 <= value <= TOKENS_MAX else _keep_text(value, CODE_CHARS_MAX)


def _keep_tokens(value: object) -> int | None:
    """A count; None where it is none."""
    if type(value) is int:  # nearly always, and ten times as fast
        return value if 0 <= value <= TOKENS_MAX else None
    if isinstance(value, bool | str):
        return None
    number = pricing.exact(value)
    if number is None or not 0 <= number <= TOKENS_MAX or number != int(number):
        return None
    return int(number)


def _keep_flag(value: object) -> bool | None:
    """True, False or None; spend-log rows have them as text."""
    if type(value) is str:
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


_FIELDS: Mapping[str, Callable[[object], object]] = {
    "litellm_call_id": _keep_call_id,
    "id": _keep_key,
    "status": _keep_key,
    "model_id": _keep_key,
    "startTime": _keep_key,
    "endTime": _keep_key,
    "response_cost": _keep_cost,
    "cache_hit": _keep_flag,
    "model_group": _keep_text,
    "model": _keep_text,
    "custom_llm_provider": _keep_text,
    "prompt_tokens": _keep_tokens,
    "completion_tokens": _keep_tokens,
    "end_user": _keep_text,
}


# --- slim


def slim(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a StandardLoggingPayload that may touch a disk: an allow-list of fields, each cut to what it can be.

    JSON that orjson writes without loss, at most about 6 kB. Idempotent, and `parse_callback` makes the same of it as
    of the whole payload. Of headers, only the run id is read, and moved to where LiteLLM has it.
    """
    kept: dict[str, Any] = {name: keep(payload.get(name)) for name, keep in _FIELDS.items()}
    metadata = _mapping(payload.get("metadata"))
    run_id = _run_id(metadata)
    kept["error_information"] = _keep_error(payload.get("error_information"))
    kept["metadata"] = _present(
        {
            "status": _keep_code(metadata.get("status")),
            "error_information": _keep_error(metadata.get("error_information")),
            "spend_logs_metadata": _present({"run_id": run_id}),
            "usage_object": _keep_usage(metadata.get("usage_object")),
        }
    )
    return _present(kept)


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, also where it is JSON inside a string; {} for anything else: it may be broken, or a list."""
    if type(value) is str and value.startswith("{") and len(value) <= EMBEDDED_JSON_CHARS_MAX:
        try:
            value = orjson.loads(value)
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            return {}
    return value if isinstance(value, dict) else {}


def _run_id(metadata: Mapping[str, Any]) -> str | None:
    headers = _mapping(metadata.get("requester_custom_headers"))
    told = _keep_text(_mapping(metadata.get("spend_logs_metadata")).get("run_id"))
    return told or _keep_text(headers.get(RUN_ID_HEADER))


def _keep_error(value: object) -> dict[str, str]:
    error = _mapping(value)
    return _present({name: _keep_code(error.get(name)) for name in ("error_code", "error_class")})


def _keep_usage(value: object) -> dict[str, Any]:
    """Cached and reasoning tokens. OpenAI's and Anthropic's names for the cached ones; where both are, they agree."""
    usage = _mapping(value)
    cached = _keep_tokens(_mapping(usage.get("prompt_tokens_details")).get("cached_tokens"))
    if cached is None:
        cached = _keep_tokens(usage.get("cache_read_input_tokens"))
    reasoning = _keep_tokens(_mapping(usage.get("completion_tokens_details")).get("reasoning_tokens"))
    return {
        "prompt_tokens_details": _present({"cached_tokens": cached}),
        "completion_tokens_details": _present({"reasoning_tokens": reasoning}),
    }


# --- records


def parse_callback(payload: object, cost_max: Decimal) -> SpendRecord | Rejected:
    """A StandardLoggingPayload, whole or slimmed -> its record. cost_max: USD; a higher cost is no cost. Never raises.

    The record id is the hash of `_IDENTITY`: a payload has no field that is unique per attempt, since failures and
    embeddings have the call id as `id`, so that a failed and a successful embedding of one call share it.
    """
    if not isinstance(payload, dict):
        return _not_an_object(payload)
    kept = slim(payload)
    try:
        identity = [_canonical(kept, name) for name in _IDENTITY]
        record_id = hashlib.sha256(orjson.dumps(identity)).hexdigest()
        return _record(kept, SpendSource.CALLBACK, record_id, identity[0], cost_max)
    except _Bad as bad:
        return bad.rejected


def parse_spool_line(line: bytes, cost_max: Decimal) -> SpendRecord | Skip | Rejected:
    """One spool line, `{"received_at": ..., "payload": {...}}` -> its record. Never raises.

    What was no record when it came is in the spool as `{"received_at": ..., "rejected": {"reason", "detail"}}`. A torn
    line is a skip: nobody was told that it was safe, so that there is nothing for an operator to decide.
    """
    if line.rstrip(b"\r\n").endswith(TORN_BYTE):
        return _SKIP_TORN
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Rejected(DeadLetterReason.INVALID_JSON, f"{error.msg} at {error.pos}")
    if not isinstance(fields, dict):
        return _not_an_object(fields)
    if isinstance(rejected := fields.get("rejected"), dict):
        told = [reason for reason in DeadLetterReason if reason == rejected.get("reason")]
        detail = _keep_text(rejected.get("detail"), DETAIL_CHARS_MAX)
        return Rejected(told[0] if told else DeadLetterReason.BAD_VALUE, detail or "no detail")
    if "payload" not in fields:
        return Rejected(DeadLetterReason.MISSING_FIELD, "payload")
    return parse_callback(fields["payload"], cost_max)


def parse_row(row: object, cost_max: Decimal) -> SpendRecord | Rejected:
    """A row of `/spend/logs` or `/spend/logs/v2` -> its record. cost_max: USD. Never raises.

    Versions differ: the call id may be in the metadata only, the metadata be text, the status null, times without Z.
    """
    if not isinstance(row, dict):
        return _not_an_object(row)
    call_id = row.get("litellm_call_id") or _mapping(row.get("metadata")).get("litellm_call_id")
    renamed = {"litellm_call_id": call_id, "response_cost": row.get("spend"), "id": row.get("request_id")}
    kept = slim({**row, **renamed})
    try:
        request_id = _canonical(kept, "id")
        record = _record(kept, SpendSource.SPEND_LOGS, request_id or "", request_id, cost_max)
    except _Bad as bad:
        return bad.rejected
    return record if request_id else Rejected(DeadLetterReason.MISSING_FIELD, "request_id")


def _record(
    kept: Mapping[str, Any], source: SpendSource, record_id: str, request_id: str | None, cost_max: Decimal
) -> SpendRecord:
    """What `slim` kept -> the record. The inner values are as slim leaves them."""
    call_id = kept.get("litellm_call_id")
    if call_id is None:
        raise _Bad(DeadLetterReason.MISSING_FIELD, "litellm_call_id")
    if type(call_id) is not str:
        raise _Bad(DeadLetterReason.BAD_VALUE, f"litellm_call_id: not an id of at most {ID_CHARS_MAX} characters")
    cost_usd, cost_text = pricing.cost(kept.get("response_cost"), cost_max)
    metadata = kept["metadata"]
    usage = metadata["usage_object"]
    return SpendRecord(
        call_id=call_id,
        source=source,
        record_id=record_id,
        status=_status(kept),
        model_group=kept.get("model_group"),
        model=kept.get("model"),
        provider=kept.get("custom_llm_provider"),
        prompt_tokens=kept.get("prompt_tokens"),
        completion_tokens=kept.get("completion_tokens"),
        cached_tokens=usage["prompt_tokens_details"].get("cached_tokens"),
        reasoning_tokens=usage["completion_tokens_details"].get("reasoning_tokens"),
        cost_usd=cost_usd,
        cost_text=cost_text,
        cache_hit=kept.get("cache_hit"),
        end_user=kept.get("end_user"),
        run_id=metadata["spend_logs_metadata"].get("run_id"),
        error_code=(kept["error_information"] or metadata["error_information"]).get("error_code"),
        request_id=request_id or None,
        started_at=_time(kept.get("startTime")),
        ended_at=_time(kept.get("endTime")),
    )


def _not_an_object(value: object) -> Rejected:
    return Rejected(DeadLetterReason.NOT_AN_OBJECT, f"a JSON {type(value).__name__} where an object belongs")


def _canonical(kept: Mapping[str, Any], name: str) -> str | None:
    """One text per value of an identity field, whichever parser read it. Never change it: records would come twice."""
    value = kept.get(name)
    if isinstance(value, dict | list):
        if name != "response_cost":
            raise _Bad(DeadLetterReason.BAD_VALUE, f"{name}: neither text nor a number")
        return "{}"
    number = None if isinstance(value, str) and name not in _NUMERIC else pricing.exact(value)
    if number is not None:
        return pricing.canonical(number)
    return None if value is None else str(value)


def _status(kept: Mapping[str, Any]) -> SpendStatus:
    """LiteLLM's status; it may be null, which is a success unless metadata or error information says failure."""
    metadata = kept["metadata"]
    for told in (kept.get("status"), metadata.get("status")):
        if told is not None and told != "":
            try:
                return SpendStatus(str(told).lower())
            except ValueError:
                raise _Bad(DeadLetterReason.BAD_VALUE, "status: neither success nor failure") from None
    for error in (kept["error_information"], metadata["error_information"]):
        if error and error.get("error_code") != _CLIENT_GONE:
            return SpendStatus.FAILURE
    return SpendStatus.SUCCESS


def _time(value: object) -> datetime | None:
    """Seconds since the epoch, or ISO 8601 with or without an offset (then it is UTC); None for anything else."""
    number = pricing.exact(value)
    if number is not None:
        return datetime.fromtimestamp(float(number), UTC) if 10**9 <= number < 10**10 else None
    if type(value) is not str:
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return None
    if not 2001 <= time.year <= 2286:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
