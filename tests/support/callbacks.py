"""What LiteLLM posts: real payloads with ids of their own, and a prompt that must be found nowhere."""

import asyncio
import contextlib
import json
import random
from pathlib import Path
from typing import Any

PATH = "/v1/callbacks/litellm"
CANARY = "canary-of-a-prompt"
DATA = Path(__file__).parents[1] / "data"
SAMPLES = [json.loads(path.read_bytes()) for path in sorted((DATA / "payloads").glob("*.json"))]


def event(call_id: str, prompt: str = CANARY) -> dict[str, Any]:
    """A real payload, with an id of its own and a prompt wherever LiteLLM may put one."""
    payload = dict(random.choice(SAMPLES))
    payload["litellm_call_id"] = call_id
    payload["messages"] = [{"role": "user", "content": prompt}]
    payload["response"] = {"choices": [{"message": {"content": f"re: {prompt}"}}]}
    payload["error_str"] = prompt
    payload["model_parameters"] = {"user": prompt, "tools": [{"function": {"description": prompt}}]}
    payload["hidden_params"] = {"additional_headers": {"authorization": prompt}}
    payload["metadata"] = {**(payload.get("metadata") or {}), "requester_metadata": {"body": prompt}}
    return payload


def dumps(value: object) -> bytes:
    """As LiteLLM writes it."""
    return json.dumps(value, default=str).encode()


async def post(port: int, token: str, body: bytes) -> int | None:
    """POST a body; the status, None if there was no answer."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return None
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        status = await reader.readline()
        return int(status.split()[1]) if status else None
    except OSError:
        return None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
