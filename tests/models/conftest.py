"""Fixtures of the model tests."""

from tests.ops.conftest import one_thread as one_thread
