"""How long the ops are fuzzed: 300 examples a test on every push, more where EVK_FUZZ_EXAMPLES says so."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("EVK_FUZZ_EXAMPLES", "300"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 300,  # the same examples on every push; `make nightly` draws new ones
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
