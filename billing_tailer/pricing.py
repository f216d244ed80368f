"""Costs of spend records -> what a call costs its user. Pure, exact, no floats.

Holds MONEY_IS_DECIMAL (tests/test_pricing.py):

    sum               = the records' costs, unrounded
    provider_cost_usd = quantize(sum, 1e-12, half-even)
    user_cost_usd     = quantize(sum * markup, 1e-12, half-even)
    charged_credits   = ceil(user_cost_usd * 10^7)              1 credit = 0.0000001 USD

Why the quantize: LiteLLM's costs are sums of floats, such as 5.9999999999999995e-05 for 0.00006 and
0.00010500000000000001 for 0.000105. Their error stays below 1e-13 for any call below 100 USD, while the ceil of 1050
credits and a hair is 1051. Let E be the exact price (unit prices as rationals, times units, times markup). Then
|user_cost_usd - E| < 1e-12, and user_cost_usd is a multiple of 1e-12, as every whole credit is. Hence

- never a credit too many: user_cost_usd above a whole credit k means at least k + 1e-12, so E is above k as well;
- a credit less than ceil(E * 10^7) only where E lies above a whole credit by less than 1e-12 USD, which is what float
  noise looks like. Unit prices that end within 12 decimals after the markup never give such an E.

Why not before the markup: 0.0002833333333333333 USD/s for 2 s is 0.000566666667 when rounded, which times 1.2 is
6800.000004 credits: one too many, for a third of the calls at such prices.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation, Overflow

NUMBER_CHARS_MAX = 80
"""Longest text of a number that is understood. A float's repr has 24 at most."""
DECIMALS_MAX = 400
"""Most decimals of a number that is understood. The smallest float has 324."""
AMOUNT_USD_LIMIT = Decimal(10**12)
"""Amounts are below this: numeric(24,12)."""
CREDITS_MAX = 2**63 - 1
"""Postgres' bigint."""

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,4})?", re.ASCII)
_LATTICE = Decimal("1e-12")
_LATTICE_PER_CREDIT = 10**5
# Wide enough for any sum and product of amounts below 10^12 with DECIMALS_MAX decimals; where it is not, it raises
# instead of rounding.
_EXACT = Context(prec=2000, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, Overflow, Inexact])
# The one that rounds: to 1e-12, half to even.
_ROUNDING = Context(prec=2000, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, Overflow])


@dataclass(frozen=True, slots=True)
class Price:
    """What a call costs. USD, quantized to 1e-12; 1 credit = 1e-7 USD."""

    provider_cost_usd: Decimal
    user_cost_usd: Decimal
    charged_credits: int


@dataclass(frozen=True, slots=True)
class Unpriceable:
    """The costs give no amount that a receipt can hold. `detail`: why, for the operator."""

    detail: str


def price(costs: Iterable[Decimal], markup: Decimal) -> Price | Unpriceable:
    """Costs in USD, each exact, finite and not negative, and the markup factor -> the price of the call.

    Unpriceable where an amount does not fit numeric(24,12) or bigint, or a cost is none.
    """
    try:
        total = Decimal(0)
        for cost in costs:
            if not cost >= 0:
                return Unpriceable(f"a cost of {cost:.20} USD")
            total = _EXACT.add(total, cost)
        user_total = _EXACT.multiply(total, markup)
        # compared before they are rounded: quantize fails on what needs more digits than the context has
        if not (total < AMOUNT_USD_LIMIT and 0 <= user_total < AMOUNT_USD_LIMIT):
            return Unpriceable(f"{user_total:.6E} USD is outside 0 to {AMOUNT_USD_LIMIT:.0E} USD")
        provider_cost, user_cost = quantized(total), quantized(user_total)
    except (InvalidOperation, Inexact) as error:  # Overflow is an Inexact
        return Unpriceable(f"a sum that is no exact amount: {type(error).__name__}")
    charged_credits = -(-int(_EXACT.scaleb(user_cost, 12)) // _LATTICE_PER_CREDIT)
    if provider_cost >= AMOUNT_USD_LIMIT or charged_credits > CREDITS_MAX:
        return Unpriceable(f"{user_cost:.6E} USD is more than a receipt can hold")
    return Price(provider_cost, user_cost, charged_credits)


def quantized(amount: Decimal) -> Decimal:
    """An amount in USD rounded to 1e-12, half to even: what two sums are compared at."""
    return amount.quantize(_LATTICE, context=_ROUNDING)


def total(amounts: Iterable[Decimal]) -> Decimal:
    """The exact sum of amounts in USD. Raises decimal.Inexact rather than round."""
    result = Decimal(0)
    for amount in amounts:
        result = _EXACT.add(result, amount)
    return result


def difference(amount: Decimal, other: Decimal) -> Decimal:
    """amount - other in USD, exact."""
    return _EXACT.subtract(amount, other)


def exact(value: object) -> Decimal | None:
    """A number from JSON (int, float, Decimal, or its text) -> the decimal it stands for; None if it is none.

    A float stands for its repr: the shortest decimal that reads back as the same float, which is what Python, and so
    LiteLLM, writes into JSON. Not finite, longer than NUMBER_CHARS_MAX or with more than DECIMALS_MAX decimals: None.
    """
    if type(value) is float:  # no repr of a finite one is too long, or no number
        return Decimal(repr(value)) if math.isfinite(value) else None
    if type(value) is str:
        text = value
    elif type(value) is int:
        text = str(value) if value.bit_length() <= 256 else ""  # str() of a very long int raises
    elif isinstance(value, Decimal):
        if value.is_finite() and len(value.as_tuple().digits) > NUMBER_CHARS_MAX:
            return None
        text = str(value)
    else:
        return None
    if len(text) > NUMBER_CHARS_MAX or _NUMBER.fullmatch(text) is None:
        return None
    number = Decimal(text)
    exponent = number.as_tuple().exponent
    return number if isinstance(exponent, int) and -exponent <= DECIMALS_MAX else None


def canonical(number: Decimal) -> str:
    """One text per number, whatever way it was written: 0, 0.0 and -0 are the same, as are 1e-05 and 0.00001."""
    return str(number.normalize(_ROUNDING)) if number else "0"


def cost(value: object, cost_max_usd: Decimal) -> tuple[Decimal | None, str | None]:
    """LiteLLM's cost -> (USD, None), (None, its text) where it cannot be charged, or (None, None) where there is none.

    Cannot be charged: not a number, not finite, negative, above cost_max_usd.
    """
    if value is None or value == "":
        return None, None
    number = exact(value)
    if number is None or not 0 <= number <= cost_max_usd:
        return None, text_of(value)
    return abs(number), None


def text_of(value: object) -> str:
    """A value from JSON as text of at most NUMBER_CHARS_MAX characters; a longer one is cut so that it is no number."""
    match value:
        case str():
            text = value
        case bool():
            text = "true" if value else "false"
        case int() if value.bit_length() > 256:
            text = f"an integer of {value.bit_length()} bits"
        case int() | float() | Decimal():
            text = str(value)
        case _:
            text = f"a JSON {type(value).__name__}"
    return text if len(text) <= NUMBER_CHARS_MAX else text[: NUMBER_CHARS_MAX - 3] + "..."
