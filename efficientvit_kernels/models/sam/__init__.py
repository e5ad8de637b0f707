"""Segment Anything on EfficientViT image encoders: models, predictor, automatic mask generator."""

from .build import create_sam as create_sam
from .mask_generator import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
from .model import EfficientViTSam as EfficientViTSam
from .predictor import SamPredictor as SamPredictor

__all__ = ["EfficientViTSam", "SamAutomaticMaskGenerator", "SamPredictor", "create_sam"]
