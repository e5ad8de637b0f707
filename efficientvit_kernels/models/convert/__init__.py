"""State dicts of other libraries' EfficientViT models to the official key names, and back.

    load_weights(model, "timm_weights.safetensors", convert=timm_to_official)

The converters take and give plain dictionaries and need neither library. Tensors are shared where no values move.
"""

from __future__ import annotations

from .diffusers import diffusers_to_official, official_to_diffusers
from .timm import official_to_timm, timm_to_official

__all__ = ["diffusers_to_official", "official_to_diffusers", "official_to_timm", "timm_to_official"]
