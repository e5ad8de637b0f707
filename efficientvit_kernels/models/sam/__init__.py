"""Segment Anything on EfficientViT image encoders: models and predictor."""

from .build import create_sam as create_sam
from .model import EfficientViTSam as EfficientViTSam
from .predictor import SamPredictor as SamPredictor

__all__ = ["EfficientViTSam", "SamPredictor", "create_sam"]
