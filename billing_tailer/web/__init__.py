"""HTTP: health and metrics. Runs in a thread of its own beside the loop and never touches Postgres or a log file."""

from billing_tailer.web.server import HttpServer

__all__ = ["HttpServer"]
