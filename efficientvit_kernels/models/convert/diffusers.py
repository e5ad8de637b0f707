"""diffusers' `AutoencoderDC` against the official DC-AE: other keys, and linear layers for the attention's 1 x 1 convs.

diffusers names the thirds of the qkv weight to_q, to_k and to_v. They are just thirds: which channels are queries, keys
and values is decided per head, after they are put together again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .keys import Pair, Renaming, turned

# Inside a stage's block.
BLOCK: list[Pair] = [
    ("main.conv1.conv.{}", "conv1.{}"),
    ("main.conv2.conv.{}", "conv2.{}"),
    ("main.conv2.norm.{}", "norm.{}"),
    ("context_module.main.qkv.conv.weight", "attn.to_qkv.weight"),  # which diffusers splits
    ("context_module.main.aggreg.{}.0.weight", "attn.to_qkv_multiscale.{}.proj_in.weight"),
    ("context_module.main.aggreg.{}.1.weight", "attn.to_qkv_multiscale.{}.proj_out.weight"),
    ("context_module.main.proj.conv.weight", "attn.to_out.weight"),
    ("context_module.main.proj.norm.{}", "attn.norm_out.{}"),
    ("local_module.main.inverted_conv.conv.{}", "conv_out.conv_inverted.{}"),
    ("local_module.main.depth_conv.conv.{}", "conv_out.conv_depth.{}"),
    ("local_module.main.point_conv.conv.{}", "conv_out.conv_point.{}"),
    ("local_module.main.point_conv.norm.{}", "conv_out.norm.{}"),
]
ENDS: list[Pair] = [
    ("encoder.project_in.conv.conv.{}", "encoder.conv_in.conv.{}"),
    ("encoder.project_in.conv.{}", "encoder.conv_in.{}"),
    ("encoder.project_out.main.op_list.0.conv.{}", "encoder.conv_out.{}"),
    ("decoder.project_in.main.conv.{}", "decoder.conv_in.{}"),
    ("decoder.project_out.op_list.0.{}", "decoder.norm_out.{}"),
    ("decoder.project_out.op_list.2.conv.conv.{}", "decoder.conv_out.conv.{}"),
    ("decoder.project_out.op_list.2.conv.{}", "decoder.conv_out.{}"),
]
LINEAR = (".attn.to_qkv.weight", ".attn.to_out.weight")  # diffusers' [out, in]; official [out, in, 1, 1]
THIRD = re.compile(r"(.+\.attn\.to_)([qkv])\.weight")


def _pairs(strided: bool) -> list[Pair]:
    """Official and diffusers' keys; `strided`: the encoder's stages are joined by bare strided convolutions."""
    down = ("main.conv.{}" if strided else "main.conv.conv.{}", "conv.{}")
    up = ("main.conv.conv.{}", "conv.{}")
    sides = [
        ("encoder.stages.{}.op_list.{}.", "encoder.down_blocks.{}.{}.", [*BLOCK, down]),
        ("decoder.stages.{}.op_list.{}.", "decoder.up_blocks.{}.{}.", [*BLOCK, up]),
    ]
    blocks = [(left + a, right + b) for left, right, inside in sides for a, b in inside]
    return [*blocks, *ENDS]


def diffusers_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an `AutoencoderDC` with official keys and shapes.

    Raises:
        ValueError: a key that AutoencoderDC does not have, or a to_q, to_k or to_v without the other two.
    """
    # The one official model that begins with a bare convolution, sana, is the one with strided convolutions.
    pairs = _pairs(strided="encoder.conv_in.weight" in state)
    whole = {}
    for key, value in _joined(state).items():
        whole[key] = value[:, :, None, None] if key.endswith(LINEAR) and value.dim() == 2 else value
    return Renaming("diffusers_to_official", "the keys of diffusers' AutoencoderDC", turned(pairs))(whole)


def official_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an official DC-AE with the keys and shapes of `AutoencoderDC`.

    Raises:
        ValueError: a key that the official DC-AE does not have.
    """
    strided = "encoder.project_in.conv.weight" in state
    renamed = Renaming("official_to_diffusers", "the keys of an official DC-AE", _pairs(strided))(state)
    split = {}
    for key, value in renamed.items():
        if key.endswith(LINEAR):
            value = value.flatten(1)
        if key.endswith(".to_qkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            split.update({key.replace(".to_qkv.", f".to_{letter}."): part for letter, part in parts})
        else:
            split[key] = value
    return split


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with to_qkv in place of to_q, to_k and to_v."""
    joined = {}
    for key, value in state.items():
        third = THIRD.fullmatch(key)
        if third is None:
            joined[key] = value
            continue
        names = [f"{third[1]}{letter}.weight" for letter in "qkv"]
        missing = next((name for name in names if name not in state), None)
        if missing is not None:
            raise ValueError(f"diffusers_to_official: state must have to_q, to_k and to_v, got no {missing!r}")
        if third[2] == "q":
            joined[f"{third[1]}qkv.weight"] = torch.cat([state[name] for name in names])
    return joined
