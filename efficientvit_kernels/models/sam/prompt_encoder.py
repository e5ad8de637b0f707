"""SAM's prompt encoder: points, boxes and masks to embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn.conv import LayerNorm2d

NORM_EPS = 1e-6  # of SAM's channel norms


class RandomFourierEncoding(nn.Module):
    """Position p = (x, y) in [0, 1] -> [sin(2 pi c G), cos(2 pi c G)], c = 2 p - 1, with a fixed random G [2, C / 2].

    G and the arithmetic stay in float32 where the model is cast to 16 bits: G multiplies angles of many turns, which 16
    bits cannot hold. In float64 the encoding is computed in float64.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomFourierEncoding:
        before = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.positional_encoding_gaussian_matrix
        if after.dtype in (torch.float16, torch.bfloat16) and before.dtype == torch.float32:
            self.positional_encoding_gaussian_matrix = before.to(after.device)
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: equal shapes [...] -> [..., 2 * features], in float32 or float64 as G is."""
        matrix = self.positional_encoding_gaussian_matrix
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        x, y = (2 * position.to(matrix.dtype).unsqueeze(-1) - 1 for position in (x, y))
        # Not a matrix product: autocast would compute one in 16 bits.
        angle = 2 * math.pi * (x * matrix[0] + y * matrix[1])
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Sparse embeddings of points and boxes, dense embeddings of masks.

    Args:
        embed_dim: channels of the embeddings.
        embedding_size: rows and columns of the image embedding.
        frame: height and width of the frame of the coordinates (1024 x 1024 for every model).
        mask_channels: hidden channels of the mask branch; a mask has 4 times the embedding's rows and columns.

    Source: Kirillov et al., "Segment Anything" (ICCV 2023), appendix A.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        embedding_size: tuple[int, int] = (64, 64),
        frame: tuple[int, int] = (1024, 1024),
        mask_channels: int = 16,
    ) -> None:
        super().__init__()
        self.embed_dim, self.embedding_size, self.frame = embed_dim, embedding_size, frame
        self.mask_size = (4 * embedding_size[0], 4 * embedding_size[1])
        self.pe_layer = RandomFourierEncoding(embed_dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        hidden = mask_channels // 4
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, hidden, 2, stride=2),
            LayerNorm2d(hidden, eps=NORM_EPS),
            nn.GELU(),
            nn.Conv2d(hidden, mask_channels, 2, stride=2),
            LayerNorm2d(mask_channels, eps=NORM_EPS),
            nn.GELU(),
            nn.Conv2d(mask_channels, embed_dim, 1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.no_mask_embed.weight.dtype

    def get_dense_pe(self) -> Tensor:
        """[1, embed_dim, rows, columns]: encoding of the centres of the image embedding's cells."""
        device = self.no_mask_embed.weight.device
        rows, columns = (
            (torch.arange(count, dtype=torch.float32, device=device) + 0.5) / count for count in self.embedding_size
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return self.pe_layer(x, y).permute(2, 0, 1).unsqueeze(0).to(self.dtype)  # type: ignore[no-any-return]

    def forward(
        self, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeds B prompts; all given parts describe the same B objects.

        Args:
            points: coordinates (x, y) [B, N, 2] in pixels of the frame, and labels [B, N]: 1 on the object, 0 off it,
                -1 padding, 2 and 3 the top-left and bottom-right corner of a box.
            boxes: (x0, y0, x1, y1) [B, 4] in pixels of the frame.
            masks: logits [B, 1, 256, 256] (4 times the embedding's rows and columns).

        Returns:
            sparse [B, T, embed_dim], T = N + 1 (points alone, with a padding point) or N + 2 (with a box; N may be 0);
            dense [B, embed_dim, rows, columns]; without masks one embedding for all, expanded. B = 1 without prompts.

        Raises:
            ValueError: a shape other than these, or parts of different B.
        """
        batch = self._check(points, boxes, masks)
        weight = self.no_mask_embed.weight
        sparse = weight.new_empty(batch, 0, self.embed_dim)
        if points is not None:
            sparse = torch.cat([sparse, self._embed_points(*points, pad=boxes is None)], dim=1)
        if boxes is not None:
            corners = boxes.new_tensor([2, 3]).expand(batch, 2)
            sparse = torch.cat([sparse, self._embed_points(boxes.reshape(batch, 2, 2), corners, pad=False)], dim=1)
        if masks is not None:
            return sparse, self.mask_downscaling(masks.to(weight.dtype))
        return sparse, weight.reshape(1, -1, 1, 1).expand(batch, -1, *self.embedding_size)

    def _embed_points(self, coords: Tensor, labels: Tensor, pad: bool) -> Tensor:
        coords = coords.to(torch.promote_types(coords.dtype, torch.float32)) + 0.5  # centres of pixels
        if pad:
            coords = torch.cat([coords, torch.zeros_like(coords[:, :1])], dim=1)
            labels = torch.cat([labels, torch.full_like(labels[:, :1], -1)], dim=1)
        labels = labels.unsqueeze(-1)
        encoded = self.pe_layer(coords[..., 0] / self.frame[1], coords[..., 1] / self.frame[0]).to(self.dtype)
        encoded = torch.where(labels == -1, self.not_a_point_embed.weight, encoded)
        for label, embedding in enumerate(self.point_embeddings.parameters()):
            encoded = torch.where(labels == label, encoded + embedding, encoded)
        return encoded

    def _check(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None) -> int:
        batches = {}
        if points is not None:
            coords, labels = points
            if coords.dim() != 3 or coords.shape[2] != 2 or coords.shape[1] == 0:
                raise ValueError(f"PromptEncoder: points must be [B, N > 0, 2], got {list(coords.shape)}")
            if labels.shape != coords.shape[:2]:
                expected = f"{list(coords.shape[:2])}, one for each point"
                raise ValueError(f"PromptEncoder: labels must be {expected}, got {list(labels.shape)}")
            batches["points"] = coords.shape[0]
        if boxes is not None:
            if boxes.dim() != 2 or boxes.shape[1] != 4:
                raise ValueError(f"PromptEncoder: boxes must be [B, 4], got {list(boxes.shape)}")
            batches["boxes"] = boxes.shape[0]
        if masks is not None:
            if masks.dim() != 4 or masks.shape[1:] != (1, *self.mask_size):
                rows, columns = self.mask_size
                raise ValueError(f"PromptEncoder: masks must be [B, 1, {rows}, {columns}], got {list(masks.shape)}")
            batches["masks"] = masks.shape[0]
        if len(set(batches.values())) > 1:
            raise ValueError(f"PromptEncoder: points, boxes and masks must be of one batch size, got {batches}")
        return next(iter(batches.values()), 1)
