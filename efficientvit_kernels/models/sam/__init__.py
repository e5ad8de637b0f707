"""Segment Anything on EfficientViT image encoders."""

from .build import create_sam as create_sam
from .model import EfficientViTSam as EfficientViTSam

__all__ = ["EfficientViTSam", "create_sam"]
