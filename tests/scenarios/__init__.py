"""What breaks every known tailer, one test each, named after it; `tests/scenarios/inventory.py` is the whole list."""

import pytest

pytest.register_assert_rewrite("tests.scenarios.outcome")
