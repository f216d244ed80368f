"""Prices against exact rational arithmetic, with costs summed as floats, as LiteLLM does."""

import math
from decimal import Decimal
from fractions import Fraction
from random import Random

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing_tailer import pricing
from billing_tailer.pricing import Price, Unpriceable, price

MARKUPS = (Decimal(1), Decimal("1.1"), Decimal("1.2"), Decimal("1.5"))
DUST = Fraction(1, 10**12)


def rounded(amount: Fraction) -> Fraction:
    """To 1e-12, half to even (round() of a Fraction), by another way than the program's."""
    return Fraction(round(amount * 10**12), 10**12)


def ceiling(amount_usd: Fraction) -> int:
    return math.ceil(amount_usd * 10**7)


def priced(costs: list[Decimal], markup: Decimal) -> Price:
    result = price(costs, markup)
    assert isinstance(result, Price)
    return result


# --- the formula

floats = st.floats(min_value=0, max_value=1000, allow_nan=False)
decimals = st.decimals(min_value=0, max_value=1000, allow_nan=False, places=20)
costs = st.lists(st.one_of(floats.map(lambda value: Decimal(repr(value))), decimals), max_size=6)
markups = st.one_of(st.sampled_from(MARKUPS), st.decimals(min_value=0, max_value=100, places=6))


@given(costs, markups)
@example([Decimal("5e-324"), Decimal(1000)], Decimal("1.1"))
@example([Decimal("0.0000000000005")], Decimal(1))
@example([Decimal("0.0000000000015")], Decimal(1))
@example([Decimal("0.000000100000500000")], Decimal("1.00"))
def test_the_formula(amounts: list[Decimal], markup: Decimal) -> None:
    result = priced(amounts, markup)
    total = sum((Fraction(amount) for amount in amounts), Fraction(0))
    assert Fraction(result.provider_cost_usd) == rounded(total)
    assert Fraction(result.user_cost_usd) == rounded(total * Fraction(markup))
    assert result.charged_credits == ceiling(Fraction(result.user_cost_usd)), "follows from the receipt's own column"
    assert result.provider_cost_usd.as_tuple().exponent == -12
    assert result.user_cost_usd.as_tuple().exponent == -12


@given(costs, st.randoms())
def test_the_order_of_the_costs_does_not_matter(amounts: list[Decimal], random: Random) -> None:
    shuffled = random.sample(amounts, len(amounts))
    assert price(shuffled, Decimal("1.2")) == price(amounts, Decimal("1.2"))


@pytest.mark.parametrize(
    ("amounts", "markup", "provider", "user", "credits_charged"),
    [
        (["0.000225"], "1", "0.000225000000", "0.000225000000", 2250),
        (["0.00010500000000000001"], "1", "0.000105000000", "0.000105000000", 1050),
        (["5.9999999999999995e-05"], "1", "0.000060000000", "0.000060000000", 600),
        (["0.00047100000000000006"], "1.1", "0.000471000000", "0.000518100000", 5181),
        (["0.1", "0.2"], "1.5", "0.300000000000", "0.450000000000", 4_500_000),
        (["0.0005666666666666666"], "1.2", "0.000566666667", "0.000680000000", 6800),  # not 6801
        (["0.0000000000004"], "1", "0.000000000000", "0.000000000000", 0),
        (["1e-12"], "1", "0.000000000001", "0.000000000001", 1),
        ([], "1.2", "0.000000000000", "0.000000000000", 0),
    ],
)
def test_examples(amounts: list[str], markup: str, provider: str, user: str, credits_charged: int) -> None:
    result = priced([Decimal(amount) for amount in amounts], Decimal(markup))
    assert (f"{result.provider_cost_usd:f}", f"{result.user_cost_usd:f}") == (provider, user)
    assert result.charged_credits == credits_charged


# --- against the exact price

TOKEN_PRICES = [
    # USD per token: input, cached input, output; most end within 9 to 11 decimals, as they are per million tokens
    ("1.5e-07", "7.5e-08", "6e-07"),
    ("2.5e-06", "1.25e-06", "1e-05"),
    ("1e-06", "1e-07", "5e-06"),
    ("3e-06", "3e-07", "1.5e-05"),
    ("1.1e-06", "5.5e-07", "4.4e-06"),
    ("3.75e-08", "1.875e-08", "1.5e-07"),
    ("5.5e-07", "1.4e-07", "2.19e-06"),
    ("2e-08", "2e-08", "2e-08"),
    ("1.35e-07", "1.35e-07", "5.51e-07"),
    ("9e-07", "9e-07", "9.45e-07"),
]
SECOND_PRICES = [
    # USD per second, as LiteLLM's float, and the exact price it stands for
    (0.0002833333333333333, Fraction("0.0002833333333333333")),
    (0.017 / 60, Fraction(17, 60_000)),
    (0.05 / 60, Fraction(5, 6_000)),  # 0.0008333333333333334: its float lies above it
    (0.0043 / 60, Fraction(43, 600_000)),
    (0.0001, Fraction(1, 10_000)),
]
SCALE = 3 * 10**19
"""All prices are whole numbers of 1/SCALE USD, all times of 1/100 s."""


