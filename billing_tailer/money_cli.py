"""The verbs about calls and money: explain, receipts, exceptions, adjust, reconcile, prune.

What a person decides is written as rows that name the person and the reason; receipts are never updated. With
`--dry-run` a write says what it would do, as decided at this moment. Exit code 1 where the call is unknown or cannot be
decided so, 2 for wrong usage.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from decimal import Decimal
from typing import Annotated, Any

import typer

from billing_tailer import configured, pricing, reconcile, settle
from billing_tailer import explain as explaining
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.explain import RawLine
from billing_tailer.files import LogFiles
from billing_tailer.ledger import Operator, Told, operator, prune, reports
from billing_tailer.litellm import SpendLogs
from billing_tailer.model import Adjustment, ExceptionKind, Release
from billing_tailer.options import AsJson, By, DryRun, Limit, Reason, person_named, said, time_given
from billing_tailer.printing import plain, print_json, print_line, print_pairs, print_rows, print_title, text
from billing_tailer.settings import Settings, load
from billing_tailer.settle import CallState, Decision, Standing

verbs = typer.Typer()
exceptions = typer.Typer(no_args_is_help=True, help="Calls that need a look, and deciding them.")
verbs.add_typer(exceptions, name="exceptions")

CallId = Annotated[str, typer.Argument(metavar="CALL_ID")]

_LOOK = (
    "the id is the line's litellm_call_id, else its call_id, else its nginx_request_id; `billing-tailer status` shows "
    "the lag, `billing-tailer dead-letters list` the lines that were not understood"
)


# --- explain


@verbs.command()
def explain(call_id: CallId, as_json: AsJson = False) -> None:
    """One call from the line to the money: line, fact, spend records, pricing, receipt, exceptions."""
    settings = load()
    with configured.database_for_verbs(settings) as dsn:
        with _operator(settings, dsn) as ledger:
            told = ledger.told(call_id)
        if told is None:
            raise TailerError(f"nothing is known of call {text(call_id)}", _LOOK)
        answer = explaining.explained(call_id, told, _raw_line(settings, dsn, told), configured.rules(settings))
    if as_json:
        print_json(answer)
    else:
        _print_explained(answer)


def _raw_line(settings: Settings, dsn: str, told: Told) -> RawLine | None:
    if told.fact is None:
        return None
    with reports(dsn, settings.db_schema, settings.source_id) as ledger:
        positions = ledger.positions()
    files = LogFiles(settings.audit_globs, settings.open_files_max)
    try:
        return explaining.raw_line(told.fact, positions, files, settings.line_bytes_max)
    finally:
        files.close()


def _print_explained(answer: dict[str, Any]) -> None:
    print_pairs({"call": answer["call_id"], "standing": answer["standing"], "total credits": answer["total_credits"]})
    line = answer["line"]
    if line is None:
        print_title("LINE")
        print_line("no audit line: such a call is never charged")
    else:
        print_title("LINE")
        place = f"{line['path']} (file_id {line['file_id']}), bytes {line['start_offset']} to {line['end_offset']}"
        print_pairs({"at": place, "text": line["raw"] if line["raw"] is not None else f"({line['raw_unavailable']})"})
    for title in ("fact", "receipt", "details"):
        if answer[title] is not None:
            print_title(f"{title.upper()}")
            print_pairs({name: value for name, value in answer[title].items() if value is not None})
    _print_records(answer)
    _print_section(
        "ADJUSTMENTS", answer["adjustments"], ["created_at", "delta_credits", "delta_cost_usd", "reason", "created_by"]
    )
    columns = ["kind", "seq", "opened_at", "closed_at", "closed_by", "reason", "detail"]
    _print_section("EXCEPTIONS", answer["exceptions"], columns)
    columns = ["file_path", "start_offset", "end_offset", "billing_account_id", "run_id", "status", "occurred_at"]
    _print_section("CONFLICTING LINES", answer["conflicts"], columns)


def _print_records(answer: dict[str, Any]) -> None:
    rows = [
        {**row, "cost_usd": row["cost_usd"] if row["cost_usd"] is not None else row["cost_text"]}
        for row in answer["spend_records"]
    ]
    columns = [
        "source",
        "status",
        "model_group",
        "model",
        "prompt_tokens",
        "completion_tokens",
        "cost_usd",
        "cache_hit",
    ]
    _print_section("SPEND RECORDS", rows, [*columns, "error_code", "started_at", "received_at", "record_id"])
    steps = answer["pricing"]
    if steps is None:
        return
    print_title("PRICING")
    for one in steps["sums"]:
        billed = f"  <- billed: {steps['why']}" if one["source"] == steps["billed_source"] else ""
        costs = " + ".join(text(cost) for cost in one["costs_usd"])
        print_line(f"{one['source']}: {costs} = {one['sum_usd']} USD{billed}")
    if steps["unpriceable"] is not None:
        print_line(f"no price: {text(steps['unpriceable'])}")
        return
    print_line(f"x markup {steps['markup_factor']} = {steps['user_cost_usd']} USD")
    print_line(f"ceil(x 10^7) = {steps['charged_credits']} credits")
    if steps["by_hand"]:
        print_line("a person has named the amount: receipt and adjustments say what is charged")


def _print_section(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    if rows:
        print_title(f"{title}")
        print_rows(rows, columns, False)


# --- receipts and exceptions


@verbs.command()
def receipts(
    run: Annotated[str | None, typer.Option(help="Of this run.")] = None,
    account: Annotated[str | None, typer.Option(help="Of this account.")] = None,
    since: Annotated[str | None, typer.Option(metavar="ISO", help="Made at or after this time (UTC).")] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """Receipts with what was adjusted, the newest first."""
    settings = load()
    moment = time_given("--since", since)
    with _connected(settings) as ledger:
        rows = ledger.receipts(run_id=run, account=account, since=moment, limit=limit)
    columns = ["created_at", "call_id", "billing_account_id", "run_id", "model", "tokens_in", "tokens_out"]
    columns += ["provider_cost_usd", "charged_credits", "adjusted_credits", "provenance", "spend_source"]
    print_rows([plain(row) for row in rows], columns, as_json)


@exceptions.command("list")
def exceptions_list(
    kind: Annotated[ExceptionKind | None, typer.Option(help="Only of this kind.")] = None,
    include_closed: Annotated[bool, typer.Option("--all", help="Also those that are closed.")] = False,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """The newest first."""
    with _connected(load()) as ledger:
        rows = ledger.exceptions(kind=None if kind is None else str(kind), include_closed=include_closed, limit=limit)
    columns = ["opened_at", "call_id", "kind", "run_id", "billing_account_id", "closed_by", "reason", "detail"]
    print_rows([plain(row) for row in rows], columns, as_json)


@exceptions.command("release")
def exceptions_release(
    call_id: CallId,
    reason: Reason,
    cost_usd: Annotated[
        str | None, typer.Option(help="Provider cost of the whole call in USD, before markup; 0 must be given.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="Whom to charge, where the line names nobody.")] = None,
    by: By = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Charge a call that is held, unattributed, overdue or not charged, as you say."""
    settings = load()
    rules = configured.rules(settings)
    cost = None if cost_usd is None else _cost("--cost-usd", cost_usd, rules.markup)
    release = Release(
        said("--reason", reason), person_named(by), cost, None if account is None else said("--account", account)
    )
    with _connected(settings) as ledger, ledger.deciding():
        call = _call(ledger, call_id)
        decision = _released(call, release, rules)
        if not dry_run:
            ledger.write(call_id, decision)
    _print_change(call_id, decision, dry_run, as_json)


