"""What the official trainers do to a model before training: initialisation and stochastic depth."""

from __future__ import annotations

from torch import nn

from .blocks import ResidualBlock

WEIGHTED = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def identity_residuals(model: nn.Module) -> list[ResidualBlock]:
    """The blocks that compute main(x) + x, in the order of the model."""
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    return [block for block in blocks if block.main is not None and isinstance(block.shortcut, nn.Identity)]


def apply_drop_path(model: nn.Module, p: float, progress: float = 1.0) -> None:
    """Sets stochastic depth: of n blocks main(x) + x, the i-th (from 1) drops its main with p * progress * i / n.

    It acts in training mode only; parameters and keys stay. The official trainers raise `progress` from 0 to 1 over the
    run, which is a new call at each epoch, with p 0.05 or 0.1. 0 turns it off.

    Raises: ValueError unless 0 <= p < 1 and 0 <= progress <= 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"apply_drop_path: p must be in [0, 1), got {p}")
    if not 0 <= progress <= 1:
        raise ValueError(f"apply_drop_path: progress must be in [0, 1], got {progress}")
    blocks = identity_residuals(model)
    for i, block in enumerate(blocks):
        block.drop_path = p * progress * (i + 1) / len(blocks)


def init_weights(model: nn.Module, std: float = 0.02, zero_last_gamma: bool = False) -> None:
    """Weights of convolutions, linear layers and embeddings normal with `std`, cut at +-2; norms' 1; all biases 0.

    zero_last_gamma: the last norm of each block main(x) + x gets weight 0, so that the block starts as the identity.
    """
    for module in model.modules():
        if isinstance(module, WEIGHTED):
            nn.init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, NORMS) and module.weight is not None:
            nn.init.ones_(module.weight)
        else:
            continue
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
    if zero_last_gamma:
        for block in identity_residuals(model):
            norms = [module for module in block.modules() if isinstance(module, NORMS)]
            if norms:
                nn.init.zeros_(norms[-1].weight)
