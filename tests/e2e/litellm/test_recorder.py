"""The recorder keeps what comes, and a daemon gets the same."""

import json
from decimal import Decimal
from typing import Any

import httpx

from tests.e2e.litellm.recorder import TOKEN, Recorder


def event(**more: Any) -> dict[str, Any]:
    return {"litellm_call_id": "call-1", "id": "chatcmpl-1", "status": "success", "response_cost": 8.1e-06} | more


def post(recorder: Recorder, *events: dict[str, Any]) -> int:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(trust_env=False) as client:
        return client.post(recorder.url, json=events, headers=headers).status_code


def test_every_post_is_kept_and_passed_on_as_it_came() -> None:
    with Recorder() as daemon, Recorder() as recorder:
        url = daemon.url.rpartition("/v1/")[0]
        assert post(recorder, event(id="before")) == 200
        recorder.pass_on_to(url)
        for number in range(5):
            assert post(recorder, event(id=number)) == 200
        assert recorder.answers(url) == [200] * 5
        assert len(recorder.posts) == 6
        assert daemon.posts == recorder.posts[1:]
        assert daemon.posts[0].headers["authorization"] == f"Bearer {TOKEN}"
        assert json.loads(daemon.posts[4].body) == [event(id=4)]


def test_an_event_that_comes_again_counts_once() -> None:
    with Recorder() as recorder:
        post(recorder, event(), event(status="failure"))
        post(recorder, event(), event(litellm_call_id="call-2"))
        events = list(recorder.events())
    assert [(one["litellm_call_id"], one["status"]) for one in events] == [
        ("call-1", "success"),
        ("call-1", "failure"),
        ("call-2", "success"),
    ]
    assert events[0]["response_cost"] == Decimal("0.0000081")
