"""nginx's audit line -> usage fact, skip or rejection. Pure.

Which lines are calls, and the field names, were measured (docs/integrating.md). Two kinds of fields are told apart,
because much of a line is what the client sent:

- those that decide the bill (method, uri, status, time, ids): a bad one rejects the line, which becomes a dead letter;
- those that only attribute or witness (run, account, metadata, cost header): a bad one is dropped to None and the call
  stays billable, so that no client can talk its way out of a bill with an odd header.

Holds LITELLM_IS_USAGE_TRUTH for its part: the cost header goes into `header_cost_usd` and nowhere else
(tests/test_audit.py::test_cost_header_is_only_a_witness).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fnmatch import translate
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import orjson

from billing_tailer.model import DeadLetterReason, Rejected, Skip, SkipReason, UsageFact

ID_CHARS_MAX = 256
"""Longest id that is kept: every one of them is a database key or index entry."""
TEXT_CHARS_MAX = 2048
"""Longest other text that is kept, such as a path."""
DETAIL_CHARS_MAX = 300
DECIMAL_CHARS_MAX = 64

REQUIRED_FIELDS = (
    "run_id",
    "end_user",
    "litellm_call_id",
    "request_time",
    "request_completion",
    "upstream_status",
    "upstream_connect_time",
    "upstream_content_type",
)
"""Fields every line of a call must have (they may be empty), beside `method`, `uri`, `status` and `msec` or `time`.
The older format, known by its `ts` and the absence of `method` and `uri`, needs only its own."""

Routes = Callable[[str], str | None]
"""A request URI -> the path of an LLM route, None for any other URI."""

_MSEC = re.compile(r"[0-9]{9,10}(?:\.[0-9]{1,6})?", re.ASCII)
_STATUSES = {f"{status:03d}": status for status in range(1000)}
_NUMBER = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,2})?", re.ASCII)
_REQUIRED = frozenset(REQUIRED_FIELDS)
_UNFORWARDED = frozenset({*range(300, 400), 401, 403, 404, 405})
"""Without a call id: refused at the door, or sent elsewhere, as LiteLLM does (307) where a path ends in a slash."""
_SKIP_ROUTE = Skip(SkipReason.NOT_LLM_ROUTE)
_SKIP_BLANK = Skip(SkipReason.BLANK_LINE)


class _Bad(Exception):
    """A field that decides the bill is missing or wrong."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        self.rejected = Rejected(reason, detail[:DETAIL_CHARS_MAX])


def routes(patterns: Iterable[str]) -> Routes:
    """Compile route globs (`chat/completions`, `images/*`) into a test on a request URI.

    The query is cut off, the path is unquoted, repeated or trailing slashes are dropped and `.` and `..` resolved, as
    LiteLLM's own routing or a proxy in between would see it: an odd spelling of a path must not hide a call. `/v1/` in
    front is optional.
    """
    globs = "|".join(translate(pattern.strip("/")) for pattern in patterns)
    pattern = re.compile(rf"(?:v1/)?(?:{globs})")

    def look(uri: str) -> str | None:
        path = path_of(uri)
        if pattern.fullmatch(_resolved(path)) is None:
            return None
        return path[:TEXT_CHARS_MAX].replace("\0", "\N{REPLACEMENT CHARACTER}")

    remembered = lru_cache(maxsize=4096)(look)

    def llm_path(uri: str) -> str | None:
        # clients choose their URIs: only short ones are remembered, or thousands of long ones would fill the memory
        return remembered(uri) if len(uri) <= ID_CHARS_MAX else look(uri)

    return llm_path


def _resolved(path: str) -> str:
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return "/".join(kept)


def path_of(uri: str) -> str:
    """The unquoted path of a request URI, without query, fragment, scheme and host."""
    path = uri.partition("?")[0].partition("#")[0]
    if "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return unquote(path, errors="replace")


