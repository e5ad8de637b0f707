"""Segment Anything on an EfficientViT image encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_encoder import SamImageEncoder
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .transforms import restore_masks

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class EfficientViTSam(nn.Module):
    """Image encoder, prompt encoder and mask decoder; `create_sam` builds the official ones.

    `image_size` = (side of the square frame of prompts and masks, side of the encoder's square input). For use on
    images see `SamPredictor` and `SamAutomaticMaskGenerator`; `forward` is for training.
    """

    mask_threshold = 0.0
    image_format = "RGB"

    def __init__(
        self,
        image_encoder: SamImageEncoder,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        image_size: tuple[int, int] = (1024, 512),
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.image_size = image_size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def preprocess(self, image: Tensor) -> Tensor:
        """RGB values 0 to 255 [..., 3, h, w] of any dtype, h and w at most S -> normalised [..., 3, S, S].

        S = image_size[1]. Rows and columns are added below and to the right, with 0 after normalisation. Computed in
        float32, in the model's dtype and on its device at the end.
        """
        side = self.image_size[1]
        if image.dim() < 3 or image.shape[-3] != 3 or max(image.shape[-2:]) > side:
            raise ValueError(
                f"EfficientViTSam.preprocess: image must be [..., 3, h <= {side}, w <= {side}], got {list(image.shape)}"
            )
        image = image.to(self.device, torch.promote_types(self.dtype, torch.float32))
        mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        height, width = image.shape[-2:]
        return F.pad((image - mean) / std, (0, side - width, 0, side - height)).to(self.dtype)

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
        """Low-resolution logits [B, M, 256, 256] -> logits [B, M, *original_size].

        `input_size`: size of the image in the frame of the prompts, `resized_size(*original_size, image_size[0])`.
        """
        return restore_masks(masks, self.image_size[0], input_size, original_size)

    def decode(
        self,
        image_embedding: Tensor,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits [B, M, 256, 256] and predicted IoU [B, M] of B prompts on one image [1, C, 64, 64]."""
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        image_pe = self.prompt_encoder.get_dense_pe()
        return self.mask_decoder(image_embedding, image_pe, sparse, dense, multimask_output)  # type: ignore[no-any-return]

    def forward(
        self, batched_input: Sequence[dict[str, Tensor]], multimask_output: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Masks of P prompts on each of B images.

        Args:
            batched_input: one dict per image: "image", preprocessed [3, H, W]; optional "point_coords" [P, N, 2] with
                "point_labels" [P, N]; "boxes" [P, 4]; "mask_inputs" [P, 1, 256, 256]. Coordinates in the frame.
            multimask_output: M = 3 masks per prompt if true, else 1.

        Returns:
            low-resolution logits [B, P, M, 256, 256], predicted IoU [B, P, M].

        Raises:
            ValueError: no images, points without labels or labels without points, unequal P.
        """
        if len(batched_input) == 0:
            raise ValueError("EfficientViTSam: batched_input must be at least one image, got none")
        for record in batched_input:
            if ("point_coords" in record) != ("point_labels" in record):
                raise ValueError(
                    f"EfficientViTSam: point_coords and point_labels must be given together, got {sorted(record)}"
                )
        embeddings = self.image_encoder(torch.stack([record["image"] for record in batched_input]))
        masks, ious = [], []
        for record, embedding in zip(batched_input, embeddings, strict=True):
            points = (record["point_coords"], record["point_labels"]) if "point_coords" in record else None
            outputs = self.decode(
                embedding.unsqueeze(0), points, record.get("boxes"), record.get("mask_inputs"), multimask_output
            )
            masks.append(outputs[0])
            ious.append(outputs[1])
        counts = [len(mask) for mask in masks]
        if len(set(counts)) > 1:
            raise ValueError(f"EfficientViTSam: batched_input must have equally many prompts per image, got {counts}")
        return torch.stack(masks), torch.stack(ious)
