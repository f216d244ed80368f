"""`GET /v1/activity` as JSON: the numbers of the page, money and credits as decimal strings."""

from dataclasses import asdict
from typing import Any

from billing_tailer.activity import Progress, Summary, Totals
from billing_tailer.ledger import Charged
from billing_tailer.printing import plain


def summary_json(summary: Summary, progress: Progress, top: int) -> dict[str, Any]:
    """top: so many of the most expensive models and accounts are listed."""
    previous = summary.range.previous
    found: dict[str, Any] = plain(
        {
            "from": summary.range.start,
            "to": summary.range.end,
            "account": summary.chosen.account,
            "model": summary.chosen.model,
            "totals": _totals(summary.totals),
            "previous": None
            if summary.previous is None
            else {"from": previous.start, "to": previous.end, **_totals(summary.previous)},
            "bucket_seconds": int(summary.range.bucket.total_seconds()),
            "series": [{"start": bar.start, "model": bar.model, **_charged(bar.charged)} for bar in summary.bars],
            "models": [{"model": name, **_charged(charged)} for name, charged in summary.models[:top]],
            "models_count": len(summary.models),
            "accounts": None
            if summary.accounts is None
            else [{"account": name, **_charged(charged)} for name, charged in summary.accounts[:top]],
            "accounts_count": None if summary.accounts is None else len(summary.accounts),
            "as_of": asdict(progress),
        }
    )
    return found


def _totals(totals: Totals) -> dict[str, Any]:
    counts = totals.counts
    names = ("settled", "not_charged", "pending", "held", "unattributed", "overdue", "unapplied", "closed")
    return {
        "calls": totals.calls,
        **{name: None if counts is None else counts[name] for name in names},
        "capture_rate": totals.capture_rate,
        **{f"charged_{name}" if name == "calls" else name: value for name, value in _charged(totals.charged).items()},
    }


def _charged(charged: Charged) -> dict[str, Any]:
    return {
        "calls": charged.calls,
        "tokens_in": charged.tokens_in,
        "tokens_out": charged.tokens_out,
        "cached_tokens": charged.cached_tokens,
        "provider_cost_usd": charged.cost_usd,
        "charged_credits": str(charged.credits),
    }