def parse(line: bytes, llm_path: Routes) -> UsageFact | Skip | Rejected:
    """One line without its newline -> its outcome. Never raises, whatever the bytes are."""
    try:
        fields = _load(line)
        if fields is None:
            return _SKIP_BLANK
        if "ts" in fields and "method" not in fields and "uri" not in fields:
            return _parse_older(fields, line)
        method, uri = _present(fields, "method"), _present(fields, "uri")
        path = llm_path(uri) if method == "POST" and uri is not None else None
        return _SKIP_ROUTE if path is None else _parse_call(fields, line, path)
    except _Bad as bad:
        return bad.rejected


def _parse_call(fields: dict[str, Any], line: bytes, path: str) -> UsageFact | Skip:
    if not fields.keys() >= _REQUIRED:
        name = next(name for name in REQUIRED_FIELDS if name not in fields)
        raise _Bad(DeadLetterReason.MISSING_FIELD, f"{name}: not in the line; add it to nginx's log_format")
    status = _status(fields)
    echoed_id = _id(fields, "litellm_call_id")
    if status >= 300 and _rejected_before_llm(fields, status, echoed_id is not None):
        return _rejected(fields)
    request_id = _id(fields, "nginx_request_id")
    proxy_id = _id(fields, "call_id")
    metadata = _metadata(fields)
    content_type = _last(_present(fields, "upstream_content_type"))
    return UsageFact(
        call_id=_first_id(echoed_id, proxy_id, request_id),
        nginx_request_id=request_id,
        proxy_call_id=proxy_id,
        id_echoed=echoed_id is not None,
        run_id=_soft_id(fields.get("run_id")) or _soft_id(metadata.get("run_id")),
        attempt=_attempt(metadata.get("attempt")),
        graph_id=_soft_id(metadata.get("graph_id")),
        billing_account_id=_soft_id(fields.get("end_user")),
        method="POST",
        path=path,
        status=status,
        request_completed=fields["request_completion"] == "OK",
        provenance="stream" if content_type.startswith("text/event-stream") else "response",
        requested_model=_soft_id(fields.get("requested_model")),
        header_cost_usd=_soft_number(fields.get("litellm_response_cost")),
        header_model_group=_soft_id(fields.get("litellm_model_group")),
        cache_key=_soft_id(fields.get("litellm_cache_key")),
        request_seconds=_seconds(fields["request_time"]),
        occurred_at=_occurred_at(fields),
        line_sha256=hashlib.sha256(line).digest() if request_id is None else None,
    )


def _parse_older(fields: dict[str, Any], line: bytes) -> UsageFact | Skip:
    """The older format: it logged calls only, and knows neither a request id nor what the upstream did."""
    status = _status(fields)
    echoed_id = _id(fields, "litellm_call_id")
    if echoed_id is None and status in _UNFORWARDED:
        return _rejected(fields)
    metadata = _metadata(fields)
    return UsageFact(
        call_id=_first_id(echoed_id, None, None),
        nginx_request_id=None,
        proxy_call_id=None,
        id_echoed=True,
        run_id=_soft_id(fields.get("run_id")) or _soft_id(metadata.get("run_id")),
        attempt=_attempt(metadata.get("attempt")),
        graph_id=_soft_id(metadata.get("graph_id")),
        billing_account_id=_soft_id(fields.get("end_user")),
        method=None,
        path=None,
        status=status,
        request_completed=False,
        provenance="response",
        requested_model=None,
        header_cost_usd=_soft_number(fields.get("litellm_response_cost")),
        header_model_group=None,
        cache_key=None,
        request_seconds=None,
        occurred_at=_time_of(fields["ts"], "ts"),
        line_sha256=hashlib.sha256(line).digest(),
    )


