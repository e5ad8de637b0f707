"""The EfficientViT image encoder of Segment Anything: backbone, neck to a fixed grid, channel norm."""

from __future__ import annotations

from torch import Tensor, nn

from ...nn.conv import ConvLayer, LayerNorm2d
from ...ops._checks import check_image
from ..backbones import EfficientViTBackbone
from ..blocks import DAGBlock, FusedMBConv, OpSequential, UpSampleLayer, residual


class SamNeck(DAGBlock):
    """The last three stages, each 1 x 1 to `dim` channels and bicubic to `grid`, added; residual blocks; 1 x 1.

    Args:
        widths: name of a feature -> its channels, deepest first.
        dim: channels of the result, the feature "sam_encoder".
        depth, expand_ratio: number of FusedMBConv blocks and their expansion.
        grid: rows and columns of the result.
    """

    def __init__(
        self, widths: dict[str, int], depth: int, expand_ratio: float, dim: int = 256, grid: tuple[int, int] = (64, 64)
    ) -> None:
        inputs = {
            name: OpSequential([ConvLayer(channels, dim, 1, act_func=None), UpSampleLayer(size=grid)])
            for name, channels in widths.items()
        }
        middle = [residual(FusedMBConv(dim, dim, expand_ratio=expand_ratio, act_func="gelu")) for _ in range(depth)]
        output = OpSequential([ConvLayer(dim, dim, 1, use_bias=True, norm=None, act_func=None)])
        super().__init__(inputs, OpSequential(middle), {"sam_encoder": output})


class SamImageEncoder(nn.Module):
    """[B, 3, H, W] (normalised RGB) -> image embedding [B, 256, 64, 64], whatever H and W are.

    Raises:
        TypeError, ValueError: x is not a floating [B, 3, H > 0, W > 0] tensor.
    """

    def __init__(self, backbone: EfficientViTBackbone, neck: SamNeck, dim: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.norm = LayerNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        check_image("SamImageEncoder", "x", x)
        if x.shape[1] != 3 or 0 in x.shape[2:]:
            raise ValueError(f"SamImageEncoder: x must be [B, 3, H > 0, W > 0], got {list(x.shape)}")
        features = self.neck(self.backbone(x))
        return self.norm(features["sam_encoder"])  # type: ignore[no-any-return]
