"""diffusers' AutoencoderDC of the shape of one of our configurations."""

from __future__ import annotations

from typing import Any

from efficientvit_kernels.models.dc_ae import DCAEConfig


def autoencoder_dc_arguments(config: DCAEConfig) -> dict[str, Any]:
    """The constructor arguments of diffusers (0.42.1) for `config`."""
    stages = len(config.widths)
    attention = [stage >= config.residual_stages for stage in range(stages)]
    blocks = tuple("EfficientViTBlock" if attends else "ResBlock" for attends in attention)
    scales = tuple(config.scales if attends else () for attends in attention)
    norm = {"bn2d": "batch_norm", "trms2d": "rms_norm"}[config.decoder_norm]
    return {
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": config.widths,
        "decoder_block_out_channels": config.widths,
        "encoder_layers_per_block": config.encoder_depths,
        "decoder_layers_per_block": config.decoder_depths,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": "pixel_shuffle" if config.pixel_shuffle else "interpolate",
        "downsample_block_type": "pixel_unshuffle" if config.pixel_shuffle else "conv",
        "decoder_norm_types": tuple("rms_norm" if attends else norm for attends in attention),
        "decoder_act_fns": tuple("silu" if attends else config.decoder_act for attends in attention),
    }
