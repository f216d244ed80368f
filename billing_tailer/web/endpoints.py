"""What every endpoint of the API does around its own answer: who may ask, and what goes wrong, as JSON."""

import functools
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from billing_tailer.errors import TailerError, TooMuch
from billing_tailer.given import BadValue
from billing_tailer.web.access import Access
from billing_tailer.web.parameters import refused
from billing_tailer.web.waiters import TooManyWaiting

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


def json_endpoint(access: Access, answer: Endpoint, trouble: str) -> Endpoint:
    """trouble: what is said before the reason where the database gives no answer."""

    @functools.wraps(answer)
    async def endpoint(request: Request) -> Response:
        refusal = access.refusal(request)
        if refusal is not None:
            return refusal
        try:
            return await answer(request)
        except BadValue as bad:
            return refused(bad)
        except TooManyWaiting:
            return _unavailable("too many clients wait already", "try again in a second")
        except TooMuch as error:
            return JSONResponse({"error": error.message, "hint": error.hint}, 422)
        except TailerError as error:
            return _unavailable(f"{trouble}: {error.message}", error.hint)

    return endpoint


def _unavailable(reason: str, hint: str) -> Response:
    return JSONResponse({"error": reason, "hint": hint}, 503, headers={"Retry-After": "1"})
