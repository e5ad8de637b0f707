"""The shapes that are measured: the layers of the official models that hold a LiteMLA, and the sets made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One LiteMLA layer on one input: B images of C channels and H x W pixels, head dimension D, aggregation kernels.

    Models that share a layer's shape share an entry, and are all named in it.
    """

    name: str
    batch: int
    channels: int
    dim: int
    height: int
    width: int
    scales: tuple[int, ...] = (5,)

    @property
    def heads(self) -> int:
        return self.channels // self.dim

    @property
    def groups(self) -> int:
        """Heads of all scales, the identity among them."""
        return self.heads * (1 + len(self.scales))

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def geometry(self) -> tuple[object, ...]:
        return (self.batch, self.channels, self.dim, self.height, self.width, self.scales)

    def __str__(self) -> str:
        return f"{self.name} [{self.batch}, {self.channels}, {self.height}, {self.width}]"


# The five layers that the CPU goals are stated for.
CASES = (
    Shape("c128d16_56x56", 1, 128, 16, 56, 56),
    Shape("c256d32_64x64", 1, 256, 32, 64, 64),
    Shape("c256d32_64x128", 1, 256, 32, 64, 128),
    Shape("c512d32_32x64", 1, 512, 32, 32, 64),
    Shape("c512d32_14x14", 1, 512, 32, 14, 14),
)

# Classification at 224, ADE20K at 512, Cityscapes at half and full size. Stage 3 has stride 16, stage 4 stride 32.
B_AND_L_SERIES = (
    Shape("b0-224-stage3", 1, 64, 16, 14, 14),
    Shape("b0-224-stage4", 1, 128, 16, 7, 7),
    Shape("b1-224-stage3", 1, 128, 16, 14, 14),
    Shape("b1-224-stage4", 1, 256, 16, 7, 7),
    Shape("b2-224-stage3", 1, 192, 32, 14, 14),
    Shape("b2-224-stage4", 1, 384, 32, 7, 7),
    Shape("b3-224-stage3", 1, 256, 32, 14, 14),
    Shape("b3+l1+l2-224-stage4", 1, 512, 32, 7, 7),
    Shape("l3-224-stage4", 1, 1024, 32, 7, 7),
    Shape("b0-512-stage3", 1, 64, 16, 32, 32),
    Shape("b0-512-stage4", 1, 128, 16, 16, 16),
    Shape("b1-512-stage3", 1, 128, 16, 32, 32),
    Shape("b1-512-stage4", 1, 256, 16, 16, 16),
    Shape("b2-512-stage3", 1, 192, 32, 32, 32),
    Shape("b2-512-stage4", 1, 384, 32, 16, 16),
    Shape("b3-512-stage3", 1, 256, 32, 32, 32),
    Shape("b3+l1+l2+sam_l-512-stage4", 1, 512, 32, 16, 16),
    Shape("b1-512x1024-stage3", 1, 128, 16, 32, 64),
    Shape("b1-512x1024-stage4", 1, 256, 16, 16, 32),
    Shape("b3-512x1024-stage3", 1, 256, 32, 32, 64),
    Shape("b3+l1+l2-512x1024-stage4", 1, 512, 32, 16, 32),
    Shape("b0-1024x2048-stage3", 1, 64, 16, 64, 128),
    Shape("b1-1024x2048-stage3", 1, 128, 16, 64, 128),
    Shape("b1-1024x2048-stage4", 1, 256, 16, 32, 64),
    Shape("b2-1024x2048-stage3", 1, 192, 32, 64, 128),
    Shape("b3-1024x2048-stage3", 1, 256, 32, 64, 128),
    Shape("b3+l1+l2-1024x2048-stage4", 1, 512, 32, 32, 64),
)

# The XL encoders aggregate over 3 x 3; their stage 5 has stride 64.
SAM_ENCODERS = (
    Shape("sam_l0+l1+l2-1024-stage4", 1, 512, 32, 32, 32),
    Shape("sam_xl0+xl1-512-stage4", 1, 512, 32, 16, 16, (3,)),
    Shape("sam_xl0+xl1-512-stage5", 1, 1024, 32, 8, 8, (3,)),
    Shape("sam_xl0+xl1-1024-stage4", 1, 512, 32, 32, 32, (3,)),
    Shape("sam_xl0+xl1-1024-stage5", 1, 1024, 32, 16, 16, (3,)),
)

