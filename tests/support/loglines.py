"""Audit lines for tests, in the format of the recorded ones."""

import json
from pathlib import Path

RECORDED = Path(__file__).parent.parent / "data" / "audit.jsonl"


def line(number: int, **changes: str) -> bytes:
    """The audit line of call `call-<number>`, with its newline: always the same bytes. Fields can be changed."""
    fields = {
        "msec": f"{1795307912 + number / 1000:.3f}",
        "time": "2026-11-22T00:38:32+00:00",
        "call_id": "",
        "nginx_request_id": f"{number:032x}",
        "server_port": "8080",
        "method": "POST",
        "uri": "/v1/chat/completions",
        "status": "200",
        "run_id": f"run-{number % 100}",
        "end_user": "account-1",
        "spend_logs_metadata": json.dumps({"run_id": f"run-{number % 100}", "graph_id": "g", "attempt": 1}),
        "litellm_call_id": f"call-{number:08d}",
        "litellm_model_group": "up-gpt-4o-mini",
        "litellm_response_cost": "0.000225",
        "litellm_cache_key": "",
        "request_time": "0.425",
        "request_completion": "OK",
        "upstream_addr": "127.0.0.1:4000",
        "upstream_status": "200",
        "upstream_connect_time": "0.001",
        "upstream_header_time": "0.425",
        "upstream_response_time": "0.426",
        "upstream_content_type": "application/json",
        **changes,
    }
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def lines(start: int, count: int) -> bytes:
    """`count` lines of the calls from `start` on."""
    return b"".join(line(number) for number in range(start, start + count))
