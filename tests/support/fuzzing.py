"""Fuzzing by hypothesis within a time budget: BILLING_TAILER_TEST_FUZZ_SECONDS for lines, as much for callbacks.

Ten seconds if unset; `make fuzz` gives ten minutes. Mutations start from real samples: most of what comes out is nearly
right.
"""

import math
import os
import random
import time
from collections.abc import Callable
from typing import Any, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS: Final = float(os.environ.get("BILLING_TAILER_TEST_FUZZ_SECONDS", "10"))
ROUND_EXAMPLES: Final = 100

INTERESTING: Final = (
    *(b"", b"\0", b"\n", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc3", b"\\", b'"', b"'", b",", b":"),
    *(b"{", b"}", b"[", b"]", b"{" * 300, b"[" * 600, b'{"a":' * 200, b"null", b"true", b"NaN", b"-Infinity"),
    *(b"1e999", b"-0", b"0.1e-400", b"9" * 400, b"1" + b"0" * 5000, b"9223372036854775808", b"-1"),
    *(b"\\u0000", b"\\ud800", b"\\udfff\\ud800", b"\\u", b"\\x00", b'"a":1,"a":2', b"/*", b"\x18", b"\x1f\x8b"),
    *(b"POST", b"200", b"499", b"OK", b"-", b"1795307912.609", b"2026-11-22T00:38:32+00:00", b"%00%ff", b"x" * 3000),
)
"""Bytes that have broken parsers before."""

seeds = st.integers(0, 2**64 - 1)
"""For a `Mutator`: drawing each change by hypothesis would be fifty times slower."""

_TEXTS: Final = tuple(piece.decode("latin-1") for piece in INTERESTING)
_ODD: Final = (
    "\0",
    "\ud800",
    "\udfff",
    "\ufffd",
    "\ufeff",
    "\u2028",
    "é",
    "\U0001f600",
    " ",
    "\n",
    "%",
    "\\",
    '"',
    "a",
    "0",
    "/",
)
_NUMBERS: Final = (
    0,
    -1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.1,
    -0.0,
    5e-324,
    1.7e308,
    math.inf,
    math.nan,
    1795307912.6,
)


class Mutator:
    """Changes to real samples, as a generator of random numbers says: the same seed, the same changes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        """Text of any kind."""
        kind = self.random.randrange(4)
        if kind == 0:
            return self.random.choice(_TEXTS)
        if kind == 1:
            return self.random.choice(_ODD) * self.random.choice((1, 2, 255, 257, 513, 3000))
        return "".join(self.random.choices(_ODD, k=self.random.randrange(12)))

    def value(self, depth: int = 2) -> Any:
        """What may stand in JSON, and some that may not: NaN, halves of surrogate pairs."""
        kind = self.random.randrange(8 if depth else 6)
        if kind == 0:
            return self.random.choice((None, True, False, "", "-"))
        if kind in (1, 2):
            return self.random.choice(_NUMBERS)
        if kind < 6:
            return self.text()
        inner = range(self.random.randrange(4))
        if kind == 6:
            return [self.value(depth - 1) for _ in inner]
        return {self.text(): self.value(depth - 1) for _ in inner}

    def edited(self, sample: bytes) -> bytes:
        """Some bytes replaced, left out, repeated or moved."""
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(sample) + 1)
            piece = sample[at : at + self.random.choice((0, 0, 1, 1, 3, 20, 400))]
            rest = sample[at + len(piece) :]
            kind = self.random.randrange(8)
            if kind == 0:
                sample = sample[:at] + piece * 3 + rest
            elif kind == 1:
                sample = piece + sample[:at] + rest
            elif kind == 2:
                sample = sample[:at] + self.random.randbytes(2) + rest
            else:
                sample = sample[:at] + self.random.choice(INTERESTING) + rest
        return sample

    def planted(self, value: Any) -> Any:
        """JSON with another value, another key, or nothing, at one place. Changes what it is given."""
        here = value
        while isinstance(here, dict | list) and here:
            key = self.random.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if isinstance(here[key], dict | list) and here[key] and self.random.random() < 0.7:
                here = here[key]
                continue
            kind = self.random.randrange(6)
            if kind == 0:
                del here[key]
            elif kind == 1 and isinstance(here, dict):
                here[self.text()] = here[key]
            else:
                here[key] = self.value()
            break
        return value


def fuzz(example: Callable[..., None], share: float, **strategies: st.SearchStrategy[Any]) -> int:
    """Try examples, each time other ones, until this share of the budget is spent; returns their number. Raises what
    they raise, with the smallest example that does."""
    tried = 0

    @settings(
        max_examples=ROUND_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(**strategies)
    def one_round(**drawn: Any) -> None:
        nonlocal tried
        tried += 1
        example(**drawn)

    end = time.monotonic() + SECONDS * share
    while time.monotonic() < end:
        one_round()
    return tried