# Autoencoders on 512 x 512 images, f32 and f64 without aggregation, that of SANA with; the diffusion transformer's
# width at 512 x 512 (16 x 16 latent pixels) and 1024 x 1024.
AUTOENCODERS = (
    Shape("dc_ae_f32-512-stage3", 1, 512, 32, 64, 64, ()),
    Shape("dc_ae_f32-512-stage4", 1, 1024, 32, 32, 32, ()),
    Shape("dc_ae_f32-512-stage5", 1, 1024, 32, 16, 16, ()),
    Shape("dc_ae_f64-512-stage6", 1, 2048, 32, 8, 8, ()),
    Shape("dc_ae_sana-512-stage3", 1, 512, 32, 64, 64),
    Shape("dc_ae_sana-512-stage5", 1, 1024, 32, 16, 16),
    Shape("sana-512", 1, 1152, 32, 16, 16, ()),
    Shape("sana-1024", 1, 1152, 32, 32, 32, ()),
)

BATCHES = (
    Shape("b1-224-stage3 x8", 8, 128, 16, 14, 14),
    Shape("b1-224-stage4 x8", 8, 256, 16, 7, 7),
    Shape("b1-512-stage3 x8", 8, 128, 16, 32, 32),
    Shape("b3-224-stage3 x8", 8, 256, 32, 14, 14),
    Shape("b3+l1+l2-224-stage4 x8", 8, 512, 32, 7, 7),
)

REGISTRY = (*B_AND_L_SERIES, *SAM_ENCODERS, *AUTOENCODERS, *BATCHES)

SMOKE = (Shape("smoke", 2, 32, 16, 9, 11), Shape("smoke-no-aggregation", 1, 32, 8, 6, 5, ()))


def _named(names: Iterable[str]) -> tuple[Shape, ...]:
    by_name = {shape.name: shape for shape in REGISTRY}
    return tuple(by_name[name] for name in names)


SINGLE_OPS = _named(
    (
        "b1-224-stage3",
        "b1-224-stage4",
        "b1-512-stage3",
        "b3-1024x2048-stage3",
        "b3+l1+l2-224-stage4",
        "sam_l0+l1+l2-1024-stage4",
    )
)


def batched(name: str, batch: int) -> Shape:
    """The layer of the registry with another number of images."""
    (shape,) = _named((name,))
    return replace(shape, name=f"{name} x{batch}", batch=batch)


# What a GPU measures first: launch-bound, memory-bound and compute-bound layers of each family.
GPU_FIRST = (
    *_named(("b3-512-stage3", "b1-224-stage3", "sam_l0+l1+l2-1024-stage4", "b3-1024x2048-stage3")),
    batched("b3-224-stage3", 64),
    batched("b3-512-stage3", 8),
    batched("b1-224-stage3", 64),
    batched("b3+l1+l2+sam_l-512-stage4", 16),
    batched("dc_ae_sana-512-stage3", 16),
    batched("sana-1024", 16),
    *_named(("b1-1024x2048-stage3", "b3+l1+l2-1024x2048-stage4", "b3-224-stage3", "b3+l1+l2-224-stage4")),
    batched("b1-224-stage3", 256),
    batched("b3-224-stage3", 256),
    batched("b3+l1+l2-224-stage4", 64),
    batched("b3-1024x2048-stage3", 8),
    batched("sam_xl0+xl1-1024-stage4", 16),
    batched("dc_ae_f32-512-stage3", 16),
)
GPU_REST = tuple(shape for shape in REGISTRY if shape not in GPU_FIRST)

# name of the set -> which op on which shapes
SETS: dict[str, tuple[tuple[str, tuple[Shape, ...]], ...]] = {
    "cases": (("lite_mla", CASES),),
    "registry": (("lite_mla", REGISTRY),),
    "ops": (("relu_linear_attention", SINGLE_OPS), ("multiscale_aggregate", SINGLE_OPS)),
    "smoke": (
        ("relu_linear_attention", SMOKE),
        ("multiscale_aggregate", SMOKE[:1]),
        ("lite_mla", SMOKE),
    ),
}
