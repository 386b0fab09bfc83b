"""The SigLIP 2 vision transformer for pictures of any aspect, and how a picture becomes its patches.

The number of patches is fixed and their grid is a value, not a shape: a picture of another aspect is another
grid in the same graph. What resizes (pictures, position embeddings) is a product with interpolation weights
that are computed from the sizes.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_export.families.hunyuan.config import VisionConfig
from hywu_export.families.hunyuan.rotary import divide


def interpolation(position: Tensor, target: Tensor, length: int) -> Tensor:
    """Weights ``[n, length]`` of antialiased bilinear resizing, as Pillow and torch do it.

    Args:
        position: which pixels of the resized side, ``[n]``.
        target: the resized side's length, a scalar; float32 both.
        length: of the side that is resized.
    """
    scale = length / target
    stretch = scale.clamp(min=1.0)
    distance = torch.arange(length, dtype=torch.float32) + 0.5 - ((position + 0.5) * scale).unsqueeze(-1)
    weights = (1.0 - (distance / stretch).abs()).clamp(min=0.0)
    return weights / weights.sum(-1, keepdim=True)


def grid_cells(grid: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of tokens ``0 … count`` of a row-major ``grid`` ``[2]`` (int64), and which are
    within."""
    index = torch.arange(count)
    row = divide(index, grid[1])
    return row, index - row * grid[1], index < grid[0] * grid[1]


class Patches(nn.Module):
    """Pixels to patches: ``uint8 [B, H, W, 3]`` to ``float32 [B, max_num_patches, features]`` and their grid.

    The grid is looked up by the picture's size in units of ``multiple`` pixels: the largest that the number
    of patches allows. Patches beyond the grid are zeros.
    """

    grids: Tensor

    def __init__(self, config: VisionConfig, multiple: int, longest: int):
        super().__init__()
        self.count, self.patch, self.multiple = config.max_num_patches, config.patch_size, multiple
        sizes = range(multiple, longest + 1, multiple)
        table = [[patch_grid(h, w, self.patch, self.count) for w in sizes] for h in sizes]
        # int32: TensorRT computes with it, and a long table of int64 is refused.
        self.register_buffer("grids", torch.tensor(table, dtype=torch.int32), persistent=False)
        self.side = max(max(max(cell) for cell in row) for row in table)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, width, channels = image.shape
        # Sizes as values: there is no other way to look one up in a graph.
        rows, columns = (divide(torch.arange(side)[-1:], self.multiple) for side in (height, width))
        steps = self.grids.shape[1]
        grid = F.embedding(rows * steps + columns, self.grids.flatten(0, 1))[0].to(torch.int64)
        pixels = torch.arange(self.side * self.patch, dtype=torch.float32)
        sides = (grid * self.patch).to(torch.float32)
        across = interpolation(pixels, sides[1], width)
        down = interpolation(pixels, sides[0], height)
        x = image.to(torch.float32).permute(0, 3, 1, 2)
        x = (down @ (x @ across.T)).round().clamp(0, 255) / 127.5 - 1.0
        x = x.reshape(batch, channels, self.side, self.patch, self.side, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, self.side * self.side, -1)
        row, column, within = grid_cells(grid, self.count)
        chosen = x.index_select(1, torch.where(within, row * self.side + column, torch.zeros_like(row)))
        return chosen * within.to(torch.float32)[:, None], grid


@cache
def patch_grid(height: int, width: int, patch: int, count: int) -> tuple[int, int]:
    """Rows and columns of the patches of a picture: the largest grid of at most ``count`` that the picture
    fills when scaled, each side rounded up to whole patches. The search is that of SigLIP 2's processor,
    whose steps decide in close cases."""
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = _cells(height, middle, patch), _cells(width, middle, patch)
        low, high = (middle, high) if rows * columns <= count else (low, middle)
    return _cells(height, low, patch), _cells(width, low, patch)


def _cells(side: int, scale: float, patch: int) -> int:
    return max(1, math.ceil(side * scale / patch))


class Embeddings(nn.Module):
    """A Linear for the patches, and position embeddings resized from a square to the grid."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.side = math.isqrt(config.num_patches)
        self.patch_embedding = nn.Linear(config.patch_features, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        row, column, within = grid_cells(grid, patches.shape[1])
        sides = grid.to(torch.float32)
        # Beyond the grid, the first position's.
        down = interpolation((row * within).to(torch.float32), sides[0], self.side)
        across = interpolation((column * within).to(torch.float32), sides[1], self.side)
        weights = (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)
        embedded: Tensor = self.patch_embedding(patches)
        return embedded + weights @ self.position_embedding.weight


class VisionAttention(nn.Module):
    """Multi-head attention; patches beyond the grid are no keys."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class VisionMLP(nn.Module):
    """Two Linears with a GELU (tanh form) between."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionLayer(nn.Module):
    """Two pre-norm residual branches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """Patches ``[B, count, features]`` and their grid ``[2]`` to features ``[B, count, hidden]``."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        x = self.embeddings(patches, grid)
        mask = grid_cells(grid, patches.shape[1])[2][None, None, None]
        for layer in self.encoder.layers:
            x = layer(x, mask)
        out: Tensor = self.post_layernorm(x)
        return out
