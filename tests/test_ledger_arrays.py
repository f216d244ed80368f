"""Lists as parameters: Postgres has the same values, whatever they are made of."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing_tailer.errors import RowRejected
from billing_tailer.ledger.connection import Connection, connect, wrapped

AT = datetime(2026, 11, 23, 4, 46, 58, 123456, tzinfo=UTC)


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with connect(dsn, "billing") as own:
        yield own


def sent(connection: Connection, kind: str, values: Sequence[Any]) -> Any:
    """What Postgres makes of the list."""
    return connection.execute(f"select %s::{kind}[]".encode(), [list(values)]).fetchone()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("text", []),
        ("text", ["a", "b"]),
        ("text", ['"']),
        ("text", ["\\"]),
        ("text", ['a"b', "c\\d", "{e,f}", "", "NULL", " g ", "ü"]),
        ("text", ['","']),
        ("text", ['\\"', '"\\']),
        ("text", [None, 'a"b\\', "", "NULL", "null", "{e,f}", " g ", "ü", None]),
        ("text", [None, None]),
        ("bigint", [0, -(2**63), 2**63 - 1, None]),
        ("boolean", [True, None, False]),
        ("numeric", [Decimal("1E-12"), Decimal("0.000225"), Decimal("-0"), Decimal("1E+30"), None]),
        ("timestamptz", [AT, None, AT.astimezone(timezone(timedelta(hours=-3, minutes=-30)))]),
    ],
    ids=repr,
)
def test_a_list_is_the_values(connection: Connection, kind: str, values: list[Any]) -> None:
    assert sent(connection, kind, values) == (values,)


# one session for all examples: they only ask, and leave nothing behind
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_any_texts_are_the_texts(connection: Connection, values: list[str | None]) -> None:
    assert sent(connection, "text", values) == (values,)
    texts = [value for value in values if value is not None]
    assert sent(connection, "text", texts) == (texts,)


@pytest.mark.parametrize("values", [["a\0b"], ["a\0b", None]], ids=repr)
def test_nothing_is_cut_at_a_nul(connection: Connection, values: list[str | None]) -> None:
    with pytest.raises(RowRejected, match="NUL"), wrapped():
        sent(connection, "text", values)


@pytest.mark.parametrize("value", [b"bytes", 0.1, ["nested"], ("a", "b")], ids=repr)
def test_other_values_are_refused(connection: Connection, value: object) -> None:
    """Their text in Python is not their text in Postgres. psycopg's own dumper, which is slow, takes them."""
    with pytest.raises(TypeError, match=f"an array of {type(value).__name__}"):
        sent(connection, "text", ["a", value])
