"""What operators change, told at once: their verbs announce the run within their transaction (NOTIFY), and a thread of
the daemon listens on a connection of its own.

News may be missed while the connection is away: who waits for a run looks again every few seconds all the same
(tests/test_runs.py::test_an_operators_decision_wakes_who_waits).
"""

import os
import select
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from psycopg import sql

from billing_tailer.errors import TailerError
from billing_tailer.ledger.connection import Connection, connect, lock_key, query, wrapped

AGAIN_SECONDS = 1.0


def channel(schema: str) -> str:
    """The name under which changes of a schema are announced: 63 characters at most."""
    return f"billing_tailer_{lock_key('news', schema) & (2**64 - 1):016x}"


def announce(connection: Connection, schema: str, call_id: str) -> None:
    """Tell, with the commit of this transaction, that something about a call's run has changed."""
    connection.execute(query("announce"), {"channel": channel(schema), "call_id": call_id})


@contextmanager
def listening(dsn: str, schema: str, tell: Callable[[Collection[str]], None]) -> Iterator[Callable[[], bool]]:
    """Tell the ids of runs that operators have changed, from a thread; gives whether that is alive. While Postgres is
    away, nothing is told."""
    stop = os.eventfd(0)
    thread = threading.Thread(target=_listen, args=(dsn, schema, tell, stop), name="news", daemon=True)
    thread.start()
    try:
        yield thread.is_alive
    finally:
        os.eventfd_write(stop, 1)
        thread.join(AGAIN_SECONDS)  # longer only while it connects; the descriptor is then left to the process's end
        if not thread.is_alive():
            os.close(stop)


def _listen(dsn: str, schema: str, tell: Callable[[Collection[str]], None], stop: int) -> None:
    is_over = False
    while not is_over:
        try:
            with connect(dsn, schema, application_name="billing_tailer news") as connection, wrapped():
                connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel(schema))))
                while not (is_over := _is_told(connection, stop)):
                    tell({note.payload for note in connection.notifies(timeout=0)})
        except TailerError:
            is_over = bool(select.select([stop], [], [], AGAIN_SECONDS)[0])


def _is_told(connection: Connection, stop: int) -> bool:
    """Wait for news or for the end; True at the end."""
    return stop in select.select([connection.fileno(), stop], [], [])[0]
