"""Parameters of a request: what is wrong with one is told by its name, its value and what is allowed."""

import re
from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

ID_CHARACTERS_MAX = 1024


class BadParameter(Exception):
    """A parameter that cannot be used."""

    def __init__(self, name: str, value: str, remedy: str) -> None:
        self.name, self.value, self.remedy = name, value[:120], remedy

    def response(self) -> Response:
        """400, for people and for programs."""
        words = {"parameter": self.name, "value": self.value, "remedy": self.remedy}
        return JSONResponse({"error": f"{self.name} = {self.value!r}: {self.remedy}", **words}, 400)


def identifier(name: str, value: str) -> str:
    """An id that Postgres takes. Raises BadParameter."""
    if not value or len(value) > ID_CHARACTERS_MAX or "\0" in value:
        raise BadParameter(name, value, f"must be 1 to {ID_CHARACTERS_MAX} characters, none of them NUL")
    return value


def integer(query: Mapping[str, str], name: str, largest: int, meaning: str) -> int | None:
    """A whole number from 1 on, None where it is not given. Raises BadParameter."""
    value = query.get(name)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= largest:
        raise BadParameter(name, value, f"must be a whole number from 1 to {largest}: {meaning}")
    return int(value)
