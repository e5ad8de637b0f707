"""Fixtures of the integration tests."""

from tests.ops.conftest import one_thread as one_thread
