"""A fact's row: what Postgres reads from it is the fact."""

from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from billing_tailer.ledger import writer
from billing_tailer.ledger.connection import Connection, connect
from billing_tailer.model import PlacedFact, UsageFact
from billing_tailer.rows import COLUMNS, placed, row_of, values_of

# no NUL and no lone surrogates: `audit` lets none through (tests/test_audit.py::assert_storable)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
odd = st.sampled_from(["\\", "\\N", "\\.", "\\t", "\t", "\n", "\r\n", "\b\f\v", "\\\\", "a\\\tb\\", "null", "''", '"'])
words = texts | odd
facts = st.builds(
    UsageFact,
    call_id=words,
    nginx_request_id=st.none() | words,
    proxy_call_id=st.none() | words,
    id_echoed=st.booleans(),
    run_id=st.none() | words,
    attempt=st.none() | st.integers(0, 999_999_999),
    graph_id=st.none() | words,
    billing_account_id=st.none() | words,
    method=st.none() | words,
    path=st.none() | words,
    status=st.integers(0, 999),
    request_completed=st.booleans(),
    provenance=st.sampled_from(["stream", "response"]),
    requested_model=st.none() | words,
    header_cost_usd=st.none() | st.decimals(0, 10**19, allow_nan=False) | st.just(Decimal("2.25E-7")),
    header_model_group=st.none() | words,
    cache_key=st.none() | words,
    request_seconds=st.none() | st.decimals(0, 10**6, places=3),
    occurred_at=st.datetimes(datetime(2001, 9, 9), datetime(2286, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001  # hypothesis wants bounds without a zone
    line_sha256=st.none() | st.binary(min_size=32, max_size=32),
)


@given(facts)
def test_values_of_a_row(fact: UsageFact) -> None:
    values = dict(zip(COLUMNS, values_of(row_of(fact).text), strict=True))
    assert {name: value is None for name, value in values.items()} == {
        name: value is None for name, value in fact._asdict().items()
    }
    assert all(values[name] == value for name, value in fact._asdict().items() if type(value) is str)


# one database for all examples: each rolls back what it wrote
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(facts, min_size=1, max_size=8, unique_by=lambda fact: fact.call_id))
def test_postgres_reads_the_same_facts(dsn: str, many: list[UsageFact]) -> None:
    """By COPY, as large batches go, and by INSERT, as small ones do."""
    places = [placed(row_of(fact), 7, 10 * number, 10 * number + 9) for number, fact in enumerate(many)]
    with connect(dsn, "billing", application_name="test") as session:
        for write in (_by_copy, _by_insert):
            with session.transaction(force_rollback=True), session.cursor(row_factory=dict_row) as cursor:
                write(session, places)
                found = cursor.execute("select * from usage_facts order by start_offset").fetchall()
                assert [UsageFact(**{name: row[name] for name in UsageFact._fields}) for row in found] == many
                assert [(row["file_id"], row["start_offset"], row["end_offset"]) for row in found] == [
                    (fact.file_id, fact.start_offset, fact.end_offset) for fact in places
                ]


def _by_copy(session: Connection, places: list[PlacedFact]) -> None:
    writer.copy_text(session, writer._COPY_FACTS, [fact.text for fact in places])


def _by_insert(session: Connection, places: list[PlacedFact]) -> None:
    writer._texts(session).executemany(writer._INSERT_FACT, [values_of(fact.text) for fact in places])