def scaled(amount: Fraction) -> int:
    result = amount * SCALE
    assert result.denominator == 1
    return result.numerator


class Calls:
    """Calls of known exact prices, with the cost that LiteLLM's float arithmetic makes of them."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.tokens = [[(float(text), scaled(Fraction(text))) for text in prices] for prices in TOKEN_PRICES]
        self.seconds = [(number, scaled(exact)) for number, exact in SECOND_PRICES]

    def attempt(self) -> tuple[float, int]:
        """LiteLLM's float, and the exact cost in 1/(100 * SCALE) USD."""
        draw = self.random.random()
        if draw < 0.25:
            number, exact = self.seconds[int(draw * 4 * len(self.seconds))]
            hundredths = int(self.random.random() * 6000)
            return hundredths / 100 * number, hundredths * exact
        prices = self.tokens[int((draw - 0.25) / 0.75 * len(self.tokens))]
        (text, text_exact), (cached, cached_exact), (output, output_exact) = prices
        prompt, completion = int(self.random.random() * 4000), int(self.random.random() * 1000)
        from_cache = prompt // 3 if draw * 1000 % 1 < 0.3 else 0
        prompt_cost = (prompt - from_cache) * text + from_cache * cached
        exact = (prompt - from_cache) * text_exact + from_cache * cached_exact + completion * output_exact
        return prompt_cost + completion * output, exact * 100

    def call(self) -> tuple[list[float], int]:
        """One call of one to three attempts."""
        attempts = [self.attempt()]
        while len(attempts) < 3 and self.random.random() < 0.1:
            attempts.append(self.attempt())
        return [cost for cost, _ in attempts], sum(exact for _, exact in attempts)


def test_no_call_of_a_million_is_off_by_a_credit() -> None:
    calls = Calls(seed=20261122)
    off = naive_off = early_off = 0
    count = 1_000_000
    for number in range(count):
        amounts, exact = calls.call()
        markup = MARKUPS[number & 3]
        tenths = (10, 11, 12, 15)[number & 3]
        right = -(-exact * tenths * 10**6 // (100 * SCALE))
        records = [Decimal(repr(amount)) for amount in amounts]
        result = price(records, markup)
        off += type(result) is not Price or result.charged_credits != right
        if number % 21 == 0:
            total = sum(records, Decimal(0))
            naive_off += math.ceil(total * markup * 10**7) != right
            early_off += math.ceil(total.quantize(Decimal("1e-12")) * markup * 10**7) != right
    assert off == 0
    assert 0.05 <= naive_off / (count / 21) <= 0.18, "a ceil of LiteLLM's raw float over-charges that many calls"
    assert early_off > 0, "and so does rounding before the markup"


def test_rounding_before_the_markup_is_wrong_for_a_third_of_the_calls_at_some_prices() -> None:
    wrong = [
        seconds
        for seconds in range(1, 301)
        if math.ceil(Decimal(repr(seconds * 0.0002833333333333333)).quantize(Decimal("1e-12")) * Decimal("1.2") * 10**7)
        != seconds * 3400
    ]
    assert len(wrong) == 100
    for seconds in range(1, 301):
        cost = Decimal(repr(seconds * 0.0002833333333333333))
        assert priced([cost], Decimal("1.2")).charged_credits == seconds * 3400


units = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from([(number, exact) for number, exact in SECOND_PRICES]),
            st.sampled_from([(float(text), Fraction(text)) for prices in TOKEN_PRICES for text in prices]),
            st.decimals(min_value="1e-9", max_value="1e-3", places=13).map(lambda p: (float(p), Fraction(p))),
        ),
        st.integers(0, 20_000),
    ),
    min_size=1,
    max_size=4,
)


@given(units, st.sampled_from(MARKUPS))
def test_never_a_credit_too_many_and_a_credit_less_only_for_dust(
    attempts: list[tuple[tuple[float, Fraction], int]], markup: Decimal
) -> None:
    """The statement of the module's docstring, for prices of any number of decimals."""
    exact = sum((unit[1] * count for unit, count in attempts), Fraction(0)) * Fraction(markup)
    result = priced([Decimal(repr(unit[0] * count)) for unit, count in attempts], markup)
    above = exact - Fraction(math.floor(exact * 10**7), 10**7)
    assert abs(Fraction(result.user_cost_usd) - exact) < DUST
    if 0 < above < DUST:
        assert result.charged_credits in (ceiling(exact), ceiling(exact) - 1)
    else:
        assert result.charged_credits == ceiling(exact)


# --- what no receipt can hold


