"""The activity page in the test's own process: a tailer turned by hand, and the pages over real Postgres."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from billing_tailer.ledger import Reads
from billing_tailer.settle import Rules
from billing_tailer.web import HttpServer
from billing_tailer.web.pages import THREADS, WAITING_MAX, Deciding, page_routes
from tests.support.follow import Rig, following
from tests.support.loglines import line
from tests.support.spendlines import payload, spool_line

DAY = "from=2026-11-22&to=2026-11-23"
"""The day of the lines that `loglines` makes."""
TOKEN = "a-token-for-the-pages-of-tests"


@dataclass
class Site:
    """What a test has of it."""

    rig: Rig
    volume: Path
    client: httpx.Client
    server: HttpServer
    reads: Reads

    def log(self, *numbers: int, **changes: str) -> None:
        """Audit lines of calls."""
        with (self.volume / "audit.jsonl").open("ab") as log:
            log.write(b"".join(line(number, **changes) for number in numbers))

    def spend(self, *numbers: int, cost: Any = 0.000225, **changes: Any) -> None:
        """LiteLLM's callbacks of calls."""
        with (self.volume / "callbacks-test.jsonl").open("ab") as spool:
            spool.write(b"".join(spool_line(payload(number, cost, **changes)) for number in numbers))

    def bill(self, *numbers: int, cost: float = 0.000225, end_user: str = "account-1", **changes: Any) -> None:
        """Both, settled."""
        self.log(*numbers, end_user=end_user)
        self.spend(*numbers, cost=cost, **changes)
        self.rig.turn()

    def get(self, path: str, status: int = 200, **headers: str | bytes) -> httpx.Response:
        """An answer with that status."""
        given = {
            name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in headers.items()
        }
        answer = self.client.get(path, headers=given)
        assert answer.status_code == status, f"{answer.status_code} {answer.text[:2000]}"
        return answer

    def activity(self, parameters: str = DAY) -> dict[str, Any]:
        """`GET /v1/activity`."""
        found: dict[str, Any] = self.get(f"/v1/activity?{parameters}").json()
        return found


@contextmanager
def site(dsn: str, volume: Path, token: str | None = None, **changes: Any) -> Iterator[Site]:
    """The pages over a tailer that has read `volume`. changes: as of `following`."""
    reads = Reads("billing", "default", threads=THREADS, waiting_max=WAITING_MAX)
    how = Deciding(changes.get("rules", Rules()), 10, 900)
    with following(dsn, volume, **changes) as rig, reads.of(dsn):
        routes = page_routes(token, reads, "billing", "default", how, rig.health, rig.events)
        server = HttpServer("127.0.0.1", 0, rig.events, rig.health, routes)
        server.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=30) as client:
                yield Site(rig, volume, client, server, reads)
        finally:
            server.stop()
