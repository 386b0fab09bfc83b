"""The parameter generator of HY-WU (arXiv 2603.07236): a condition in, low-rank weight deltas out.

Written from the published formulas, in primitive real-valued operations on static or symbolic shapes, so that
``torch.export`` gives a plain graph with a dynamic batch and a dynamic number of condition tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_runtime.errors import InputError

from .checkpoint import CONFIG_FILE, checkpoint_folder, load_weights, meta_module, save_checkpoint
from .config import GeneratorConfig
from .layout import TokenLayout

FOLD_BYTES = 64 << 20
"""What no condition changes is computed at export where its result is at most this large."""
_NORM_EPSILON = 1e-6
_ROTARY_THETA = 10000.0

Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """``w * x / sqrt(mean(x²) + 1e-6)`` over the last axis, in float32 at least."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + _NORM_EPSILON)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_phases(positions: Tensor, dim: int) -> Tensor:
    """Phases ``position * 10000^(-2i/dim)`` of one rotary axis, float32 ``[len(positions), dim // 2]``.

    The reciprocal of the power, not a negative power: the rounding then is that of the published tables.
    """
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    return positions.float()[:, None] * (1.0 / _ROTARY_THETA ** (pairs / dim))


def rotary_table(phases: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosine and sine of ``[length, pairs]`` phases, with an axis for the heads: ``[length, 1, pairs]``."""
    return phases.cos().to(dtype)[:, None], phases.sin().to(dtype)[:, None]


def grid_phases(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Phases of two axes, half of ``dim`` each, over a row-major grid: ``[rows * columns, dim // 2]``."""
    first = rotary_phases(rows, dim // 2)[:, None].expand(-1, len(columns), -1)
    second = rotary_phases(columns, dim // 2)[None].expand(len(rows), -1, -1)
    return torch.cat([first, second], dim=-1).flatten(0, 1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the interleaved pairs of the last axis of ``x`` ``[batch, length, heads, head_dim]``."""
    cos, sin = rotary
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; no mask."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.W_q = nn.Linear(dim, dim)
        self.W_k = nn.Linear(dim, dim)
        self.W_v = nn.Linear(dim, dim)
        self.W_o = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, source: Tensor, rotary_q: Rotary, rotary_k: Rotary, allowed: Tensor | None = None
    ) -> Tensor:
        """Queries from ``x`` ``[batch, n, dim]``, keys and values from ``source`` ``[batch, m, dim]``, of
        which ``allowed`` (boolean ``[batch, 1, 1, m]``) says what may be seen."""
        heads = (-1, self.head_dim)
        query = rotate(self.W_q(x).unflatten(-1, heads), rotary_q).transpose(1, 2)
        key = rotate(self.W_k(source).unflatten(-1, heads), rotary_k).transpose(1, 2)
        value = self.W_v(source).unflatten(-1, heads).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, allowed)
        out: Tensor = self.W_o(attended.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    """Two Linears with SiLU between, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Four pre-norm residual branches on tokens ``[batch, layers, hw, dim]``."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        dim = config.d_model
        self.self_attn_n = Attention(dim, config.head_dim)
        self.self_attn_hw = Attention(dim, config.head_dim)
        self.self_attn_cross = Attention(dim, config.head_dim)
        self.feed_forward = FeedForward(dim)
        self.norm1 = RMSNorm(dim)
        self.norm2 = RMSNorm(dim)
        self.norm3 = RMSNorm(dim)
        self.norm4 = RMSNorm(dim)

    def attend_tokens(self, x: Tensor, rotary_n: Rotary, rotary_hw: Rotary) -> Tensor:
        """The two self-attention branches: over the base layers, then over the tokens of each."""
        columns = self.norm1(x).transpose(1, 2)  # [batch, hw, layers, dim]
        flat = columns.flatten(0, 1)
        attended: Tensor = self.self_attn_n(flat, flat, rotary_n, rotary_n)
        x = x + attended.view(columns.shape).transpose(1, 2)
        flat = self.norm2(x).flatten(0, 1)
        attended = self.self_attn_hw(flat, flat, rotary_hw, rotary_hw)
        return x + attended.view(x.shape)

    def attend_condition(
        self, x: Tensor, condition: Tensor, rotary_q: Rotary, rotary_k: Rotary, allowed: Tensor | None
    ) -> Tensor:
        """The cross-attention branch, all tokens to ``condition`` ``[batch, length, dim]``, and the MLP."""
        queries = self.norm3(x).flatten(1, 2)
        attended: Tensor = self.self_attn_cross(queries, condition, rotary_q, rotary_k, allowed)
        x = x + attended.view(x.shape)
        transformed: Tensor = self.feed_forward(self.norm4(x))
        return x + transformed


class TokenTransformer(nn.Module):
    """The generator without its input Linear; its names are those of the checkpoint under ``model.``."""

    def __init__(self, config: GeneratorConfig, layout: TokenLayout):
        super().__init__()
        chunk = config.d_model // config.dim_accumulation
        self.norm_input = RMSNorm(config.d_model)
        self.norm_tokens = RMSNorm(config.d_model)
        self.norm_final = RMSNorm(config.d_model)
        self.hw_pos = nn.Embedding(layout.t * config.rank, chunk)
        self.layer_pos = nn.Embedding(config.num_base_model_layers, chunk)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_pg_layers))
        self.proj_out_A = nn.Linear(chunk, config.output_dim)
        self.proj_out_B = nn.Linear(chunk, config.output_dim)

    @property
    def typed_blocks(self) -> list[Block]:
        """The blocks, as what they are rather than as plain modules."""
        return cast("list[Block]", list(self.blocks))


class ParameterGenerator(nn.Module):
    """Makes the deltas of every target of every base layer from a condition.

    A fresh generator gives B = 0, so that training starts from the base model as it is.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.layout = TokenLayout(config)
        self.hidden_in = nn.Linear(config.input_dim, config.d_model)
        self.model = TokenTransformer(config, self.layout)
        nn.init.zeros_(self.model.proj_out_B.weight)
        nn.init.zeros_(self.model.proj_out_B.bias)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> ParameterGenerator:
        """Load ``config.json`` and ``model.safetensors`` (or its shards) from the folder ``path``.

        Weights may be stored as float32, float16 or bfloat16; the module's are ``dtype``.

        Raises:
            CheckpointError: the folder or one of its files is missing, damaged or inconsistent.
        """
        config = GeneratorConfig.from_file(checkpoint_folder(path) / CONFIG_FILE)
        return load_weights(path, meta_module(cls, config), dtype)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``, stored as ``dtype``, into the folder ``path``.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        config = {**self.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
        save_checkpoint(path, dict(sorted(config.items())), self, dtype)

    def forward(self, condition: Tensor) -> dict[str, Tensor]:
        """Deltas as the published model returns them.

        Args:
            condition: ``[B, L, input_dim]`` or ``[B, 1, L, input_dim]``, in the dtype of the weights.

        Returns:
            ``<prefix><layer>.<entry>.lora_A`` ``[B, (experts,) rank, in]`` and ``….lora_B``
            ``[B, (experts,) out, rank]``, and ``scale``, the number alpha / rank that B·A is multiplied with.

        Raises:
            InputError: the condition has another shape.
        """
        model = self.model
        outputs = self._generate(condition, model.proj_out_B.weight, model.proj_out_B.bias)
        dtype = next(iter(outputs.values())).dtype
        outputs["scale"] = torch.full((), self.config.scale, dtype=dtype, device=condition.device)
        return outputs

    def deltas(self, condition: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """As `forward`, but alpha / rank is already in B, by way of the Linear that makes B; no ``scale``.

        ``mask``, boolean ``[B, L]``, is false for padding at the end of a condition: the deltas are those of
        the condition without it.
        """
        project, scale = self.model.proj_out_B, self.config.scale
        return self._generate(condition, project.weight * scale, project.bias * scale, mask)

    def fold_condition_independent(self, max_bytes: int = FOLD_BYTES) -> ParameterGenerator:
        """A generator on the same weights in which what no condition changes is computed once, here.

        That is the start tokens and the self-attention branches of the first block. Where their result,
        ``[1, layers, hw, d_model]``, takes more than ``max_bytes``, this returns the generator itself.
        """
        weight = self.model.hw_pos.weight
        elements = self.config.num_base_model_layers * self.layout.hw * self.config.d_model
        return self if elements * weight.element_size() > max_bytes else FoldedGenerator(self)

    def _generate(
        self, condition: Tensor, weight_b: Tensor, bias_b: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        model = self.model
        allowed = None if mask is None else mask[:, None, None]
        source = model.norm_input(self.hidden_in(self._checked(condition)))
        batch, length, _ = source.shape
        rotary_n, rotary_hw = self._token_rotary(source.dtype, source.device)
        rotary_q, rotary_k = self._condition_rotary(length, source.dtype, source.device)

        x = self._first_tokens(batch, rotary_n, rotary_hw)
        for index, block in enumerate(model.typed_blocks):
            if index > 0:
                x = block.attend_tokens(x, rotary_n, rotary_hw)
            x = block.attend_condition(x, source, rotary_q, rotary_k, allowed)
        return self._detokenise(model.norm_final(x), weight_b, bias_b)

    def _checked(self, condition: Tensor) -> Tensor:
        """The condition as ``[B, L, input_dim]``."""
        width = self.config.input_dim
        if condition.dim() == 4 and condition.shape[1] == 1:
            condition = condition.squeeze(1)
        if condition.dim() != 3 or condition.shape[-1] != width:
            raise InputError(
                f"the condition has the shape {list(condition.shape)}",
                f"[batch, length, {width}] or [batch, 1, length, {width}]",
                "check that the condition was made for this generator",
            )
        return condition

    def _first_tokens(self, batch: int, rotary_n: Rotary, rotary_hw: Rotary) -> Tensor:
        """Tokens ``[batch, layers, hw, d_model]`` before the first cross-attention."""
        return self.model.typed_blocks[0].attend_tokens(self._start_tokens(batch), rotary_n, rotary_hw)

    def _start_tokens(self, batch: int) -> Tensor:
        """Query tokens ``[batch, layers, hw, d_model]``: a token's rows lie side by side in its channels.

        For each sample, though they are the same: tokens that depend on no input are constants to an
        optimizer, which then runs the first block when the graph is loaded, and keeps every step of it.
        """
        model, config = self.model, self.config
        rows = model.layer_pos.weight.expand(batch, -1, -1)[:, :, None] + model.hw_pos.weight
        shape = (batch, config.num_base_model_layers, self.layout.hw, config.d_model)
        tokens: Tensor = model.norm_tokens(rows.reshape(shape))
        return tokens

    def _token_rotary(self, dtype: torch.dtype, device: torch.device) -> tuple[Rotary, Rotary]:
        """Tables of the self-attentions: over the base layers, over the token grid of one layer."""
        dim, layout = self.config.head_dim, self.layout
        layers = torch.arange(self.config.num_base_model_layers, device=device)
        rows, columns = torch.arange(layout.t, device=device), torch.arange(layout.w, device=device)
        return (
            rotary_table(rotary_phases(layers, dim), dtype),
            rotary_table(grid_phases(rows, columns, dim), dtype),
        )

    def _condition_rotary(
        self, length: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Rotary, Rotary]:
        """Tables of the cross-attention: of all tokens as queries, of ``length`` condition tokens as keys."""
        dim, layout = self.config.head_dim, self.layout
        layers = torch.arange(self.config.num_base_model_layers, device=device)
        tokens = torch.arange(layout.hw, device=device)
        keys = rotary_phases(torch.arange(length, device=device) + max(layout.t, layout.w), dim // 2)
        return (
            rotary_table(grid_phases(layers, tokens, dim), dtype),
            rotary_table(torch.cat([keys, keys], dim=-1), dtype),
        )

    def _detokenise(self, x: Tensor, weight_b: Tensor, bias_b: Tensor) -> dict[str, Tensor]:
        """Cut final tokens ``[B, layers, hw, d_model]`` into the tensors of the layout."""
        layout, config = self.layout, self.config
        batch, layers = x.shape[0], config.num_base_model_layers
        rows = x.reshape(batch, layers, layout.t * config.rank, -1)
        boundary = layout.t_a * config.rank
        numbers = {
            "A": self.model.proj_out_A(rows[:, :, :boundary]).flatten(2),
            "B": F.linear(rows[:, :, boundary:], weight_b, bias_b).flatten(2),
        }
        outputs: dict[str, Tensor] = {}
        for slot in layout.slots:
            start = slot.offset * layout.area
            tensors = numbers[slot.kind][:, :, start : start + slot.size].reshape(batch, layers, *slot.shape)
            for layer, tensor in enumerate(tensors.unbind(1)):
                outputs[slot.key(config.prefix, layer)] = tensor
        return outputs


class FoldedGenerator(ParameterGenerator):
    """A generator whose tokens before the first cross-attention are a constant, on its parent's weights.

    Its state dict is that of the parent. Weights that change afterwards do not change the constant: this is
    for export and inference.
    """

    tokens: Tensor

    def __init__(self, generator: ParameterGenerator):
        nn.Module.__init__(self)
        self.config, self.layout = generator.config, generator.layout
        self.hidden_in, self.model = generator.hidden_in, generator.model
        weight = generator.model.hw_pos.weight
        with torch.no_grad():
            tokens = generator._first_tokens(1, *generator._token_rotary(weight.dtype, weight.device))
        self.register_buffer("tokens", tokens, persistent=False)

    def _first_tokens(self, batch: int, rotary_n: Rotary, rotary_hw: Rotary) -> Tensor:
        return self.tokens.expand(batch, -1, -1, -1)
