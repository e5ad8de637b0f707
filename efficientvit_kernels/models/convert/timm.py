"""timm's `efficientvit_b*` and `efficientvit_l*` against the official classification models: the keys alone differ.

timm's models are not quite the official ones: its LiteMLA has eps 1e-5 in place of 1e-15, and the BatchNorm of its L
models' heads 1e-5 in place of 1e-7. Outputs agree to about that.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .keys import Pair, Renaming, turned

MOST_RESIDUALS = 8  # in a stem; the official models have one

HEAD: list[Pair] = [
    ("head.op_list.0.{*}", "head.in_conv.{*}"),
    ("head.op_list.2.linear.{}", "head.classifier.0.{}"),
    ("head.op_list.2.norm.{}", "head.classifier.1.{}"),
    ("head.op_list.3.linear.{}", "head.classifier.4.{}"),
]


def _pairs(stem: str, first_stage: int) -> list[Pair]:
    """Official and timm's keys of a series, whose stem is at `stem`, and whose stage 0 in timm is `first_stage`."""
    residuals = [(f"{stem}.op_list.{i + 1}.{{*}}", f"stem.res{i}.{{*}}") for i in range(MOST_RESIDUALS)]
    stages = [
        (f"backbone.stages.{i + first_stage}.op_list.{{}}.{{*}}", f"stages.{i}.blocks.{{}}.{{*}}") for i in range(4)
    ]
    return [(f"{stem}.op_list.0.{{*}}", "stem.in_conv.{*}"), *residuals, *stages, *HEAD]


B_SERIES = _pairs("backbone.input_stem", 0)
L_SERIES = _pairs("backbone.stages.0", 1)


def timm_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a timm EfficientViT with official keys.

    Raises:
        ValueError: a key that timm's EfficientViT does not have.
    """
    large = any(key.startswith("stem.res0.main.conv1.") for key in state)  # a ResBlock; the B series has DSConv there
    pairs = turned(L_SERIES if large else B_SERIES)
    return Renaming("timm_to_official", "the keys of timm's efficientvit_b* or efficientvit_l*", pairs)(state)


def official_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an official classification model (b0 to b3, l1 to l3) with timm's keys.

    Raises:
        ValueError: a key that the official classification models do not have.
    """
    small = any(key.startswith("backbone.input_stem.") for key in state)
    expected = "the keys of an official classification model"
    return Renaming("official_to_timm", expected, B_SERIES if small else L_SERIES)(state)
