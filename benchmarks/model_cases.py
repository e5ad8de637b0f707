"""The whole models that are measured, and how one is made: seeded weights, norms that fit its activations."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.providers import LAYOUTS, Dims, Settings, random_tensors
from efficientvit_kernels.models import create_model
from efficientvit_kernels.nn import FusedLiteMLA, LiteMLA
from efficientvit_kernels.verify import calibrate_batch_norms


@dataclass(frozen=True)
class ModelCase:
    """A model of `list_models()`, or its submodule `part`, on B images [B, 3, H, W]."""

    name: str
    model: str
    height: int
    width: int
    batch: int = 1
    part: str = ""
    seconds: float = 2.0  # of eager calls that are worth their time; see `rounds_of`

    @property
    def dims(self) -> Dims:
        return (self.batch, 3, self.height, self.width)


SEG_B1, SAM, DC_AE = "efficientvit-seg-b1-cityscapes", "efficientvit-sam-{}", "dc-ae-f32c32-{}-1.0"

CPU_CASES = (
    ModelCase("b1-224", "efficientvit-b1", 224, 224),
    ModelCase("b3-224", "efficientvit-b3", 224, 224),
    ModelCase("l2-224", "efficientvit-l2", 224, 224),
    ModelCase("seg-b1-512x1024", SEG_B1, 512, 1024),
    ModelCase("sam-l0-encoder-512", SAM.format("l0"), 512, 512, part="image_encoder", seconds=5.0),
)

# Of Segment Anything the side is the one that the official model gives to its encoder.
GPU_CASES = (
    *CPU_CASES[:3],
    *(replace(case, name=f"{case.name} x64", batch=64) for case in CPU_CASES[:3]),
    *(
        ModelCase(f"seg-{size}-1024x2048", f"efficientvit-seg-{size}-cityscapes", 1024, 2048)
        for size in ("b0", "b1", "b2", "b3", "l1", "l2")
    ),
    *(
        ModelCase(f"sam-{size}-encoder-{side}", SAM.format(size), side, side, part="image_encoder")
        for size, side in (("l0", 512), ("l1", 512), ("l2", 512), ("xl0", 1024), ("xl1", 1024))
    ),
    *(
        ModelCase(f"dc-ae-{kind}-{side}", DC_AE.format(kind), side, side)
        for kind in ("in", "sana")
        for side in (512, 1024)
    ),
)
CASES = {"cpu": CPU_CASES, "cuda": GPU_CASES}


def make_reference(case: ModelCase, settings: Settings) -> nn.Module:
    """The model in plain torch: torch's initialisation from seed 0, the norms' statistics those of a random batch.

    With untrained statistics activations shrink or grow from layer to layer until no two results can be compared.
    """
    torch.manual_seed(0)
    model: nn.Module = create_model(case.model, attention="reference")
    model = model.get_submodule(case.part).eval()
    (x,) = random_tensors([case.dims], torch.float32, settings.layout, 0)
    calibrate_batch_norms(model.to(memory_format=LAYOUTS[settings.layout]), x)
    return model.to(settings.dtype)


def fused_copy(model: nn.Module) -> nn.Module:
    """A copy whose every LiteMLA runs on the kernels, as `create_model(..., attention="fused")` makes it."""
    fused = copy.deepcopy(model)
    for path in lite_mla_paths(fused):
        parent, _, name = path.rpartition(".")
        setattr(fused.get_submodule(parent), name, FusedLiteMLA.from_module(fused.get_submodule(path)))
    return fused


def lite_mla_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, LiteMLA)]
