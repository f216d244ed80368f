"""Spool lines and spend-log rows for tests, in the shape LiteLLM's have after `spend.slim`."""

import json
from typing import Any


def payload(number: int, cost: float | None = 0.000225, *, attempt: int = 0, **changes: Any) -> dict[str, Any]:
    """LiteLLM's event for attempt `attempt` of call `call-<number>`. Fields can be changed."""
    return {
        "id": f"chatcmpl-{number}-{attempt}",
        "litellm_call_id": f"call-{number:08d}",
        "status": "success",
        "model_group": "up-gpt-4o-mini",
        "model": "gpt-4o-mini",
        "model_id": "dep-1",
        "custom_llm_provider": "openai",
        "prompt_tokens": 1000,
        "completion_tokens": 200,
        "response_cost": cost,
        "cache_hit": None,
        "end_user": None,
        "startTime": 1795307912.0 + number + attempt / 10,
        "endTime": 1795307912.5 + number + attempt / 10,
        **changes,
    }


def spool_line(event: dict[str, Any]) -> bytes:
    """One line of a spool file."""
    return json.dumps({"received_at": 1795307913.0, "payload": event}).encode() + b"\n"


def failure(number: int, cost: float = 0.0, *, attempt: int = 0, **changes: Any) -> dict[str, Any]:
    """A failed attempt."""
    failed: dict[str, Any] = {
        "status": "failure",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "error_information": {"error_code": "500"},
    }
    return payload(number, cost, attempt=attempt, **{**failed, **changes})
