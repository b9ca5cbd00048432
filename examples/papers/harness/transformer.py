"""A small decoder: normalisation before attention and before a layer of four times the width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Block(nn.Module):
    """Attention to what came before, and two linear layers, each beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in
                 (self.query, self.key, self.value))  # fmt: skip
        met = scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(met.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits (N, length, symbols) of numbers (N, length)."""

    def __init__(self, symbols: int, length: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, codes: Tensor) -> Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.symbol(codes) + self.place(places))))
