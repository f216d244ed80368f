"""Parameters of a request: what is wrong with one is told by its name, its value and what is allowed."""

import re
from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from billing_tailer.given import BadValue

ID_CHARACTERS_MAX = 1024
VALUE_CHARACTERS_MAX = 120
"""Of a value that is refused, so much is repeated."""


def refused(bad: BadValue) -> Response:
    """400, for people and for programs."""
    shown = bad.value[:VALUE_CHARACTERS_MAX]
    words = {"parameter": bad.name, "value": shown, "remedy": bad.remedy}
    return JSONResponse({"error": f"{bad.name} = {shown!r}: {bad.remedy}", **words}, 400)


def identifier(name: str, value: str) -> str:
    """An id that Postgres takes. Raises BadValue."""
    if not value or len(value) > ID_CHARACTERS_MAX or "\0" in value:
        raise BadValue(name, value, f"must be 1 to {ID_CHARACTERS_MAX} characters, none of them NUL")
    return value


def integer(query: Mapping[str, str], name: str, largest: int, meaning: str) -> int | None:
    """A whole number from 1 on, None where it is not given. Raises BadValue."""
    value = query.get(name)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= largest:
        raise BadValue(name, value, f"must be a whole number from 1 to {largest}: {meaning}")
    return int(value)
