"""Every interpreted kernel of these tests runs under watch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.triton_kernels.watch import watched


@pytest.fixture(autouse=True)
def watched_kernels() -> Iterator[None]:
    with watched():
        yield
