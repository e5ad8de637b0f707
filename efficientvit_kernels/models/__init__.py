"""The EfficientViT family: backbones and models with the official names, keys and numbers."""
