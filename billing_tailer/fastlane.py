"""The common audit line straight to its row; any other line goes the long way, through `audit`. Pure.

Of a line in the log format of `deploy/nginx` whose call id LiteLLM echoed, all but seven values repeat from call to
call: their columns are read by `audit` once and then known by their text. The seven are looked at by one regular
expression that lets through only what `audit` would take as it stands. What it does not let through is no mistake: it
is read by `audit`. A line has the same outcome and the same row on both ways
(tests/test_fastlane.py::test_both_ways_agree); this one takes a third of the time.
"""

import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter

import orjson

from billing_tailer import audit
from billing_tailer.model import FactRow, Rejected, Skip, UsageFact
from billing_tailer.rows import row_of, shared_text

SHAPES_MAX = 4096
SHAPE_BYTES_MAX = 1536
"""Clients choose some of these values: only so many and so large ones are remembered. In memory, which one odd
character makes four times as large as its text."""

_shared = itemgetter(
    "method",
    "uri",
    "status",
    "run_id",
    "end_user",
    "spend_logs_metadata",
    "request_completion",
    "upstream_content_type",
    "litellm_model_group",
)
"""With `requested_model`, which not every format has, all that the shared columns follow from."""
_own = itemgetter(
    "litellm_call_id",
    "nginx_request_id",
    "request_time",
    "litellm_response_cost",
    "litellm_cache_key",
    "msec",
)
_ID = r"[0-9A-Za-z_.:-]{2,256}"
_COST = r"[0-9]{1,20}(?:\.[0-9]{1,30})?(?:e-[0-9]{1,2})?"
_PLAIN = re.compile(
    rf"((?:{_ID})?\t({_ID})\t{_ID}\t([0-9]{{1,9}})\.([0-9]{{1,6}})\t(?:{_COST})?\t(?:{_ID})?)"
    r"\t([0-9]{9,10})\.([0-9]{1,6})",
    re.ASCII,
)
"""The own values as `rows.OWN_COLUMNS` has them, and the time: none of them needs escaping, none can be refused."""

Shape = tuple[tuple[str, ...], str | None]


def parser(llm_path: audit.Routes) -> Callable[[bytes], FactRow | Skip | Rejected]:
    """`audit.parse` for many lines of one log, with facts as rows."""
    shapes: dict[Shape, str] = {}

    def parse(line: bytes) -> FactRow | Skip | Rejected:
        shape: Shape | None = None
        try:
            fields = orjson.loads(line)
            shape = (_shared(fields), fields.get("requested_model"))
            shared = shapes.get(shape)
            if shared is not None:
                own = _PLAIN.fullmatch("\t".join((fields.get("call_id", ""), *_own(fields))))
                if (
                    own is not None
                    and "upstream_status" in fields
                    and "upstream_connect_time" in fields
                    and orjson.dumps(fields) == line
                ):
                    values, call_id, took, took_fraction, second, fraction = own.groups()
                    started = int(f"{second}{fraction:0<6}") - int(f"{took}{took_fraction:0<6}")
                    row = (
                        call_id,
                        f"{values}\t{_second(int(second))}.{fraction}+00\t\t{shared}",
                        f"{call_id}\t{_second(started // 1_000_000)}.{started % 1_000_000:06}+00",
                    )
                    return tuple.__new__(FactRow, row)  # as FactRow(*row), which takes three times as long
        except (orjson.JSONDecodeError, orjson.JSONEncodeError, KeyError, TypeError):
            shape = None  # another format, another type: what it is, audit says
        outcome = audit.parse(line, llm_path)
        if not isinstance(outcome, UsageFact):
            return outcome
        if shape is not None and _is_common(outcome, shape):
            if len(shapes) >= SHAPES_MAX:
                shapes.clear()
            shapes[shape] = shared_text(outcome)
        return row_of(outcome)

    return parse


def _is_common(fact: UsageFact, shape: Shape) -> bool:
    """Whether another line of this shape has these shared columns. Without LiteLLM's answer, it matters for the outcome
    what the upstream did."""
    values, requested_model = shape
    texts = [*values, requested_model or ""]
    # values of other types can be equal (1, 1.0, true): no shape may be known by them
    return (
        fact.id_echoed
        and all(type(text) is str for text in texts)
        and sum(map(sys.getsizeof, texts)) <= SHAPE_BYTES_MAX
    )


@lru_cache(maxsize=4096)
def _second(epoch: int) -> str:
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d %H:%M:%S")
