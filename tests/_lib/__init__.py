"""Helpers of the tests, imported as `_lib`; pytest and the processes that tests start have `tests/` on their path."""
