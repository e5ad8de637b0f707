"""DC-AE, the deep-compression autoencoder: images to latents with 32, 64 or 128 times fewer rows, and back.

Sources: J. Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models" (ICLR 2025), for
the structure; the official state dicts for every name and size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv import ConvLayer, make_activation, make_norm
from .blocks import EfficientViTBlock, OpSequential, ResBlock, ResidualBlock, pixel_unshuffle, residual


@dataclass(frozen=True)
class DCAEConfig:
    """One autoencoder. Stage 0 is the widest in pixels; a depth of 0 there means that the stage is left out.

    widths: channels of the stages, in encoder and decoder.
    residual_stages: how many of the first stages are of ResBlocks; the others are of EfficientViT blocks.
    scales: kernel sizes of the attention's aggregations; empty in the first models.
    pixel_shuffle: stages are joined by convolution and pixel (un)shuffle; otherwise by strided convolutions, and by
        nearest interpolation and convolution.
    decoder_norm, decoder_act: of the decoder's ResBlocks; everything else has RMSNorm and SiLU.
    scaling_factor: what latents are multiplied by before a diffusion model gets them, where one was published.
    """

    latent_channels: int
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    residual_stages: int = 3
    scales: tuple[int, ...] = ()
    pixel_shuffle: bool = True
    decoder_norm: str = "bn2d"
    decoder_act: str = "relu"
    scaling_factor: float | None = None
    in_channels: int = 3
    head_dim: int = 32
    expand_ratio: float = 4.0


def _deeper(base: DCAEConfig, latent_channels: int, stages: int) -> DCAEConfig:
    """`base` with more attention stages of 2048 channels."""
    return replace(
        base,
        latent_channels=latent_channels,
        widths=(*base.widths, *[2048] * stages),
        encoder_depths=(*base.encoder_depths, *[2] * stages),
        decoder_depths=(*base.decoder_depths, *[2] * stages),
    )


_F32 = DCAEConfig(32)
_F64, _F128 = _deeper(_F32, 128, 1), _deeper(_F32, 512, 2)
_SANA = DCAEConfig(
    32,
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    scales=(5,),
    pixel_shuffle=False,
    decoder_norm="trms2d",
    decoder_act="silu",
    scaling_factor=0.41407,
)
CONFIGS: dict[str, DCAEConfig] = {
    "dc-ae-f32c32-in-1.0": replace(_F32, scaling_factor=0.3189),
    "dc-ae-f32c32-mix-1.0": _F32,
    "dc-ae-f64c128-in-1.0": replace(_F64, scaling_factor=0.2889),
    "dc-ae-f64c128-mix-1.0": _F64,
    "dc-ae-f128c512-in-1.0": _F128,
    "dc-ae-f128c512-mix-1.0": _F128,
    "dc-ae-f32c32-sana-1.0": _SANA,
}


def create_dc_ae(name: str, attention: str = "fused") -> DCAE:
    """The autoencoder of that official name, e.g. "dc-ae-f32c32-in-1.0", with random weights.

    Raises:
        ValueError: `name` is not in `CONFIGS`, or `attention` neither "fused" nor "reference".
    """
    if name not in CONFIGS:
        raise ValueError(f"create_dc_ae: name must be one of {', '.join(CONFIGS)}, got {name!r}")
    return DCAE(CONFIGS[name], attention)


class DCAE(nn.Module):
    """Deterministic autoencoder: [B, 3, H, W] <-> [B, latent_channels, H / ratio, W / ratio].

    Images are RGB / 255 normalised by mean 0.5 and standard deviation 0.5. Latents are not scaled: a diffusion model
    that expects scaled ones gets `encode(x) * scaling_factor`. Keys are the official ones.

    Attributes:
        spatial_compression_ratio: H and W must be multiples of it.
        latent_channels: channels of the latent.
        scaling_factor: see `DCAEConfig`; None where none was published.
    """

    def __init__(self, config: DCAEConfig, attention: str = "fused") -> None:
        super().__init__()
        if not len(config.widths) == len(config.encoder_depths) == len(config.decoder_depths):
            raise ValueError("DCAE: widths, encoder_depths and decoder_depths must be of one length")
        self.config = config
        self.spatial_compression_ratio: int = 2 ** (len(config.widths) - 1)
        self.latent_channels = config.latent_channels
        self.scaling_factor = config.scaling_factor
        self.encoder = Encoder(config, attention)
        self.decoder = Decoder(config, attention)

    def encode(self, x: Tensor) -> Tensor:
        """The latent of images [B, 3, H, W].

        Raises:
            ValueError: another shape, or H or W is not a positive multiple of `spatial_compression_ratio`.
        """
        ratio = self.spatial_compression_ratio
        channels = self.config.in_channels
        if x.dim() != 4 or x.shape[1] != channels or any(size == 0 or size % ratio for size in x.shape[2:]):
            expected = f"[B, {channels}, H, W] with H and W positive multiples of {ratio}"
            raise ValueError(f"DCAE.encode: x must be {expected}, got {list(x.shape)}")
        return self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """The images of latents [B, latent_channels, h, w]; not clamped to [-1, 1]."""
        if z.dim() != 4 or z.shape[1] != self.latent_channels or 0 in z.shape[2:]:
            expected = f"[B, {self.latent_channels}, h > 0, w > 0]"
            raise ValueError(f"DCAE.decode: z must be {expected}, got {list(z.shape)}")
        return self.decoder(z)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))


class Encoder(nn.Module):
    """project_in; per stage its blocks and a downsampling; project_out, with channel averages as its shortcut."""

    def __init__(self, config: DCAEConfig, attention: str) -> None:
        super().__init__()
        widths, depths = config.widths, config.encoder_depths
        if depths[0] > 0:
            self.project_in: nn.Module = _conv(config.in_channels, widths[0])
        else:
            self.project_in = _downsample(config, config.in_channels, widths[1])
        stages = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            ops = [_block(config, stage, "trms2d", "silu", attention) for _ in range(depth)]
            if depth > 0 and stage + 1 < len(widths):
                wider = widths[stage + 1]
                ops.append(ResidualBlock(_downsample(config, width, wider), AverageShortcut(width, wider, 2)))
            stages.append(OpSequential(ops))
        self.stages = nn.ModuleList(stages)
        self.project_out = ResidualBlock(
            OpSequential([_conv(widths[-1], config.latent_channels)]),
            AverageShortcut(widths[-1], config.latent_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """project_in, with repeated channels as its shortcut; from the last stage to the first an upsampling and blocks;
    project_out: RMSNorm, ReLU and the convolution to pixels."""

    def __init__(self, config: DCAEConfig, attention: str) -> None:
        super().__init__()
        widths, depths = config.widths, config.decoder_depths
        self.project_in = ResidualBlock(
            _conv(config.latent_channels, widths[-1]), RepeatShortcut(config.latent_channels, widths[-1], 1)
        )
        stages = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            ops: list[nn.Module] = []
            if depth > 0 and stage + 1 < len(widths):
                wider = widths[stage + 1]
                ops.append(ResidualBlock(_upsample(config, wider, width), RepeatShortcut(wider, width, 2)))
            convolutional = stage < config.residual_stages
            norm, act = (config.decoder_norm, config.decoder_act) if convolutional else ("trms2d", "silu")
            ops += [_block(config, stage, norm, act, attention) for _ in range(depth)]
            stages.append(OpSequential(ops))
        self.stages = nn.ModuleList(stages)
        width = widths[0] if depths[0] > 0 else widths[1]
        to_pixels = _conv if depths[0] > 0 else lambda a, b: _upsample(config, a, b)
        self.project_out = OpSequential(
            [make_norm("trms2d", width), make_activation("relu"), to_pixels(width, config.in_channels)]
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.project_in(z)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)  # type: ignore[no-any-return]


def _block(config: DCAEConfig, stage: int, norm: str, act: str, attention: str) -> nn.Module:
    width = config.widths[stage]
    if stage < config.residual_stages:
        return residual(ResBlock(width, width, norm=norm, act_func=act, fewer_norm=True))
    return EfficientViTBlock(
        width, config.head_dim, config.expand_ratio, config.scales, norm, act, "glumbconv", attention
    )


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> ConvLayer:
    return ConvLayer(in_channels, out_channels, 3, stride, use_bias=True, norm=None, act_func=None)


def _downsample(config: DCAEConfig, in_channels: int, out_channels: int) -> nn.Module:
    if config.pixel_shuffle:
        return ConvPixelUnshuffle(in_channels, out_channels)
    return _conv(in_channels, out_channels, stride=2)


def _upsample(config: DCAEConfig, in_channels: int, out_channels: int) -> nn.Module:
    return (ConvPixelShuffle if config.pixel_shuffle else InterpolateConv)(in_channels, out_channels)


class ConvPixelUnshuffle(nn.Module):
    """3 x 3 convolution to a quarter of the channels, then 2 x 2 pixels to channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(self.conv(x))


