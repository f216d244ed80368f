"""An OpenAI- and Anthropic-compatible provider whose answers report known usage: `python provider.py PORT`.

Runs in LiteLLM's venv. chat: 1000 prompt tokens (600 of them cached) and 200 completion tokens (64 of them reasoning);
embeddings: 500; /v1/messages: 400 + 600 read from the cache + 100 written to it, and 200 output. Words in the model's
name switch the behaviour:

- err500, badreq, ratelimit: answers 500, 400, 429
- hang: answers after 60 s
- flaky: 500 to the first call of each prompt, then 200
- slow: 3 s before a plain answer, 40 x 0.25 s in a stream
- diestream: dies after 4 chunks of a stream
- nousage: sends no usage in a stream
- fixedid: always the same response id
- unpriced: answers with the model name it was asked for
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "gpt-4o-mini-2024-07-18"
SHUTDOWN_SECONDS = 1
CHAT_USAGE = {
    "prompt_tokens": 1000,
    "completion_tokens": 200,
    "total_tokens": 1200,
    "prompt_tokens_details": {"cached_tokens": 600, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 64,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}
EMBEDDING_USAGE = {"prompt_tokens": 500, "total_tokens": 500}
MESSAGES_USAGE = {
    "input_tokens": 400,
    "cache_read_input_tokens": 600,
    "cache_creation_input_tokens": 100,
    "output_tokens": 200,
}
# word in the model's name: status, message, type, code
ERRORS = {
    "err500": (500, "boom", "server_error", "internal"),
    "badreq": (400, "bad param", "invalid_request_error", "bad"),
    "ratelimit": (429, "slow down", "rate_limit", "rate_limit_exceeded"),
    "flaky": (500, "flaky", "server_error", "internal"),
}

numbers = itertools.count(1)
flaky_seen: set[str] = set()


def error_of(body: dict[str, Any]) -> JSONResponse | None:
    """The error that the model's name asks for."""
    word = next((word for word in ERRORS if word in body["model"]), None)
    if word == "flaky":
        prompt = json.dumps(body.get("messages"))
        if prompt in flaky_seen:
            return None
        flaky_seen.add(prompt)
    if word is None:
        return None
    status, message, kind, code = ERRORS[word]
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status)


async def chat(request: Request) -> Response:
    """/v1/chat/completions"""
    body = await request.json()
    asked = body["model"]
    error = error_of(body)
    if error is not None:
        return error
    if "hang" in asked:
        await asyncio.sleep(60)
    answer = {
        "id": "chatcmpl-FIXED" if "fixedid" in asked else f"chatcmpl-up{os.getpid()}x{next(numbers):05d}",
        "created": int(time.time()),
        "model": asked if "unpriced" in asked else MODEL,
    }
    if body.get("stream"):
        return StreamingResponse(chat_stream(body, answer), media_type="text/event-stream")
    if "slow" in asked:
        await asyncio.sleep(3)
    message = {"role": "assistant", "content": "hello from upstream"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return JSONResponse({**answer, "object": "chat.completion", "choices": choices, "usage": CHAT_USAGE})


async def chat_stream(body: dict[str, Any], answer: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a streamed answer."""
    asked = body["model"]

    def chunk(choices: list[dict[str, Any]], **more: object) -> str:
        data = {**answer, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(data)}\n\n"

    for number in range(40 if "slow" in asked else 6):
        delta = {"content": f"w{number} "}
        if number == 0:
            delta["role"] = "assistant"
        yield chunk([{"index": 0, "delta": delta, "finish_reason": None}])
        await asyncio.sleep(0.25 if "slow" in asked else 0.02)
        if "diestream" in asked and number == 3:
            raise RuntimeError("the provider dies, as the model's name wants it")
    yield chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if (body.get("stream_options") or {}).get("include_usage") and "nousage" not in asked:
        yield chunk([], usage=CHAT_USAGE)
    yield "data: [DONE]\n\n"


async def embeddings(request: Request) -> Response:
    """/v1/embeddings"""
    body = await request.json()
    error = error_of(body)
    if error is not None:
        return error
    data = [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2, 0.3]}]
    return JSONResponse({"object": "list", "model": body["model"], "data": data, "usage": EMBEDDING_USAGE})


async def messages(request: Request) -> Response:
    """/v1/messages"""
    body = await request.json()
    answer = {
        "id": f"msg_up{os.getpid()}x{next(numbers):05d}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "stop_sequence": None,
    }
    if body.get("stream"):
        return StreamingResponse(messages_stream(answer), media_type="text/event-stream")
    content = [{"type": "text", "text": "hello from upstream"}]
    return JSONResponse({**answer, "content": content, "stop_reason": "end_turn", "usage": MESSAGES_USAGE})


async def messages_stream(answer: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a streamed message."""

    def event(kind: str, **data: object) -> str:
        return f"event: {kind}\ndata: {json.dumps({**data, 'type': kind})}\n\n"

    start = {**answer, "content": [], "stop_reason": None, "usage": {**MESSAGES_USAGE, "output_tokens": 1}}
    yield event("message_start", message=start)
    yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    for number in range(6):
        yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": f"w{number} "})
        await asyncio.sleep(0.05)
    yield event("content_block_stop", index=0)
    yield event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=MESSAGES_USAGE)
    yield event("message_stop")


ROUTES = [
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/messages", messages, methods=["POST"]),
]

if __name__ == "__main__":
    app = Starlette(routes=ROUTES)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), timeout_graceful_shutdown=SHUTDOWN_SECONDS)
