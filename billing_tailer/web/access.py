"""Who may ask: the bearer of the token, or, where none is configured, clients on this machine."""

import hmac
import ipaddress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

CHALLENGE = {"WWW-Authenticate": 'Bearer realm="billing_tailer"'}
"""The header of a 401."""


class Access:
    """The rule for everything but health, metrics and callbacks."""

    def __init__(self, token: str | None) -> None:
        """token: API_TOKEN. None lets only clients on this machine in."""
        self._token = None if token is None else token.encode()

    def refusal(self, request: Request) -> Response | None:
        """The answer to a stranger, None to others."""
        if self._token is None:
            if request.client is not None and is_loopback(request.client.host):
                return None
            reason = "no API_TOKEN is configured, so that only clients on this machine may ask: set it, and send it"
            return JSONResponse({"error": f"{reason} as Authorization: Bearer API_TOKEN"}, 403)
        wrong = wrong_bearer(request, self._token, "API_TOKEN")
        return None if wrong is None else JSONResponse({"error": wrong}, 401, headers=CHALLENGE)


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