class ConvPixelShuffle(nn.Module):
    """3 x 3 convolution to four times the channels, then channels to 2 x 2 pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv(in_channels, 4 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class InterpolateConv(nn.Module):
    """Nearest interpolation to twice the size, then a 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[no-any-return]


class _Shortcut(nn.Module):
    """Few channels and many pixels, related to many channels and few pixels, without parameters.

    Pixel unshuffling gives pixel (i, j) of a factor x factor cell of channel c the index (c, i, j), flattened. `group`
    consecutive indices belong together; as long as a group is a box of c, i and j, views say which without a copy.
    """

    def __init__(self, fine_channels: int, coarse_channels: int, factor: int) -> None:
        super().__init__()
        group, rest = divmod(fine_channels * factor**2, coarse_channels)
        columns = min(group, factor)
        rows = min(group // max(columns, 1), factor)
        self.box = (group // max(rows * columns, 1), rows, columns)
        if rest or group != self.box[0] * rows * columns or factor % max(rows, 1) or factor % max(columns, 1):
            name = type(self).__name__
            raise ValueError(
                f"{name}: {coarse_channels} channels do not go with {fine_channels} times {factor}^2 pixels"
            )
        self.fine_channels, self.coarse_channels, self.factor = fine_channels, coarse_channels, factor

    def extra_repr(self) -> str:
        return f"{self.fine_channels}, {self.coarse_channels}, factor={self.factor}"


class AverageShortcut(_Shortcut):
    """Pixel unshuffling by `factor`, then the mean of each group of consecutive channels."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        f, (channels, rows, columns) = self.factor, self.box
        cells = x.reshape(
            batch,
            self.fine_channels // channels,
            channels,
            height // f,
            f // rows,
            rows,
            width // f,
            f // columns,
            columns,
        )
        return cells.mean((2, 5, 8)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class RepeatShortcut(_Shortcut):
    """Each channel repeated, then pixel shuffling by `factor`: the transpose of `AverageShortcut`, times the group."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__(out_channels, in_channels, factor)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        f, (channels, rows, columns) = self.factor, self.box
        cells = x.reshape(batch, self.fine_channels // channels, f // rows, f // columns, height, width).permute(
            0, 1, 4, 2, 5, 3
        )
        cells = cells[:, :, None, :, :, None, :, :, None]  # [B, C / channels, 1, H, f / rows, 1, W, f / columns, 1]
        cells = cells.expand(-1, -1, channels, -1, -1, rows, -1, -1, columns)
        return cells.reshape(batch, self.fine_channels, height * f, width * f)
