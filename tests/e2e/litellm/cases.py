"""Known calls to LiteLLM through nginx, and what each must cost whoever made it.

The provider reports known usage and LiteLLM's prices are pinned with its version, so that the bill of every case is
known before it is sent. Only the cost of a stream that the client leaves half way depends on how far it came: there
`cost_usd` is None, and LiteLLM's own word decides. Tokens that no provider reported are counted by LiteLLM and hold
for the pinned version.
"""

import http.client
import json
import time
import urllib.parse
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from tests.e2e.litellm.stack import MASTER_KEY

ACCOUNT: Final = "enduser-42"
GRAPH: Final = 'g"1"'
QUESTION: Final = "a question that nobody may keep"
COUNTED: Final = "Describe the weather of today in a few short words."  # LiteLLM counts it as 18 tokens
PRIVATE_TEXTS: Final = (QUESTION, COUNTED, "hello from upstream", "w0 w1 w2", MASTER_KEY, "sk-wrong")
"""What clients sent and got, and their keys: none of it may be stored."""

CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"
MESSAGES: Final = "/v1/messages"
MINI: Final = "up-gpt-4o-mini"
CLIENT_SECONDS_MAX: Final = 70


class Outcome(StrEnum):
    """How a call must end."""

    CHARGED = "charged"
    """A receipt, over 0 where there is nothing to pay: a cache hit, a free model."""
    NOT_CHARGED = "not_charged"
    HELD = "held_zero_cost"
    UNATTRIBUTED = "unattributed"
    OVERDUE = "overdue"
    NO_CALL = "no_call"
    """Not a call at all: no fact."""


@dataclass(frozen=True, slots=True)
class Expect:
    """What must be known of a call when all is over; a None is not looked at.

    `events` are the callback events that LiteLLM makes of it, `row` is whether its spend log keeps a row.
    """

    outcome: Outcome
    cost_usd: Decimal | None = None
    model_group: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_hit: bool = False
    provenance: str = "response"
    model_mismatch: bool = False
    events: int = 1
    row: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """A request. `hang_up`: the client leaves after so many events of a stream, or after so many seconds without an
    answer. `after` is the case that must have been sent, and answered a second ago."""

    expect: Expect
    path: str
    body: Mapping[str, Any] | None
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str | None = MASTER_KEY
    hang_up: int | float | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A case that was sent. `status` is what the client saw, None where it left before there was one."""

    case: str
    run_id: str
    status: int | None
    expect: Expect


# --- what to expect -----------------------------------------------------------------------------------------------


def charged(group: str, cost: str, prompt: int, completion: int, **more: Any) -> Expect:
    """A receipt over a known cost."""
    return Expect(Outcome.CHARGED, Decimal(cost), group, prompt, completion, **more)


def chatted(group: str, cost: str = "0.000225", **more: Any) -> Expect:
    """A receipt over the provider's usual answer to a chat."""
    return charged(group, cost, 1000, 200, cached_tokens=600, reasoning_tokens=64, **more)


def failed(group: str | None = None) -> Expect:
    """A failure that costs nothing."""
    return Expect(Outcome.NOT_CHARGED, model_group=group)


STREAM: Final = {"provenance": "stream"}
NO_CALL: Final = Expect(Outcome.NO_CALL, events=0, row=False)


# --- what to send -------------------------------------------------------------------------------------------------


