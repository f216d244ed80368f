"""Who may ask: the bearer of the token or of a session made with it; without a token, clients on this machine.

Without a token, a browser on this machine must not be used by a page from elsewhere whose name resolves to 127.0.0.1
when it is asked again: the Host header has to name this machine too (tests/test_pages.py::test_dns_rebinding).
"""

import hmac
import ipaddress
import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from billing_tailer.web.sessions import Sessions

CHALLENGE = {"WWW-Authenticate": 'Bearer realm="billing_tailer"'}
"""The header of a 401."""


class Access:
    """The rule for everything but health, metrics and callbacks."""

    def __init__(self, token: str | None, sessions: Sessions | None = None) -> None:
        """token: API_TOKEN. None lets only clients on this machine in. sessions: whose cookies stand for the token."""
        self._token = None if token is None else token.encode()
        self._sessions = sessions

    def refusal(self, request: Request) -> Response | None:
        """The answer to a stranger, None to others."""
        if self._token is None:
            reason = _not_from_here(request)
            return None if reason is None else JSONResponse({"error": reason}, 403)
        if self._sessions is not None and self._sessions.holds(request):
            return None
        wrong = wrong_bearer(request, self._token, "API_TOKEN")
        return None if wrong is None else JSONResponse({"error": wrong}, 401, headers=CHALLENGE)


def _not_from_here(request: Request) -> str | None:
    if request.client is None or not is_loopback(request.client.host):
        reason = "no API_TOKEN is configured, so that only clients on this machine may ask: set it, and send it"
        return f"{reason} as Authorization: Bearer API_TOKEN"
    host = request.headers.get("host", "").lower()
    name = re.sub(r":[0-9]*$", "", host).removeprefix("[").removesuffix("]")
    if name != "localhost" and not is_loopback(name):
        return (
            "no API_TOKEN is configured, so that only the names localhost and 127.0.0.1 are answered: use one of them"
        )
    return None


def wrong_bearer(request: Request, token: bytes, name: str) -> str | None:
    """What is wrong with a request's bearer token, by the variable that sets the right one; None where it is right."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        return f"send Authorization: Bearer {name}"
    if hmac.compare_digest(given.strip().encode("latin-1"), token):
        return None
    return f"the bearer token is not {name}"


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, also as ::ffff:127.0.0.1."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
