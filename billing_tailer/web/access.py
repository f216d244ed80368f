"""Who may ask: the bearer of the token, or, where none is configured, clients on this machine."""

import hmac
import ipaddress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


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
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._token):
            return None
        reason = "the bearer token is not API_TOKEN" if given else "send Authorization: Bearer API_TOKEN"
        return JSONResponse({"error": reason}, 401, headers={"WWW-Authenticate": 'Bearer realm="billing_tailer"'})


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, also as ::ffff:127.0.0.1."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