def _released(call: CallState, release: Release, rules: settle.Rules) -> Decision:
    """What a release does; TailerError where it does nothing, with what is missing."""
    call_id = call.fact.call_id
    before = settle.decide(call, rules)
    is_open = any(row.is_open for row in call.exceptions)
    if call.receipt is not None and not is_open:
        raise TailerError(
            f"call {text(call_id)} has a receipt and nothing is open about it: it was settled meanwhile, or before",
            f"look again: `billing-tailer explain {text(call_id)}`; a settled call is corrected with `adjust`",
        )
    if before.standing is Standing.PENDING and not any(row.kind in _HOLDING for row in call.exceptions):
        raise TailerError(
            f"call {text(call_id)} is pending: its spend record may still come", "release it when it is overdue or held"
        )
    decision = settle.decide(replace(call, release=release), rules)
    if call.receipt is None:
        done = decision.receipt is not None
    else:
        theirs = [row for row in decision.closed if row.closed_by == release.released_by]
        done = bool(theirs) or decision.adjustment is not None
    if done:
        return decision
    raise TailerError(
        f"call {text(call_id)} stays {before.standing}: the release does not say enough", _missing(call, before)
    )


def _missing(call: CallState, before: Decision) -> str:
    if call.receipt is not None:
        return "name the cost of the whole call with --cost-usd, for the account of its receipt"
    if before.standing is Standing.UNATTRIBUTED:
        return "name whom to charge with --account"
    account = "" if call.fact.billing_account_id is not None else " and whom to charge with --account"
    return f"name the cost of the whole call with --cost-usd (0 if it is free){account}"


