"""Renaming the keys of a state dict by pairs of patterns, in either direction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Pair = tuple[str, str]  # "{}" stands for one part of a key, "{*}" for all that follows; the same ones on both sides


class Renaming:
    """key -> key for those that match the left pattern of a pair; the first that matches holds."""

    def __init__(self, function: str, expected: str, pairs: Iterable[Pair]) -> None:
        self.function, self.expected = function, expected
        self.rules = [(_compiled(left), right.replace("{*}", "{}")) for left, right in pairs]

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in state.items():
            new = self.key(key)
            if new in renamed:
                raise ValueError(f"{self.function}: state must have each key once, got two for {new!r}")
            renamed[new] = value
        return renamed

    def key(self, key: str) -> str:
        for pattern, template in self.rules:
            match = pattern.fullmatch(key)
            if match:
                return template.format(*match.groups())
        raise ValueError(f"{self.function}: state must have {self.expected}, got {key!r}")


def turned(pairs: Iterable[Pair]) -> list[Pair]:
    return [(right, left) for left, right in pairs]


def _compiled(pattern: str) -> re.Pattern[str]:
    literal = re.escape(pattern)
    return re.compile(literal.replace(re.escape("{*}"), "(.+)").replace(re.escape("{}"), r"([^.]+)"))
