"""The two-way transformer of SAM's mask decoder: tokens attend to the image, the image to the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over `heads` heads of d = inner / heads channels, with projections.

    q [Bq, Nq, C], k and v [Bk, Nk, C] -> [max(Bq, Bk), Nq, C]; a batch of 1 stands for every batch, and its projections
    are computed once.
    """

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        if inner % heads != 0:
            raise ValueError(f"Attention: inner must be a multiple of heads ({heads}), got {inner}")
        self.heads, self.head_dim = heads, inner // heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def _split(self, x: Tensor, batch: int) -> Tensor:  # [B or 1, N, inner] -> [B, heads, N, d]
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2).expand(batch, -1, -1, -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        q, k, v = (self._split(proj(x), batch) for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, Nq, inner]
        return self.out_proj(out)  # type: ignore[no-any-return]


class TokenMLP(nn.Module):
    """lin2(relu(lin1(x)))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.lin1(x).relu())  # type: ignore[no-any-return]


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; a LayerNorm after each.

    The first block's self-attention has neither positional encoding nor residual: its result replaces the tokens.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, heads, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TokenMLP(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, heads, dim // 2)

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_pe
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks, then a last attention from tokens to image.

    tokens [B, T, C]; image and image_pe [B or 1, N, C] -> tokens [B, T, C], image [B, N, C]. The initial tokens are the
    tokens' positional encoding in every block.
    """

    def __init__(self, depth: int = 2, dim: int = 256, heads: int = 8, mlp_dim: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image
