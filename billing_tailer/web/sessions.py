"""Sessions of people: a cookie that stands for API_TOKEN for some hours and does not contain it.

Its value is `<expiry>.<nonce>.<HMAC of both>`, by a key that follows from the token: nothing is kept here, a restart
ends no session, and another token ends all of them. Logging out removes the cookie from the browser; a copy of it that
somebody took before is good until it expires (tests/test_pages.py::test_sessions).
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict

from starlette.requests import Request
from starlette.responses import Response

COOKIE = "billing_tailer_session"
SESSION_SECONDS = 12 * 3600
FAILURES_MAX = 5
FAILURE_SECONDS = 60.0
"""After FAILURES_MAX wrong tokens an address waits until the first of them is so old."""
ADDRESSES_MAX = 1000


class Sessions:
    """Makes session cookies and knows them again."""

    def __init__(self, token: str) -> None:
        """token: API_TOKEN."""
        self._token = token.encode()
        self._key = hmac.digest(self._token, b"billing_tailer/session/1", hashlib.sha256)

    def is_token(self, given: str) -> bool:
        """Compared in constant time."""
        return hmac.compare_digest(given.encode(), self._token)

    def begin(self, request: Request, response: Response) -> None:
        """Let the answer to a login set the cookie."""
        expiry = str(int(time.time()) + SESSION_SECONDS)
        nonce = secrets.token_urlsafe(12)
        response.set_cookie(
            COOKIE,
            f"{expiry}.{nonce}.{self._signature(expiry, nonce)}",
            max_age=SESSION_SECONDS,
            path="/",
            secure=_is_https(request),
            httponly=True,
            samesite="strict",
        )

    def end(self, request: Request, response: Response) -> None:
        """Let the answer remove the cookie."""
        response.delete_cookie(COOKIE, path="/", secure=_is_https(request), httponly=True, samesite="strict")

    def holds(self, request: Request) -> bool:
        """Whether a request carries a cookie of ours that has not expired."""
        expiry, _, rest = request.cookies.get(COOKIE, "").partition(".")
        nonce, _, signature = rest.partition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(expiry, nonce).encode()):
            return False
        return int(expiry) > time.time()  # it is ours: a number

    def _signature(self, expiry: str, nonce: str) -> str:
        return hmac.new(self._key, f"{expiry}.{nonce}".encode(), hashlib.sha256).hexdigest()


class Failures:
    """Wrong tokens by address, the newest ADDRESSES_MAX of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: OrderedDict[str, list[float]] = OrderedDict()

    def wait_seconds(self, address: str) -> float:
        """How long an address has to wait before it may try again."""
        with self._lock:
            times = self._recent(address)
            return 0.0 if len(times) < FAILURES_MAX else times[0] + FAILURE_SECONDS - time.monotonic()

    def add(self, address: str) -> None:
        """A wrong token came from there."""
        with self._lock:
            self._times[address] = [*self._recent(address), time.monotonic()]
            self._times.move_to_end(address)
            while len(self._times) > ADDRESSES_MAX:
                self._times.popitem(last=False)

    def _recent(self, address: str) -> list[float]:
        since = time.monotonic() - FAILURE_SECONDS
        return [moment for moment in self._times.get(address, []) if moment > since]


def _is_https(request: Request) -> bool:
    """Whether the browser's own way is https: it says so in the origin of a form, whichever proxy ends TLS."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")


def is_from_elsewhere(request: Request) -> bool:
    """Whether a form was sent by a page of another origin. Browsers say so themselves where they talk https; else they
    name the origin of every POST, which must be the Host. Where there is neither, the sender is no browser."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    if origin is None:
        return False
    return origin.partition("://")[2].lower() != request.headers.get("host", "").lower()