@exceptions.command("close")
def exceptions_close(
    call_id: CallId,
    kind: ExceptionKind,
    reason: Reason,
    by: By = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Close an exception as it is. A call without a receipt is not charged then, unless a later record settles it."""
    settings = load()
    who, why = person_named(by), said("--reason", reason)
    with _connected(settings) as ledger, ledger.deciding():
        call = _call(ledger, call_id)
        row = next((one for one in call.exceptions if one.kind is kind and one.is_open), None)
        if row is None:
            raise TailerError(
                f"call {text(call_id)} has no open exception {kind}", f"see `billing-tailer explain {text(call_id)}`"
            )
        decision = Decision(Standing.PENDING, closed=(replace(row, closed_by=who, reason=why),))
        given_up = call.receipt is None and not any(
            one.is_open and one is not row and one.kind in _HOLDING for one in call.exceptions
        )
        given_up = given_up and kind in _HOLDING
        if not dry_run:
            ledger.close(decision.closed[0])
            if given_up:
                ledger.give_up(call_id)
    _print_change(call_id, decision, dry_run, as_json)


_HOLDING = (
    ExceptionKind.HELD_ZERO_COST,
    ExceptionKind.HELD_BAD_COST,
    ExceptionKind.UNATTRIBUTED,
    ExceptionKind.OVERDUE,
    ExceptionKind.CONFLICT,
    ExceptionKind.NOT_CHARGED,
)
"""What keeps a call from having a receipt."""


# --- adjust


@verbs.command()
def adjust(
    call_id: CallId,
    reason: Reason,
    credits_: Annotated[
        int | None, typer.Option("--credits", help="Credits to add; negative to give back. The cost stays as it is.")
    ] = None,
    cost_usd: Annotated[
        str | None,
        typer.Option(help="Provider cost in USD to add; negative to take off. Credits follow by the markup."),
    ] = None,
    by: By = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Correct a settled call by a new row. The same correction with the same reason is made once."""
    settings = load()
    who, why = person_named(by), said("--reason", reason)
    if (credits_ is None) == (cost_usd is None):
        raise ConfigError("give either --credits or --cost-usd", "say what to add to what is charged")
    delta_usd = Decimal(0) if cost_usd is None else _amount("--cost-usd", cost_usd)
    if not credits_ and not delta_usd:
        raise ConfigError("an adjustment of 0 changes nothing", "say what to add to what is charged")
    with _connected(settings) as ledger, ledger.deciding():
        call = _call(ledger, call_id)
        adjustment = _adjustment(call, credits_, delta_usd, why, who)
        if any(one.evidence_hash == adjustment.evidence_hash for one in call.adjustments):
            decision = Decision(Standing.SETTLED)
        else:
            decision = _with_closed(call, adjustment, configured.rules(settings))
        if not dry_run:
            ledger.write(call_id, decision)
    _print_change(call_id, decision, dry_run, as_json)


def _adjustment(call: CallState, delta_credits: int | None, delta_usd: Decimal, why: str, person: str) -> Adjustment:
    """Credits follow from the cost by the receipt's markup; what was given in credits before stays given."""
    receipt, call_id = call.receipt, call.fact.call_id
    if receipt is None:
        raise TailerError(
            f"call {text(call_id)} has no receipt yet", "see `explain`; `exceptions release` charges a held call"
        )
    cost = pricing.total([receipt.provider_cost_usd, *(one.delta_cost_usd for one in call.adjustments)])
    charged = receipt.charged_credits + sum(one.delta_credits for one in call.adjustments)
    if delta_credits is None:
        now = pricing.price([cost], receipt.markup_factor)
        then = pricing.price([pricing.total([cost, delta_usd])], receipt.markup_factor)
        if isinstance(now, pricing.Unpriceable) or isinstance(then, pricing.Unpriceable):
            raise TailerError(
                f"call {text(call_id)} costs {cost:f} USD: {delta_usd:f} more is no amount",
                "its cost cannot be below 0",
            )
        delta_credits = then.charged_credits - now.charged_credits
    if not 0 <= charged + delta_credits <= pricing.CREDITS_MAX:
        raise TailerError(
            f"call {text(call_id)} is charged {charged} credits: {delta_credits} more is no amount",
            "give back what is charged at most",
        )
    return settle.adjust(call, delta_credits, delta_usd, why, person)


def _with_closed(call: CallState, adjustment: Adjustment, rules: settle.Rules) -> Decision:
    """The adjustment, and the exceptions that it answers."""
    after = settle.decide(replace(call, adjustments=(*call.adjustments, adjustment)), rules)
    closed = tuple(replace(row, closed_by=adjustment.created_by, reason=adjustment.reason) for row in after.closed)
    return Decision(Standing.SETTLED, adjustment=adjustment, closed=closed)


# --- reconcile


@verbs.command("reconcile")
def reconcile_(
    from_: Annotated[str | None, typer.Option("--from", metavar="ISO", help="Begin (UTC); default: a day.")] = None,
    to: Annotated[
        str | None, typer.Option(metavar="ISO", help="End (UTC); default: the last settled midnight.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, max=100_000, help="At most so many calls in each list.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Per closed day: billable, settled and missing calls, capture rate, differences from LiteLLM's own rows."""
    settings = load()
    start, end = time_given("--from", from_), time_given("--to", to)
    with _connected(settings) as ledger, _spend_logs(settings) as logs:
        days = reconcile.spans(start, end, ledger.now(), settings.settle_deadline_seconds)
        windows = [_reconciled(ledger, logs, span, settings.cost_max_usd, limit) for span in days]
    if as_json:
        print_json({"windows": windows, "total": reconcile.sums(windows)})
    else:
        _print_windows(windows)
    failed = any(window["litellm"] is not None and window["litellm"]["failure"] for window in windows)
    raise typer.Exit(1 if failed else 0)


def _reconciled(
    ledger: Operator, logs: SpendLogs | None, span: reconcile.Span, cost_max: Decimal, limit: int
) -> dict[str, Any]:
    window = reconcile.window(ledger, span)
    if logs is not None:
        try:
            window["litellm"] = reconcile.compare(ledger, logs, span, cost_max, limit)
        except TailerError as error:
            window["litellm"] = {"failure": str(error)}
    return window


def _print_windows(windows: list[dict[str, Any]]) -> None:
    total = {"from": "total", "to": "", **reconcile.sums(windows)}
    columns = ["from", "to", "billable", "settled", "not_charged", "pending", "held", "unattributed", "overdue"]
    columns += ["unapplied", "closed", "capture_rate", "provider_cost_usd", "charged_credits"]
    print_rows([*windows, total], columns, False)
    for window in windows:
        found = window["litellm"]
        if found is None:
            continue
        print_title(f"LiteLLM's own rows, {window['from']} to {window['to']}")
        if found["failure"]:
            print_line(text(found["failure"].replace("\n", " ")))
            continue
        print_pairs({name: found[name] for name in ("rows", "rows_not_understood", "audited_usd")})
        for name in ("missing_here", "unaudited", "missing_there", "amount_differs"):
            print_line(f"{name}: {found[name]['count']} calls, {found[name]['cost_usd']} USD")
            for call in found[name]["calls"]:
                print_line(f"  {text(call)}")
    if all(window["litellm"] is None for window in windows):
        print_line("LiteLLM's own rows were not asked for: LITELLM_URL is not set")


@contextmanager
def _spend_logs(settings: Settings) -> Iterator[SpendLogs | None]:
    if settings.litellm_url is None or settings.litellm_api_key is None:
        yield None
        return
    with SpendLogs(settings.litellm_url, settings.litellm_api_key.get_secret_value(), stop=threading.Event()) as logs:
        yield logs


# --- prune


@verbs.command("prune")
def prune_(reason: Reason, by: By = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove spend records of calls without an audit line, 30 days after they came. Needs the owner's DSN."""
    settings = load()
    person, why = person_named(by), said("--reason", reason)
    with _owner_dsn(settings) as (name, dsn):
        pruned = prune(dsn, settings.db_schema, dsn_name=name, reason=why, person=person, dry_run=dry_run)
    answer = plain({"applied": not dry_run, **asdict(pruned)})
    print_pairs(answer, as_json)


@contextmanager
def _owner_dsn(settings: Settings) -> Iterator[tuple[str, str]]:
    """MIGRATE_DATABASE_URL, else what the daemon uses: its name and the DSN."""
    if settings.migrate_database_url is not None:
        yield "BILLING_TAILER_MIGRATE_DATABASE_URL", settings.migrate_database_url.get_secret_value()
        return
    with configured.database_for_verbs(settings) as dsn:
        yield "BILLING_TAILER_DATABASE_URL", dsn


# --- small things


@contextmanager
def _connected(settings: Settings) -> Iterator[Operator]:
    with configured.database_for_verbs(settings) as dsn, _operator(settings, dsn) as ledger:
        yield ledger


@contextmanager
def _operator(settings: Settings, dsn: str) -> Iterator[Operator]:
    with operator(
        dsn,
        settings.db_schema,
        quiet_seconds=settings.failure_quiet_seconds,
        deadline_seconds=settings.settle_deadline_seconds,
    ) as ledger:
        yield ledger


def _call(ledger: Operator, call_id: str) -> CallState:
    call = ledger.load(call_id)
    if call is None:
        raise TailerError(f"there is no audit line of call {text(call_id)}: such a call is never charged", _LOOK)
    return call


def _print_change(call_id: str, decision: Decision, dry_run: bool, as_json: bool) -> None:
    answer = plain(
        {
            "call_id": call_id,
            "applied": not dry_run and not decision.is_empty,
            "receipt": None if decision.receipt is None else asdict(decision.receipt),
            "adjustment": None if decision.adjustment is None else asdict(decision.adjustment),
            "opened": [asdict(row) for row in decision.opened],
            "closed": [asdict(row) for row in decision.closed],
        }
    )
    if as_json:
        print_json(answer)
        return
    if decision.is_empty:
        print_line(f"call {text(call_id)}: nothing to do, this was done before")
        return
    print_line(f"call {text(call_id)}: {'would be written' if dry_run else 'written'}")
    for title in ("receipt", "adjustment"):
        if answer[title] is not None:
            print_title(f"{title.upper()}")
            print_pairs(answer[title])
    for title in ("opened", "closed"):
        for row in answer[title]:
            by = f" by {text(row['closed_by'])}: {text(row['reason'])}" if title == "closed" else ""
            print_line(f"{title} {row['kind']} {row['seq']}{by}")


def _amount(option: str, given: str) -> Decimal:
    number = pricing.exact(given)
    if number is None or abs(number) >= pricing.AMOUNT_USD_LIMIT or pricing.quantized(number) != number:
        raise ConfigError(
            f"{option} {given!r} is no amount in USD", "write a decimal such as 0.000225, with at most 12 decimals"
        )
    return number


def _cost(option: str, given: str, markup: Decimal) -> Decimal:
    number = _amount(option, given)
    if isinstance(pricing.price([number], markup), pricing.Unpriceable):
        raise ConfigError(f"{option} {given} is no cost", "name what the call cost in USD, 0 or more")
    return abs(number)
