"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread(threads: None) -> None:
    """For many small cases: torch's own small convolutions spend their time on starting threads."""
    torch.set_num_threads(1)
