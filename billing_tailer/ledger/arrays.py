"""Lists as parameters of statements.

psycopg makes the text of an array element by element, each with a dumper that it looks for: of a call with its callback
that was a fifth of all that the daemon did.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import psycopg
from psycopg.types.string import StrDumperUnknown


def register(connection: psycopg.Connection[Any]) -> None:
    """Let this connection's statements take lists as arrays, of the type that stands beside the parameter."""
    connection.adapters.register_dumper(list, _ArrayDumper)


class _ArrayDumper(StrDumperUnknown):
    def dump(self, obj: Any) -> Any:
        return super().dump(array_text(obj))


def array_text(values: Sequence[Any]) -> str:
    """The text of an array: of str, int, bool, Decimal, datetime and None. Raises TypeError for anything else."""
    kinds = set(map(type, values))
    if kinds == {str}:
        return _texts(values)
    if not kinds <= _TEXT.keys():
        raise TypeError(f"an array of {', '.join(sorted(kind.__name__ for kind in kinds - _TEXT.keys()))}")
    return f"{{{','.join([_TEXT[type(value)](value) for value in values])}}}"


def _texts(texts: Sequence[str]) -> str:
    joined = '","'.join(texts)
    if "\\" in joined or joined.count('"') > 2 * len(texts) - 2:  # hardly ever: looking is much faster than replacing
        return f"{{{','.join(map(_quoted, texts))}}}"
    return f'{{"{joined}"}}'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_TEXT: Mapping[type, Callable[[Any], str]] = {
    type(None): lambda _: "NULL",
    str: _quoted,
    int: str,
    bool: str,
    Decimal: str,
    datetime: '"{}"'.format,
}
