"""The newest log of each directory: is it what the parser needs, is it written line by line, is its clock right.

The parser is lenient with what one line says; here the `log_format` that makes all lines is judged by the newest of
them, so that everything that it lacks is named at once.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from billing_tailer import audit
from billing_tailer.checks.finding import Finding, failed, fine, warned
from billing_tailer.files import LogFiles, directory_of
from billing_tailer.model import DeadLetterReason, Rejected, SeenFile
from billing_tailer.settings import Settings

SAMPLE_BYTES = 256 << 10
CLOCK_SECONDS_MAX = 2.0
HELD_BACK_SECONDS_MIN = 1.0
HELD_BACK_SECONDS_MAX = 3600.0
"""A file that was written to so long after its newest line was copied or touched: that says nothing of nginx."""
UNFINISHED_SECONDS_MAX = 5.0
BLOCK_BYTES = 4096
"""Whoever buffers without regard to lines writes multiples of it."""

VARIABLES: Mapping[str, str] = {
    "method": "$request_method",
    "uri": "$request_uri",
    "status": "$status",
    "msec": "$msec",
    "run_id": "$http_x_cogni_run_id",
    "end_user": "$audit_end_user",
    "litellm_call_id": "$upstream_http_x_litellm_call_id",
    "request_time": "$request_time",
    "request_completion": "$request_completion",
    "upstream_status": "$upstream_status",
    "upstream_connect_time": "$upstream_connect_time",
    "upstream_content_type": "$upstream_http_content_type",
    "nginx_request_id": "$request_id",
    "call_id": "$request_id",
}
"""What nginx writes into the fields, as in deploy/nginx/audit.conf.template
(tests/test_checks.py::test_the_variables_are_those_of_the_template)."""
NEEDED = ("method", "uri", "status", "msec", *audit.REQUIRED_FIELDS)
WANTED = {
    "nginx_request_id": "a line that comes twice cannot be told from two requests under one call id",
    "call_id": "calls whose answer never came (499, 504) have no key that LiteLLM knows",
}
_TEMPLATE = "compare log_format with deploy/nginx/audit.conf.template"
_HEX_ESCAPE = re.compile(rb"\\x[0-9A-Fa-f]{2}")
_BARE = re.compile(rb'":\s*(?:-\s*[,}]|[0-9.]+,\s+[0-9-])')


def check_logs(settings: Settings) -> Iterator[Finding]:
    """Of the newest plain log of each directory that has one."""
    files = LogFiles(settings.audit_globs, settings.open_files_max)
    try:
        newest: dict[str, SeenFile] = {}
        for file in files.scan().files:
            directory = directory_of(file.path)
            known = newest.get(directory)
            if file.listed and not file.compressed and (known is None or file.mtime_ns >= known.mtime_ns):
                newest[directory] = file
        for file in newest.values():
            try:
                yield from _check_log(settings, files, file)
            except OSError:
                continue  # the volume's own findings say so
    finally:
        files.close()


def _check_log(settings: Settings, files: LogFiles, file: SeenFile) -> Iterator[Finding]:
    end = files.after_last_newline(file)
    sample = files.read_at(file, max(0, end - SAMPLE_BYTES), min(end, SAMPLE_BYTES))
    lines = sample.split(b"\n")[1 if end > SAMPLE_BYTES else 0 : -1]  # only a newline ends a line
    newest = next((fields for line in reversed(lines) if (fields := _fields(line)) is not None), None)
    if newest is not None:
        yield from _check_fields(file.path, newest)
    yield _check_parsed(settings, file.path, lines)
    yield from _check_buffering(file, files.size(file), end, newest)
    ahead = 0.0 if newest is None else _ended_at(newest) - time.time()
    if ahead > CLOCK_SECONDS_MAX:
        what = f"{file.path}: the newest line ended {ahead:.0f} s in the future"
        yield failed("clock", what, "synchronise the clocks (NTP) of this machine and of the proxy's")


def _fields(line: bytes) -> dict[str, Any] | None:
    """A line of nginx's that is JSON; None also of the older format, which is not asked for all that."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_older = isinstance(fields, dict) and "ts" in fields and not fields.keys() & {"method", "uri"}
    return fields if isinstance(fields, dict) and not is_older else None


