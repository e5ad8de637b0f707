"""Fixtures of the module tests."""

from tests.ops.conftest import one_thread as one_thread