def chat(model: str, content: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a chat, its prompt unlike any other unless it is given; a given one is kept out of the cache."""
    if content == COUNTED:
        more["cache"] = {"no-cache": True, "no-store": True}
    return {"model": model, "messages": [{"role": "user", "content": content or f"{QUESTION}: {uuid.uuid4()}"}], **more}


def streamed(model: str, content: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a chat that is answered piece by piece."""
    return chat(model, content, stream=True, **more)


def embedding(model: str) -> dict[str, Any]:
    """The body of a request for an embedding."""
    return {"model": model, "input": f"{QUESTION}: {uuid.uuid4()}"}


def cases() -> dict[str, Case]:
    """Every case by name, in the order in which they are to be sent; each set has prompts of its own."""
    repeated = f"{QUESTION}: {uuid.uuid4()}"
    spoofed = {"x-litellm-call-id": "chosen-by-the-client"}
    return {**_chats(repeated, spoofed), **_failures(), **_odd_ends(), **_prices(), **_others()}


def _chats(repeated: str, spoofed: Mapping[str, str]) -> dict[str, Case]:
    fixed_id = chatted("up-fixedid")
    claude = charged("up-haiku", "0.001585", 1100, 200, cached_tokens=600)
    claude_stream = charged("up-haiku", "0.001585", 1100, 200, cached_tokens=600, **STREAM)
    body = {**chat("up-haiku"), "max_tokens": 50}
    hit = chatted(MINI, "0", cache_hit=True)
    hit_stream = charged(MINI, "0", 1000, 200, cache_hit=True, **STREAM)  # LiteLLM forgets the details of the tokens
    return {
        # the provider gives both the same id, and LiteLLM silently drops the row of the second
        "same_provider_id": Case(fixed_id, CHAT, chat("up-fixedid")),
        "same_provider_id_again": Case(chatted("up-fixedid", row=False), CHAT, chat("up-fixedid")),
        "nonstream": Case(chatted(MINI), CHAT, chat(MINI)),
        "stream": Case(chatted(MINI, **STREAM), CHAT, streamed(MINI)),
        "stream_usage": Case(chatted(MINI, **STREAM), CHAT, streamed(MINI, stream_options={"include_usage": True})),
        "embeddings": Case(charged("up-emb", "0.00001", 500, 0), EMBEDDINGS, embedding("up-emb")),
        "messages": Case(claude, MESSAGES, body),
        "messages_stream": Case(claude_stream, MESSAGES, {**body, "stream": True}),
        "cache_miss": Case(chatted(MINI), CHAT, chat(MINI, repeated)),
        "cache_hit": Case(hit, CHAT, chat(MINI, repeated), after="cache_miss"),
        # a hit needs the same stream flag
        "cache_miss_stream": Case(chatted(MINI, **STREAM), CHAT, streamed(MINI, repeated)),
        "cache_hit_stream": Case(hit_stream, CHAT, streamed(MINI, repeated), after="cache_miss_stream"),
        # nginx replaces the client's id: two calls, two ids
        "spoofed_call_id": Case(chatted(MINI), CHAT, chat(MINI), spoofed),
        "spoofed_call_id_again": Case(chatted(MINI), CHAT, chat(MINI), spoofed),
    }


def _failures() -> dict[str, Case]:
    fallback = chatted(MINI, events=2, model_mismatch=True)
    embedding_fallback = charged("up-emb", "0.00001", 500, 0, events=2, model_mismatch=True)
    return {
        "bad_model": Case(failed(), CHAT, chat("no-such-model")),
        "upstream_500": Case(failed("up-err500"), CHAT, chat("up-err500")),
        "upstream_500_stream": Case(failed("up-err500"), CHAT, streamed("up-err500")),
        "upstream_400": Case(failed("up-badreq"), CHAT, chat("up-badreq")),
        "upstream_429": Case(failed("up-ratelimit"), CHAT, chat("up-ratelimit")),
        "upstream_timeout": Case(failed("up-hang"), CHAT, chat("up-hang")),
        "retry": Case(chatted("up-flaky", events=2), CHAT, chat("up-flaky")),
        # what ran is billed, not what was asked for
        "fallback": Case(fallback, CHAT, chat("up-fb")),
        # the failed and the successful embedding share their id
        "embeddings_fallback": Case(embedding_fallback, EMBEDDINGS, embedding("up-emb-fb")),
    }


def _odd_ends() -> dict[str, Case]:
    slow = Expect(Outcome.CHARGED, None, "up-slow", provenance="stream")
    return {
        # a failure that costs: what was delivered, counted by LiteLLM
        "die_stream": Case(
            charged("up-diestream", "0.0000081", 18, 9, **STREAM), CHAT, streamed("up-diestream", COUNTED)
        ),
        "nousage_stream": Case(
            charged("up-nousage", "0.0000105", 18, 13, **STREAM), CHAT, streamed("up-nousage", COUNTED)
        ),
        "abort_stream": Case(slow, CHAT, streamed("up-slow", COUNTED), hang_up=4),
        # nginx writes 499 and no answer of LiteLLM's, which goes on and charges
        "abort_nonstream": Case(chatted("up-slow"), CHAT, chat("up-slow"), hang_up=1.0),
    }


def _prices() -> dict[str, Case]:
    unpriced = Expect(Outcome.HELD, None, "up-unpriced", 1000, 200)
    # LiteLLM takes the account from the body, where any client may write one
    unattributed = Expect(Outcome.UNATTRIBUTED, Decimal("0.000225"), MINI, 1000, 200)
    return {
        # LiteLLM records 0 for both: only a list of free models tells them apart
        "unpriced": Case(unpriced, CHAT, chat("up-unpriced")),
        "free_declared": Case(chatted("up-free-declared", "0"), CHAT, chat("up-free-declared")),
        "free_by_name": Case(chatted("up-free-by-name"), CHAT, chat("up-free-by-name")),
        "no_account": Case(unattributed, CHAT, chat(MINI, user="chosen-by-the-client"), {"x-litellm-end-user-id": ""}),
    }


def _others() -> dict[str, Case]:
    return {
        "bad_key": Case(NO_CALL, CHAT, chat(MINI), key="sk-wrong"),
        "models": Case(NO_CALL, "/v1/models", None),
        "health": Case(NO_CALL, "/health/liveliness", None, key=None),
        "not_found": Case(NO_CALL, "/nope", None),
    }


# --- sending ------------------------------------------------------------------------------------------------------


def drive(base_url: str, names: Collection[str] | None = None) -> Iterator[Call]:
    """Sends the cases one after the other, or those of `names` with what they come after."""
    every = cases()
    wanted = set(every if names is None else names)
    wanted |= {every[name].after or name for name in wanted}
    nonce = uuid.uuid4().hex[:8]
    answered: dict[str, float] = {}
    for name, case in every.items():
        if name not in wanted:
            continue
        if case.after is not None:  # LiteLLM writes its cache after it has answered
            time.sleep(max(0.0, answered[case.after] + 1 - time.monotonic()))
        run_id = f"run-{name.replace('_', '-')}-{nonce}"
        status = _send(base_url, case, run_id)
        answered[name] = time.monotonic()
        yield Call(name, run_id, status, case.expect)


def _headers(case: Case, run_id: str) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "x-cogni-run-id": run_id,
        "x-litellm-end-user-id": ACCOUNT,
        "x-litellm-spend-logs-metadata": json.dumps({"run_id": run_id, "graph_id": GRAPH}),
        **case.headers,
    }
    if case.body is not None:
        headers["x-model"] = case.body["model"]
    if case.key is not None:
        headers["authorization"] = f"Bearer {case.key}"
    return headers


def _send(base_url: str, case: Case, run_id: str) -> int | None:
    url = urllib.parse.urlsplit(base_url)
    assert url.hostname is not None
    patience = case.hang_up if isinstance(case.hang_up, float) else None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=patience or CLIENT_SECONDS_MAX)
    try:
        content = None if case.body is None else json.dumps(case.body)
        connection.request("GET" if content is None else "POST", case.path, content, _headers(case, run_id))
        try:
            response = connection.getresponse()
        except TimeoutError:
            if patience is None:
                raise
            return None
        if isinstance(case.hang_up, int):
            events = 0
            while events < case.hang_up:
                events += response.readline().startswith(b"data:")
        else:
            response.read()
        return response.status
    finally:
        connection.close()
