"""Super-resolution by 2: `efficientvit-sr-w0.75` and `efficientvit-sr-w1.0`, an architecture of this package's own.

The paper reports accuracy and latency of its super-resolution models, but neither it nor the official repository says
how they are built, and there are no official weights. What follows is a design of ours after the paper's description, a
backbone of EfficientViT blocks and a head. It is not the authors' model, and their figures are not its figures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv import ConvLayer
from ..ops._checks import check_image, check_positive_int, shape_text
from .blocks import EfficientViTBlock, FusedMBConv, OpSequential, pixel_unshuffle, residual

SCALE = 2
STRIDE = 4  # of the attention; images are padded to multiples of it
WIDTHS = {"w0.75": 0.75, "w1.0": 1.0}
BASE_WIDTH, BASE_DEEP_WIDTH = 64, 128  # of width 1.0, at strides 2 and 4
DEPTH, DEEP_DEPTH = 2, 4  # blocks before and after the attention, at stride 2; blocks with attention
DIM = 16


class EfficientViTSR(nn.Module):
    """[B, 3, H, W], RGB in [0, 1] -> [B, 3, 2H, 2W], not clamped; any H, W >= 1.

    y = bicubic(x) + head(backbone(x)), where the backbone works at reduced resolution, which is what makes it fast:

    - stem: the pixels of each 2 x 2 cell as 12 channels (pixel unshuffle), a 3 x 3 convolution;
    - first: FusedMBConvs at stride 2; down: a 3 x 3 convolution with stride 2;
    - middle: EfficientViT blocks, whose attention sees the whole image, at stride 4;
    - up: a 1 x 1 convolution, pixel shuffle by 2, added to what went down; last: FusedMBConvs at stride 2;
    - head: a 3 x 3 convolution to 3 * 4 * 4 channels, pixel shuffle by 4. It starts as zero, so that the untrained
      model is the bicubic interpolation (a = -0.5, the one that super-resolution is usually compared with).

    There are no norms: batch statistics of crops fit no whole image, and contrast is what the output must keep.
    Sizes that are not multiples of 4 are continued at the right and bottom edges, by reflection (or by their last pixel
    where they are too small to reflect), and the result is cropped. Batch 0 and channels_last are accepted; 16-bit
    weights and autocast too, the interpolation is then computed in float32.
    """

    def __init__(self, width: float = 1.0, attention: str = "fused") -> None:
        super().__init__()
        channels, deep = round(BASE_WIDTH * width), round(BASE_DEEP_WIDTH * width)
        if channels < 1 or deep < DIM:
            raise ValueError(f"EfficientViTSR: width must be at least {DIM / BASE_DEEP_WIDTH}, got {width}")
        plain: dict[str, Any] = {"norm": None, "act_func": "hswish"}

        def convolutions() -> OpSequential:
            blocks = [FusedMBConv(channels, channels, expand_ratio=2, fewer_norm=True, **plain) for _ in range(DEPTH)]
            return OpSequential([residual(block) for block in blocks])

        self.stem = ConvLayer(3 * 2 * 2, channels, 3, use_bias=True, norm=None, act_func=None)
        self.first = convolutions()
        self.down = ConvLayer(channels, deep, 3, stride=2, use_bias=True, norm=None, act_func=None)
        self.middle = OpSequential(
            [EfficientViTBlock(deep, DIM, expand_ratio=4, attention=attention, **plain) for _ in range(DEEP_DEPTH)]
        )
        self.up = ConvLayer(deep, channels * 2 * 2, 1, use_bias=True, norm=None, act_func=None)
        self.last = convolutions()
        self.head = ConvLayer(channels, 3 * (2 * SCALE) ** 2, 3, use_bias=True, norm=None, act_func=None)
        nn.init.zeros_(self.head.conv.weight)
        nn.init.zeros_(self.head.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Raises: ValueError, TypeError where x is no [B, 3, H > 0, W > 0] in the dtype of the weights."""
        self._check_input(x)
        height, width = x.shape[-2:]
        shallow = self.first(self.stem(pixel_unshuffle(_padded(x))))
        deep = self.middle(self.down(shallow))
        details = self.head(self.last(shallow + F.pixel_shuffle(self.up(deep), 2)))
        details = F.pixel_shuffle(details, 2 * SCALE)[..., : SCALE * height, : SCALE * width]
        return bicubic(x) + details

    def _check_input(self, x: Tensor) -> None:
        name, weight = type(self).__name__, self.stem.conv.weight
        check_image(name, "x", x)
        if x.shape[1] != 3 or x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name}: x must be of shape [B, 3, H > 0, W > 0], got {shape_text(x)}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: x must be of the weights' dtype {weight.dtype}, got {x.dtype}")


def bicubic(x: Tensor, scale: int = SCALE) -> Tensor:
    """[B, C, H, W] -> [B, C, scale * H, scale * W] by cubic convolution with a = -0.5; in float32 for 16-bit x."""
    check_positive_int("bicubic", "scale", scale)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], x.shape[2] * scale, x.shape[3] * scale)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # antialias chooses the kernel with a = -0.5 (without it torch takes -0.75); enlarging, it smooths nothing.
    return F.interpolate(wide, scale_factor=scale, mode="bicubic", antialias=True).to(x.dtype)


def _padded(x: Tensor) -> Tensor:
    """Continued to multiples of STRIDE at the right and the bottom."""
    down, right = -x.shape[-2] % STRIDE, -x.shape[-1] % STRIDE
    if down == 0 and right == 0:
        return x
    reflects = down < x.shape[-2] and right < x.shape[-1]
    return F.pad(x, (0, right, 0, down), mode="reflect" if reflects else "replicate")


def create_sr(name: str, attention: str = "fused") -> EfficientViTSR:
    """The model "efficientvit-sr-w0.75" or "efficientvit-sr-w1.0", which until it is trained interpolates bicubically.

    Args:
        name: which one; the prefix may be left out. The number multiplies the widths 64 and 128.
        attention: "fused" (the kernels) or "reference" (plain torch); both have the same state-dict keys.

    Raises: ValueError for an unknown name or attention.
    Source: this package's own design; see the module's words. `examples/train_super_resolution.py` trains it.
    """
    variant = name.removeprefix("efficientvit-sr-")
    if variant not in WIDTHS:
        raise ValueError(f"create_sr: name must be one of {', '.join(WIDTHS)}, got {name!r}")
    return EfficientViTSR(WIDTHS[variant], attention)
