"""Tests of billing_tailer; `tests/test_<module>.py` mirrors `billing_tailer/<module>.py`."""