@pytest.mark.parametrize(
    ("amounts", "markup"),
    [
        (["1000000000000"], "1"),
        (["999999999999.9999999999996"], "1"),
        (["999999999999.9999999999996"], "0.1"),  # the provider cost rounds up to 10^12
        (["600000000000", "600000000000"], "0.1"),
        (["700000000000"], "1.5"),
        (["922337203685.4775808"], "1"),  # credits above bigint
        (["-0.1"], "1"),
        (["0.2", "-0.1"], "1"),
        (["NaN"], "1"),
        (["sNaN"], "1"),
        (["Infinity"], "1"),
        (["Infinity"], "0"),
        (["1e-3000", "1"], "1"),
        (["1e5000"], "1"),
        (["1"], "-1"),
        (["1"], "NaN"),
    ],
)
def test_unpriceable(amounts: list[str], markup: str) -> None:
    result = price([Decimal(amount) for amount in amounts], Decimal(markup))
    assert isinstance(result, Unpriceable)
    assert 0 < len(result.detail) < 100


def test_the_largest_price() -> None:
    result = priced([Decimal("922337203685.4775807")], Decimal(1))
    assert result.charged_credits == 2**63 - 1


def test_a_large_sum_is_exact() -> None:
    amounts = [Decimal("5e-324"), Decimal("999.9999999999999")] * 1000
    assert Fraction(pricing.total(amounts)) == sum(map(Fraction, amounts))


# --- numbers from JSON


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (0, "0"),
        (7, "7"),
        (0.1, "0.1"),
        (5.9999999999999995e-05, "0.000059999999999999995"),
        (1e-05, "0.00001"),
        (-0.0, "-0.0"),
        (5e-324, "5e-324"),
        ("0.000225", "0.000225"),
        ("1e-05", "1e-5"),
        ("1E+3", "1000"),
        (Decimal("0.00010500000000000001"), "0.00010500000000000001"),
        (True, None),
        (None, None),
        ([], None),
        ({}, None),
        (b"1", None),
        ("", None),
        ("NaN", None),
        ("Infinity", None),
        ("1_000", None),
        (" 1", None),
        ("1\n", None),
        ("\u0661", None),  # a digit, but not one of JSON's
        ("0x10", None),
        ("1e99999", None),
        ("1e-401", None),
        ("0." + "1" * 100, None),
        (float("nan"), None),
        (float("inf"), None),
        (Decimal("sNaN"), None),
        (Decimal("1e-9999"), None),
        (Decimal("1." + "1" * 500), None),
        pytest.param(2**5000, None, id="huge"),
    ],
)
def test_exact(value: object, exact: str | None) -> None:
    assert pricing.exact(value) == (None if exact is None else Decimal(exact))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_stands_for_the_text_that_litellm_sent(value: float) -> None:
    text = repr(value)
    assert pricing.exact(orjson.loads(text)) == pricing.exact(text) == Decimal(text)


@pytest.mark.parametrize(
    ("value", "usd", "text"),
    [
        (None, None, None),
        ("", None, None),
        (0, "0", None),
        (0.0, "0", None),
        (-0.0, "0", None),
        ("0.000225", "0.000225", None),
        (1000, "1000", None),
        (1000.0000001, None, "1000.0000001"),
        (-1e-12, None, "-1e-12"),
        (float("nan"), None, "nan"),
        (float("-inf"), None, "-inf"),
        ("NaN", None, "NaN"),
        ("free", None, "free"),
        (True, None, "true"),
        (False, None, "false"),
        ([1], None, "a JSON list"),
        ({"usd": 1}, None, "a JSON dict"),
        (1e308, None, "1e+308"),
        pytest.param(2**5000, None, "an integer of 5001 bits", id="huge"),
    ],
)
def test_cost(value: object, usd: str | None, text: str | None) -> None:
    cost_usd, cost_text = pricing.cost(value, Decimal(1000))
    assert (cost_usd, cost_text) == (None if usd is None else Decimal(usd), text)
    assert cost_usd is None or not cost_usd.is_signed()


def test_a_text_that_is_too_long_is_cut_to_no_number() -> None:
    for long in ("0.000225" + "0" * 200, "9" * 81, Decimal("0." + "3" * 300)):
        text = pricing.text_of(long)
        assert len(text) <= pricing.NUMBER_CHARS_MAX
        assert pricing.exact(text) is None
        assert pricing.text_of(text) == text


@given(st.floats(min_value=0, allow_infinity=False))
def test_canonical_is_one_text_per_number(value: float) -> None:
    number = Decimal(repr(value))
    padded = Decimal(f"{number:f}0") if "." in f"{number:f}" else number
    assert pricing.canonical(number) == pricing.canonical(padded)
    assert Decimal(pricing.canonical(number)) == number
    assert pricing.canonical(Decimal("-0.0")) == pricing.canonical(Decimal("0e9")) == "0"