def _check_fields(path: str, newest: Mapping[str, Any]) -> Iterator[Finding]:
    missing = [name for name in NEEDED if name not in newest and not (name == "msec" and "time" in newest)]
    if missing:
        format_ = ", ".join(f'"{name}":"{VARIABLES[name]}"' for name in missing)
        what = f"{path}: the newest line has no {', '.join(missing)}"
        yield failed("log format", what, f"add to nginx's log_format: {format_}")
    for name, why in WANTED.items():
        if name not in newest:
            what = f"{path}: the newest line has no {name}: {why}"
            yield warned("log format", what, f'add to nginx\'s log_format: "{name}":"{VARIABLES[name]}"')
    bare = [name for name in VARIABLES if name in newest and not isinstance(newest[name], str)]
    if bare:
        what = f"{path}: not quoted in the newest line: {', '.join(bare)}"
        hint = "quote every value in log_format: nginx writes - or lists there, and such a line is no JSON"
        yield warned("log format", what, hint)


def _check_parsed(settings: Settings, path: str, lines: Sequence[bytes]) -> Finding:
    """The last lines, read as the daemon would."""
    parse = partial(audit.parse, llm_path=audit.routes(settings.llm_routes))
    read = [(line, parse(line)) for line in lines]
    bad = [(line, outcome) for line, outcome in read if isinstance(outcome, Rejected)]
    if not bad:
        return fine("log format", f"{path}: the last {len(lines)} lines are understood")
    line, last = bad[-1]
    what = f"{path}: {len(bad)} of the last {len(lines)} lines are not understood: {last.detail}"
    if last.reason is DeadLetterReason.INVALID_JSON:
        return failed("log format", what, _hint_of(line))
    if last.reason is DeadLetterReason.MISSING_FIELD:
        return failed("log format", what, f"add the field to nginx's log_format: {_TEMPLATE}")
    return failed("log format", what, f"see them with `billing-tailer dead-letters list`; {_TEMPLATE}")


def _hint_of(line: bytes) -> str:
    """Why a line may be no JSON."""
    if not line.lstrip().startswith(b"{"):
        return f"the access_log names another log_format than the one of the audit log: {_TEMPLATE}"
    if _HEX_ESCAPE.search(line):
        return "write `log_format audit escape=json ...`: without it nginx escapes as \\xHH, which is no JSON"
    if _BARE.search(line):
        return "quote every value in log_format: nginx writes - or lists where it has no single number"
    return f"write `log_format audit escape=json ...`, and quote every value: {_TEMPLATE}"


def _check_buffering(file: SeenFile, size: int, end: int, newest: Mapping[str, Any] | None) -> Iterator[Finding]:
    """nginx's own buffer holds whole lines, so that only their times give it away; others tear lines."""
    hint = "remove buffer=, flush= and gzip= from access_log, and whatever stands between nginx and the file"
    written_at = file.mtime_ns / 1e9
    if size > end:
        silent = time.time() - written_at
        if size % BLOCK_BYTES == 0:
            what = (
                f"{file.path} ends within a line, at a multiple of {BLOCK_BYTES} bytes ({size}): a buffer tears lines"
            )
            yield warned("buffering", what, hint)
        elif silent > UNFINISHED_SECONDS_MAX:
            what = f"{file.path} ends within a line since {silent:.0f} s: its writer buffers, or has died there"
            yield warned("buffering", what, hint)
    held_back = 0.0 if newest is None else written_at - _ended_at(newest)
    if HELD_BACK_SECONDS_MIN < held_back < HELD_BACK_SECONDS_MAX:
        what = f"{file.path} was written {held_back:.1f} s after its newest line had ended: lines are held back"
        yield warned("buffering", what, f"{hint}; no matter if the file was copied or touched")


def _ended_at(newest: Mapping[str, Any]) -> float:
    """Seconds of the epoch; 0 where the line does not say."""
    try:
        return float(newest["msec"])
    except (KeyError, TypeError, ValueError):
        return 0.0
