"""SAM's mask decoder: image embedding and prompt embeddings to masks and their predicted IoU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ...nn.conv import LayerNorm2d
from .prompt_encoder import NORM_EPS
from .transformer import TwoWayTransformer


class MLP(nn.Module):
    """Linear layers with ReLU between them; keys `layers.{i}`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)  # type: ignore[no-any-return]


class MaskDecoder(nn.Module):
    """One mask (for prompts without ambiguity) or `multimask_outputs` masks per prompt, with predicted IoU.

    Tokens [iou | one per mask | sparse] and the image pass through a two-way transformer; the image is enlarged 4 times
    by transposed convolutions; mask_i = hypernetwork_i(token_i) . enlarged image.

    Source: Kirillov et al., "Segment Anything" (ICCV 2023), appendix A.
    """

    def __init__(self, dim: int = 256, multimask_outputs: int = 3, iou_hidden: int = 256) -> None:
        super().__init__()
        masks = multimask_outputs + 1
        self.num_mask_tokens = masks
        self.transformer = TwoWayTransformer(dim=dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4, eps=NORM_EPS),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP((dim, dim, dim, dim // 8)) for _ in range(masks))
        self.iou_prediction_head = MLP((dim, iou_hidden, iou_hidden, masks))

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decodes B prompts.

        Args:
            image_embeddings: [1 or B, C, H, W]; one image serves all prompts.
            image_pe: [1, C, H, W], `PromptEncoder.get_dense_pe()`.
            sparse_prompt_embeddings: [B, T, C]. dense_prompt_embeddings: [B, C, H, W].
            multimask_output: masks 1 to 3 if true, else mask 0.

        Returns:
            logits [B, 3 or 1, 4H, 4W], predicted IoU [B, 3 or 1].

        Raises:
            ValueError: shapes other than these.
        """
        self._check(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        batch = sparse_prompt_embeddings.shape[0]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse_prompt_embeddings], dim=1)
        if batch > 0 and dense_prompt_embeddings.stride(0) == 0:
            # The same for every prompt (no mask given): the first layer projects the image once, not once per prompt,
            # which saves a quarter of the time of 64 points (5.0 s of 7.0 s, one CPU thread).
            dense_prompt_embeddings = dense_prompt_embeddings[:1]
        image = (image_embeddings + dense_prompt_embeddings).flatten(2).mT  # [1 or B, N, C]
        tokens, image = self.transformer(tokens, image, image_pe.flatten(2).mT)
        image = image.mT.unflatten(2, image_embeddings.shape[2:])
        wanted = slice(1, None) if multimask_output else slice(0, 1)
        # All hypernetworks, so that in training each parameter has a gradient, be it zero.
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        enlarged = self.output_upscaling(image)
        masks = (hyper[:, wanted] @ enlarged.flatten(2)).unflatten(2, enlarged.shape[2:])
        return masks, self.iou_prediction_head(tokens[:, 0])[:, wanted]

    def _check(self, image: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> None:
        channels = self.iou_token.embedding_dim
        if image.dim() != 4 or image.shape[1] != channels:
            raise ValueError(f"MaskDecoder: image_embeddings must be [B, {channels}, H, W], got {list(image.shape)}")
        if sparse.dim() != 3 or sparse.shape[2] != channels:
            raise ValueError(
                f"MaskDecoder: sparse_prompt_embeddings must be [B, T, {channels}], got {list(sparse.shape)}"
            )
        batch, size = sparse.shape[0], list(image.shape[1:])
        if image.shape[0] not in (1, batch):
            raise ValueError(f"MaskDecoder: image_embeddings must be of batch 1 or {batch}, got {image.shape[0]}")
        if list(image_pe.shape) != [1, *size]:
            raise ValueError(f"MaskDecoder: image_pe must be {[1, *size]}, got {list(image_pe.shape)}")
        if list(dense.shape) != [batch, *size]:
            raise ValueError(f"MaskDecoder: dense_prompt_embeddings must be {[batch, *size]}, got {list(dense.shape)}")
