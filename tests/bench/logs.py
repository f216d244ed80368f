"""Logs and spool files as long as one likes, of the recorded lines: half of the calls streamed, 100 runs, 20 accounts,
four models, random call ids. The two are of the same calls where count and seed are the same.

A template for each kind of call, filled in per line: a million lines take two seconds.
"""

import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from billing_tailer.spend import slim
from tests.support.callbacks import DATA

RUNS: Final = 100
ACCOUNTS: Final = 20
MODELS: Final = ("gpt-4o-mini", "claude-sonnet", "text-large", "mistral-small")
BLOCK_LINES: Final = 5_000
CALLS_PER_SECOND: Final = 1_000
CREDITS: Final = 2_250
"""What each of the calls costs."""
_ID: Final = "@@call@@"
_TIME: Final = "@@time@@"


def call_ids(count: int, seed: int) -> Iterator[bytes]:
    """The same ones for the same seed, as nginx makes them: 32 hexadecimal digits."""
    dice = random.Random(seed)
    for start in range(0, count, BLOCK_LINES):
        digits = dice.randbytes(16 * min(BLOCK_LINES, count - start)).hex().encode()
        for at in range(0, len(digits), 32):
            yield digits[at : at + 32]


def write_log(path: Path, count: int, seed: int) -> None:
    """The lines of so many calls, the last of which ended now."""
    _write(path, _lines(), count, seed)


def write_spool(path: Path, count: int, seed: int) -> None:
    """The callbacks of the calls of `write_log`, as the spool keeps them."""
    _write(path, _spool_lines(), count, seed)


def spool_name(number: int = 0) -> str:
    """The name of a spool file whose writer is dead."""
    return f"callbacks-{'b' * 32}-{number:06d}.jsonl"


def line(call_id: bytes, number: int = 0) -> bytes:
    """One line of a call that ended now."""
    return _lines()[number % len(_LINES)] % {b"call": call_id, b"time": b"%.3f" % time.time()}


def callback(call_id: str, number: int = 0) -> dict[str, Any]:
    """LiteLLM's event of a call, as it is posted, of the run, account and model of `line`."""
    recorded = _recorded_callback(streamed=bool(number % 2))
    return {**recorded, "id": f"chatcmpl-{call_id}", "litellm_call_id": call_id, "model_group": _model(number)}


def _write(path: Path, templates: Sequence[bytes], count: int, seed: int) -> None:
    began = time.time() - count / CALLS_PER_SECOND
    ids = zip(itertools.count(), itertools.cycle(templates), call_ids(count, seed), strict=False)
    with path.open("wb", buffering=1 << 20) as out:
        while block := list(itertools.islice(ids, BLOCK_LINES)):
            out.write(
                b"".join(
                    template % {b"call": call_id, b"time": b"%.3f" % (began + number / CALLS_PER_SECOND)}
                    for number, template, call_id in block
                )
            )


def _model(number: int) -> str:
    return MODELS[number // 2 % len(MODELS)]


def _kinds() -> Iterator[int]:
    return iter(range(2 * len(MODELS) * RUNS))


def _template(text: bytes) -> bytes:
    """With named places for the call id and the time."""
    found = text.replace(b"%", b"%%").replace(_ID.encode(), b"%(call)b")
    return found.replace(b'"' + _TIME.encode() + b'"', b"%(time)b").replace(_TIME.encode(), b"%(time)b")


def _recorded_line(*, streamed: bool) -> dict[str, str]:
    """A plain answer or a stream that was paid for."""
    wanted = "text/event-stream" if streamed else "application/json"
    for text in (DATA / "litellm" / "audit.jsonl").read_bytes().splitlines():
        found: dict[str, str] = json.loads(text)
        kind = found["upstream_content_type"].partition(";")[0]
        if (found["status"], found["request_completion"], kind) == ("200", "OK", wanted) and not found[
            "litellm_cache_key"
        ]:
            return found
    raise AssertionError(f"no recorded line of a {wanted}")


def _lines() -> list[bytes]:
    """Made once."""
    if not _LINES:
        recorded = [_recorded_line(streamed=streamed) for streamed in (False, True)]
        for number in _kinds():
            run = f"run-{number // (2 * len(MODELS)):06d}"
            changes = {
                "msec": _TIME,
                "call_id": _ID,
                "nginx_request_id": _ID,
                "litellm_call_id": _ID,
                "run_id": run,
                "end_user": f"account-{number // (2 * len(MODELS)) % ACCOUNTS}",
                "requested_model": _model(number),
                "litellm_model_group": _model(number),
                "spend_logs_metadata": json.dumps({"run_id": run, "graph_id": "planner", "attempt": 1}),
            }
            text = json.dumps({**recorded[number % 2], **changes}, separators=(",", ":")).encode() + b"\n"
            # msec is a string in the log
            _LINES.append(_template(text).replace(b'"msec":%(time)b', b'"msec":"%(time)b"'))
    return _LINES


def _recorded_callback(*, streamed: bool) -> dict[str, Any]:
    name = "stream" if streamed else "nonstream"
    found: dict[str, Any] = json.loads((DATA / "payloads" / f"{name}.json").read_bytes())
    return {**found, "response_cost": 0.000225, "end_user": None}


def _spool_lines() -> list[bytes]:
    """Made once."""
    if not _SPOOL_LINES:
        for number in _kinds():
            stored = {"received_at": _TIME, "payload": slim(callback(_ID, number))}
            _SPOOL_LINES.append(_template(orjson.dumps(stored, option=orjson.OPT_APPEND_NEWLINE)))
    return _SPOOL_LINES


_LINES: Final[list[bytes]] = []
_SPOOL_LINES: Final[list[bytes]] = []
