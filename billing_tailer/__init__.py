"""billing_tailer: follows nginx's audit log of LLM calls and commits every line exactly once to Postgres."""

__version__ = "0.1.0"
