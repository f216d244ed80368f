"""A server that plays LiteLLM's spend logs: `/spend/logs/v2` by window and page, `/spend/logs` by call id."""

import json
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


def row(event: dict[str, Any]) -> dict[str, Any]:
    """The spend-log row of a callback event, as LiteLLM writes it (times without Z)."""
    return {
        "request_id": event["id"],
        "litellm_call_id": event["litellm_call_id"],
        "spend": event["response_cost"],
        "status": event["status"],
        "model_group": event["model_group"],
        "model": event["model"],
        "model_id": event["model_id"],
        "custom_llm_provider": event["custom_llm_provider"],
        "prompt_tokens": event["prompt_tokens"],
        "completion_tokens": event["completion_tokens"],
        "cache_hit": "None",
        "end_user": "",
        "metadata": {},
        "startTime": datetime.fromtimestamp(event["startTime"], UTC).replace(tzinfo=None).isoformat(),
        "endTime": datetime.fromtimestamp(event["endTime"], UTC).replace(tzinfo=None).isoformat(),
    }


@contextmanager
def spend_logs(rows: Sequence[dict[str, Any]], port: int = 0, refused: Collection[str] = ()) -> Iterator[str]:
    """The base URL of a server that knows these rows, and those that are put to them later. port: 0 is a free one.
    refused: call ids that it takes for a mistake."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if url.path == "/health/readiness":
                self._answer({"status": "healthy", "litellm_version": "1.106.2"})
                return
            ordered = sorted(rows, key=lambda one: str(one["startTime"]))
            if query.get("request_id") in refused:
                self.send_error(400)
                return
            if url.path == "/spend/logs":
                self._answer([one for one in ordered if one["litellm_call_id"] == query["request_id"]])
                return
            first, last = query["start_date"].replace(" ", "T"), query["end_date"].replace(" ", "T")
            found = [one for one in ordered if first <= one["startTime"] <= last]
            size, page = int(query["page_size"]), int(query.get("page", "1"))
            data = found[(page - 1) * size : page * size]
            pages = -(-len(found) // size)
            answer = {"data": data, "total": len(found), "page": page, "page_size": size}
            self._answer({**answer, "total_pages": pages, "total_is_capped": False})

        def _answer(self, body: object) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
