"""Asks a daemon on this machine whether it lives, as Docker's HEALTHCHECK does every minute: by HTTP, never Postgres.

The question goes to the address that the daemon's own settings name; where that is every address, to loopback.
"""

import http.client
import json
from dataclasses import dataclass
from typing import Final

ANSWER_SECONDS_MAX: Final = 3.0
ANSWER_BYTES_MAX: Final = 4096
_EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - is replaced here


@dataclass(frozen=True, slots=True)
class Liveness:
    """What `/livez` said, or why there is no word of it."""

    alive: bool
    url: str
    seconds_since_tick: float | None = None
    reason: str | None = None


def ask(host: str, port: int) -> Liveness:
    """The answer within ANSWER_SECONDS_MAX for each step. host, port: where the daemon was told to listen."""
    host = _EVERY_ADDRESS.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/livez"
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS_MAX)
    try:
        connection.request("GET", "/livez")
        response = connection.getresponse()
        status, body = response.status, response.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        return Liveness(False, url, reason=f"no answer: {error}")
    finally:
        connection.close()
    try:
        answer = json.loads(body)
        age = float(answer["seconds_since_tick"])
    except (ValueError, TypeError, KeyError):
        return Liveness(False, url, reason=f"status {status}, and not the answer of a billing-tailer")
    if status != http.client.OK:
        return Liveness(False, url, age, f"the loop has not turned for {age:.0f} s: see the log of the daemon")
    return Liveness(True, url, age)
