"""Exports: CSV that no spreadsheet takes for formulas, JSON lines, the verb, and the page's download."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_tailer import exporting
from tests.support.site import DAY, Site, site
from tests.support.verbs import Verb

PERIOD = ("--from", "2026-11-22", "--to", "2026-11-23")


@pytest.fixture
def page(dsn: str, tmp_path: Path) -> Iterator[Site]:
    with site(dsn, tmp_path) as page:
        yield page


def receipt(**changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(exporting.COLUMNS), **changes}


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


# --- cells


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_text_is_no_formula_and_comes_back(text: str) -> None:
    [row] = read(exporting.csv_header() + exporting.csv_rows([receipt(run_id=text)]))
    assert not row["run_id"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert row["run_id"] in (text, f"'{text}")


def test_numbers_are_left_alone() -> None:
    moment = datetime(2026, 11, 22, tzinfo=UTC)
    values = receipt(adjusted_cost_usd=Decimal("-1E-12"), adjusted_credits=-5, cache_hit=True, occurred_at=moment)
    [row] = read(exporting.csv_header() + exporting.csv_rows([values]))
    assert row["adjusted_cost_usd"] == "-0.000000000001"
    assert (row["adjusted_credits"], row["cache_hit"], row["run_id"]) == ("-5", "true", "")
    assert row["occurred_at"] == "2026-11-22T00:00:00+00:00"
    found = json.loads(exporting.json_rows([{**values, "charged_credits": 7, "total_credits": 2}]))
    assert (found["adjusted_cost_usd"], found["adjusted_credits"], found["run_id"]) == ("-0.000000000001", "-5", None)


# --- the verb and the page


def test_page_and_verb_export_the_same(page: Site, verb: Verb, tmp_path: Path) -> None:
    page.bill(*range(30))
    page.bill(30, cost=0.5, end_user="=cmd|'/c calc'!A1", model_group="@dear")
    verb("adjust", "call-00000030", "--credits", "-7", "--reason", "goodwill")
    for form, name in (("csv", "csv"), ("json", "jsonl")):
        answer = page.get(f"/export.{name}?{DAY}")
        assert answer.headers["content-disposition"].startswith('attachment; filename="receipts-20261122T000000-')
        assert answer.headers["cache-control"] == "no-store"
        file = tmp_path / f"out.{name}"
        verb("export", *PERIOD, "--format", form, "--output", str(file))
        assert file.read_bytes() == answer.content
        assert verb("export", *PERIOD, "--format", form).encode() == answer.content
    rows = read(page.get(f"/export.csv?{DAY}").text)
    assert len(rows) == 31
    assert sum(int(row["total_credits"]) for row in rows) == 30 * 2250 + 5_000_000 - 7
    assert (rows[0]["billing_account_id"], rows[0]["model"]) == ("'=cmd|'/c calc'!A1", "'@dear")
    assert [
        json.loads(row)["call_id"] for row in page.get(f"/export.jsonl?{DAY}&account=account-1").text.splitlines()
    ] == [f"call-{number:08d}" for number in reversed(range(30))]
    assert len(verb("export", "--format", "json", "--run", "run-3").splitlines()) == 1
    assert verb("export", "--json", "--account", "nobody") == ""


def test_a_long_export_is_whole(page: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing_tailer.activity.CHUNK_ROWS", 7)
    page.bill(*range(100))
    rows = read(page.get(f"/export.csv?{DAY}").text)
    assert [row["call_id"] for row in rows] == [f"call-{number:08d}" for number in reversed(range(100))]


def test_a_file_is_not_replaced_unless_forced(page: Site, verb: Verb, tmp_path: Path) -> None:
    page.bill(1)
    file = tmp_path / "out.csv"
    file.write_text("mine")
    verb("export", *PERIOD, "--output", str(file), code=2)
    assert "--force" in verb.stderr
    assert file.read_text() == "mine"
    verb("export", *PERIOD, "--output", str(file), "--force")
    assert len(read(file.read_text())) == 1


def test_a_failed_export_leaves_no_file(
    page: Site, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.bill(1)
    (tmp_path / "out").mkdir()

    def fail(_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(exporting, "csv_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        verb("export", *PERIOD, "--output", str(tmp_path / "out" / "x.csv"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "yesterday"), "--from 'yesterday' is no time"),
        (("--to", "0001-01-01T00:00:00+14:00"), "it must be a time from 1970 on"),
        (("--from", "2026-11-23", "--to", "2026-11-22"), "is not before --to"),
    ],
)
def test_wrong_periods(verb: Verb, arguments: tuple[str, ...], words: str) -> None:
    verb("export", *arguments, code=2)
    assert words in verb.stderr