def _load(line: bytes) -> dict[str, Any] | None:
    """The line's JSON object; None for a line of white space."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip(b" \t\r"):
            return None
        fields = _salvage(line, error)
    if type(fields) is not dict:
        raise _Bad(DeadLetterReason.NOT_AN_OBJECT, f"a JSON {type(fields).__name__} where an object belongs")
    # nginx writes compact JSON, so that the round trip is nearly always the same bytes and this costs half a
    # microsecond; where it is not, look closely: of two values under one key, neither can be trusted
    try:
        compact = orjson.dumps(fields) == line
    except orjson.JSONEncodeError as error:  # it reads deeper nesting than it writes
        raise _Bad(DeadLetterReason.INVALID_JSON, f"nested too deeply: {error}") from None
    if not compact:
        _refuse_duplicate_keys(line)
    return fields


def _salvage(line: bytes, error: Exception) -> Any:
    """nginx copies the client's bytes >= 0x80 unchecked into the line: a header that is not UTF-8 must not make the
    call disappear. A byte order mark is no reason either."""
    try:
        text = line.decode("utf-8-sig", errors="replace")
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise _Bad(DeadLetterReason.INVALID_JSON, str(error)) from None


def _refuse_duplicate_keys(line: bytes) -> None:
    duplicate: list[str] = []

    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len(items) != len({key for key, _ in items}):
            duplicate.append(Counter(key for key, _ in items).most_common(1)[0][0])
        return {}

    try:
        json.loads(line.decode("utf-8-sig", errors="replace"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise _Bad(DeadLetterReason.INVALID_JSON, str(error)) from None
    if duplicate:
        raise _Bad(DeadLetterReason.DUPLICATE_KEY, f"{duplicate[0]!r} stands more than once")


def _present(fields: dict[str, Any], name: str) -> str | None:
    """A field that decides: must be in the line and be text; "" and "-" mean that nginx had no value."""
    try:
        value = fields[name]
    except KeyError:
        raise _Bad(DeadLetterReason.MISSING_FIELD, f"{name}: not in the line; add it to nginx's log_format") from None
    if value is None or value in ("", "-"):
        return None
    if type(value) is not str:
        raise _bad_value(name, value)
    return value


def _bad_value(name: str, value: object) -> _Bad:
    return _Bad(DeadLetterReason.BAD_VALUE, f"{name}: {value!r:.120}")


def _id(fields: dict[str, Any], name: str) -> str | None:
    """An id that may become the key of a call."""
    value = fields.get(name)
    if type(value) is str and 1 < len(value) <= ID_CHARS_MAX and value.isascii() and value.isprintable():
        if value[0] == " " or value[-1] == " ":
            raise _bad_value(name, value)
        return value
    if value is None or value in ("", "-"):
        return None
    if (
        type(value) is not str
        or len(value) > ID_CHARS_MAX
        or "\0" in value
        or "\N{REPLACEMENT CHARACTER}" in value
        or value != value.strip()
    ):
        raise _bad_value(name, value)
    return value


def _first_id(echoed: str | None, proxy: str | None, request: str | None) -> str:
    """The key of a call: LiteLLM's own answer, else the id the proxy sent, else nginx's request id."""
    key = echoed or proxy or request
    if key is None:
        raise _Bad(DeadLetterReason.MISSING_FIELD, "litellm_call_id, call_id, nginx_request_id: none has a value")
    return key


def _status(fields: dict[str, Any]) -> int:
    value = fields.get("status")
    if type(value) is int:
        value = f"{value:03d}"
    if value in (None, "", "-"):
        raise _Bad(DeadLetterReason.MISSING_FIELD, "status: not in the line; add it to nginx's log_format")
    status = _STATUSES.get(value) if type(value) is str else None
    if status is None:
        raise _bad_value("status", value)
    return status


def _rejected_before_llm(fields: dict[str, Any], status: int, id_echoed: bool) -> bool:
    """True where LiteLLM never worked on the request. 499 and 504 are calls: LiteLLM goes on and charges."""
    if id_echoed or status in (499, 504):
        return False
    if status in _UNFORWARDED:
        return True
    connected = _any_value(_present(fields, "upstream_connect_time"))
    if status == 502:
        return not connected
    # nginx's own answers: too large a body, a rate limit, a broken request
    return not connected and not _any_value(_present(fields, "upstream_status"))


def _rejected(fields: dict[str, Any]) -> Skip:
    """With the proxy's id, which LiteLLM was given if it was asked at all. An odd one makes no dead letter here."""
    known_as = _soft_id(fields.get("call_id")) or _soft_id(fields.get("nginx_request_id"))
    return Skip(SkipReason.REJECTED_BEFORE_LLM, known_as)


