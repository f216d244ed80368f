"""The proxy does to a connection what its methods say."""

import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.support.proxy import PostgresProxy


@pytest.fixture
def proxy(admin_dsn: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(admin_dsn) as proxy:
        yield proxy


def connect(proxy: PostgresProxy) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(proxy.dsn, autocommit=True, connect_timeout=2)


def test_forwards(proxy: PostgresProxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        assert one.execute("SELECT repeat('x', 3000000)").fetchone() == ("x" * 3_000_000,)
        assert other.execute("SELECT length(%s)", ["y" * 3_000_000]).fetchone() == (3_000_000,)
        assert proxy.connections == 2
    assert proxy.accepted == 2


def test_cut_breaks_and_refuses_until_forward(proxy: PostgresProxy) -> None:
    for _ in range(3):
        with connect(proxy) as connection:
            proxy.cut()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError, match="refused"):
                connect(proxy)
        proxy.forward()
    with connect(proxy) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_drop_breaks_but_accepts(proxy: PostgresProxy) -> None:
    with connect(proxy) as connection:
        proxy.drop()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with connect(proxy) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_refuse_keeps_what_there_is(proxy: PostgresProxy) -> None:
    with connect(proxy) as connection:
        proxy.refuse()
        assert connection.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="refused"):
            connect(proxy)


def test_stall_holds_requests_until_forward(proxy: PostgresProxy) -> None:
    with connect(proxy) as connection:
        proxy.stall()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            connect(proxy)
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(connection.execute("SELECT 1").fetchone()))
        thread.start()
        thread.join(0.5)
        assert not answers
        proxy.forward()
        thread.join(5)
        assert answers == [(1,)]


def test_mute_lets_requests_happen(proxy: PostgresProxy, empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as direct, PostgresProxy(empty_dsn) as muted:
        direct.execute("CREATE TABLE t (n int)")
        errors: list[Exception] = []

        def insert() -> None:
            try:
                connection.execute("INSERT INTO t VALUES (1)")
            except psycopg.Error as error:
                errors.append(error)

        with connect(muted) as connection:
            muted.mute()
            thread = threading.Thread(target=insert)
            thread.start()
            while direct.execute("SELECT count(*) FROM t").fetchone() == (0,):
                assert thread.is_alive()
            thread.join(0.3)
            assert thread.is_alive()
            muted.drop()
            thread.join(5)
        assert len(errors) == 1