def _any_value(text: str | None) -> bool:
    """nginx writes one value per upstream it tried, `-` where there was none: "-, 0.001"."""
    return text is not None and any(part not in ("", "-") for part in re.split("[, :]+", text))


def _last(text: str | None) -> str:
    return "" if text is None else text.rpartition(", ")[2]


def _occurred_at(fields: dict[str, Any]) -> datetime:
    msec = fields.get("msec")
    if type(msec) is str and _MSEC.fullmatch(msec):
        return _at(msec)
    if msec in (None, "", "-"):
        if fields.get("time") in (None, "", "-"):
            raise _Bad(DeadLetterReason.MISSING_FIELD, "msec: not in the line; add it to nginx's log_format")
        return _time_of(fields["time"], "time")
    raise _bad_value("msec", msec)


def _at(seconds: str) -> datetime:
    """Seconds since the epoch with at most six decimals, exactly: from 2242 on, a float may be a microsecond off."""
    second, _, fraction = seconds.partition(".")
    return datetime.fromtimestamp(int(second), UTC).replace(microsecond=int(f"{fraction:0<6}"))


def _time_of(value: object, name: str) -> datetime:
    """ISO 8601 with an offset, or seconds since the epoch."""
    text = repr(value) if type(value) in (int, float) else value
    if type(text) is not str:
        raise _bad_value(name, value)
    if _MSEC.fullmatch(text):
        return _at(text)
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise _bad_value(name, value) from None
    if parsed.tzinfo is None or not 2001 <= parsed.year <= 2286:
        raise _bad_value(name, value)
    return parsed.astimezone(UTC)


def _metadata(fields: dict[str, Any]) -> dict[str, Any]:
    """`spend_logs_metadata` is JSON inside a JSON string, sent by a client: broken, a list, or fine."""
    value = fields.get("spend_logs_metadata")
    if type(value) is str and value.startswith("{"):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return {}
    return value if type(value) is dict else {}


def _soft_id(value: object) -> str | None:
    """An attribute; dropped where the client sent what cannot be one. What was not UTF-8 is none: two accounts must not
    become one because the same replacement characters stand in both."""
    if type(value) is not str or value in ("", "-") or len(value) > ID_CHARS_MAX:
        return None
    return None if "\0" in value or "\N{REPLACEMENT CHARACTER}" in value else value


def _attempt(value: object) -> int | None:
    if type(value) is str and value.isascii() and value.isdigit() and len(value) <= 9:
        return int(value)
    return value if type(value) is int and 0 <= value < 1_000_000_000 else None


def _soft_number(value: object) -> Decimal | None:
    """A decimal from 0 to below 10^20, as exact as the text; None for anything else (NaN, 1e400, "-0.5")."""
    if type(value) in (int, float):
        value = repr(value)
    return _decimal(value) if type(value) is str and len(value) <= DECIMAL_CHARS_MAX else None


def _seconds(value: object) -> Decimal | None:
    """A duration below 10^9 seconds: a call's start is computed from it, and that must be a date."""
    seconds = _soft_number(value)
    return seconds if seconds is not None and seconds < 10**9 else None


@lru_cache(maxsize=4096)
def _decimal(text: str) -> Decimal | None:
    number = Decimal(text) if _NUMBER.fullmatch(text) else None
    return number if number is not None and number < 10**20 else None
