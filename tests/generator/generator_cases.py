"""Shared by the generator's tests: golden vectors, random small generators, and a literal re-derivation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hywu_export.generator import GeneratorConfig, ParameterGenerator
from hywu_export.generator.config import expand

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

DEFAULT = {
    "model_type": "parameter_generator",
    "token_dim": 1024,
    "rank": 16,
    "alpha": 64,
    "input_dim": 4096,
    "dim_accumulation": 4,
    "d_model": 4096,
    "head_dim": 128,
    "num_base_model_layers": 32,
    "output_dim": 1024,
    "num_pg_layers": 24,
    "prefix": "model.layers.",
    "pg_mapping": {
        "mlp.experts": {
            "type": "grouped",
            "num_experts": 64,
            "sub_weights": {
                "w1": {"lora_A_dim": 4096, "lora_B_dim": 3072},
                "w2": {"lora_A_dim": 3072, "lora_B_dim": 4096},
                "w3": {"lora_A_dim": 4096, "lora_B_dim": 3072},
            },
        },
        "mlp.shared_mlp.down_proj": {"lora_A_dim": 3072, "lora_B_dim": 4096},
        "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
        "self_attn.o_proj": {"lora_A_dim": 4096, "lora_B_dim": 4096},
        "self_attn.qkv_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
    },
}


def small(**changes: Any) -> dict[str, Any]:
    """A valid tiny configuration as JSON would give it, with ``changes``."""
    sizes = {"token_dim": 8, "output_dim": 8, "rank": 4, "alpha": 8, "input_dim": 12, "dim_accumulation": 2}
    network = {
        "d_model": 16,
        "head_dim": 8,
        "num_base_model_layers": 2,
        "num_pg_layers": 1,
        "prefix": "blocks.",
    }
    mapping = {
        "to_q": {"lora_A_dim": 11, "lora_B_dim": 16},
        "experts": {
            "type": "grouped",
            "num_experts": 3,
            "sub_weights": {
                "w1": {"lora_A_dim": 8, "lora_B_dim": 5},
                "w0": {"lora_A_dim": 5, "lora_B_dim": 8},
            },
        },
    }
    return {**sizes, **network, "pg_mapping": mapping, **changes}


_PLAIN = st.fixed_dictionaries({"lora_A_dim": st.integers(1, 20), "lora_B_dim": st.integers(1, 20)})
_NAME = st.sampled_from(["to_q", "to_k", "a.to_q", "ff.net", "mlp", "mlp.w", "x"])
_GROUPED = st.fixed_dictionaries(
    {
        "type": st.just("grouped"),
        "num_experts": st.integers(1, 3),
        "sub_weights": st.dictionaries(st.sampled_from(["w2", "w1", "down"]), _PLAIN, min_size=1, max_size=3),
    }
)


@st.composite
def configs(draw: st.DrawFn) -> GeneratorConfig:
    """Every shape of configuration, at sizes that run in milliseconds; names may contain one another."""
    accumulation, head_dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8]))
    token_dim = draw(st.integers(1, 9))
    return GeneratorConfig.from_dict(
        {
            "token_dim": token_dim,
            "output_dim": token_dim,
            "rank": accumulation * draw(st.integers(1, 3)),
            "alpha": draw(st.integers(1, 9)),
            "input_dim": draw(st.integers(1, 9)),
            "dim_accumulation": accumulation,
            "d_model": math.lcm(accumulation, head_dim) * draw(st.integers(1, 2)),
            "head_dim": head_dim,
            "num_base_model_layers": draw(st.integers(1, 3)),
            "num_pg_layers": draw(st.integers(1, 2)),
            "prefix": draw(st.sampled_from(["", "model.layers."])),
            "pg_mapping": draw(st.dictionaries(_NAME, _PLAIN | _GROUPED, min_size=1, max_size=3)),
        }
    )


def randomised(config: GeneratorConfig, seed: int = 0) -> ParameterGenerator:
    """A generator in which every parameter, biases and B's projection included, is random and matters."""
    torch.manual_seed(seed)
    generator = ParameterGenerator(config)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return generator


def naive_deltas(generator: ParameterGenerator, condition: np.ndarray) -> dict[str, np.ndarray]:
    """The published formulas term by term in float64: one loop per index. The condition is [L, input]."""
    c = generator.config
    state = {name: tensor.detach().double().numpy() for name, tensor in generator.state_dict().items()}
    area, accumulation, width = c.rank * c.token_dim, c.dim_accumulation, c.rank // c.dim_accumulation

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return state[name + ".weight"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def rotated(head: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        out, dim = head.copy(), len(head) // len(axes)
        for axis, position in enumerate(axes):
            for i in range(dim // 2):
                phase, at = position * 10000.0 ** (-2 * i / dim), axis * dim + 2 * i
                pair = complex(head[at], head[at + 1]) * complex(math.cos(phase), math.sin(phase))
                out[at], out[at + 1] = pair.real, pair.imag
        return out

    def attention(name: str, x: np.ndarray, x_at: list, source: np.ndarray, source_at: list) -> np.ndarray:
        q, k, v = linear(name + ".W_q", x), linear(name + ".W_k", source), linear(name + ".W_v", source)
        out = np.zeros_like(x)
        for start in range(0, c.d_model, c.head_dim):
            part = slice(start, start + c.head_dim)
            queries = np.stack([rotated(row[part], at) for row, at in zip(q, x_at)])
            keys = np.stack([rotated(row[part], at) for row, at in zip(k, source_at)])
            scores = np.exp(queries @ keys.T / math.sqrt(c.head_dim))
            out[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
        return linear(name + ".W_o", out)

    def tensors(kind: str) -> list[tuple[str, tuple[int, ...]]]:
        shaped = []
        for name, target, experts in expand(c.pg_mapping):
            shape = (c.rank, target.in_features) if kind == "A" else (target.out_features, c.rank)
            shaped.append((name, shape if experts is None else (experts, *shape)))
        first = {
            name: min(i for i, known in enumerate(c.pg_mapping) if known in c.prefix + name)
            for name, _ in shaped
        }
        return sorted(shaped, key=lambda item: first[item[0]])

    slots = [(name, kind, shape) for kind in "AB" for name, shape in tensors(kind)]
    tokens = [-(-math.prod(shape) // area) for _, _, shape in slots]
    total, layers = sum(tokens), c.num_base_model_layers
    total_a = sum(count for count, (_, kind, _) in zip(tokens, slots) if kind == "A")
    x = np.zeros((layers, total * width, c.d_model))
    for n in range(layers):
        for t in range(total):
            for w in range(width):
                parts = [
                    state["model.hw_pos.weight"][t * c.rank + w * accumulation + j]
                    + state["model.layer_pos.weight"][n]
                    for j in range(accumulation)
                ]
                x[n, t * width + w] = norm("model.norm_tokens", np.concatenate(parts))
    source = norm("model.norm_input", linear("hidden_in", condition.astype(np.float64)))
    source_at = [(position + max(total, width),) * 2 for position in range(len(source))]
    grid = [(t, w) for t in range(total) for w in range(width)]
    flat_at = [(n, hw) for n in range(layers) for hw in range(total * width)]
    for index in range(c.num_pg_layers):
        block = f"model.blocks.{index}."
        normed = norm(block + "norm1", x)
        for hw in range(total * width):
            at = [(n,) for n in range(layers)]
            x[:, hw] += attention(block + "self_attn_n", normed[:, hw], at, normed[:, hw], at)
        normed = norm(block + "norm2", x)
        for n in range(layers):
            x[n] += attention(block + "self_attn_hw", normed[n], grid, normed[n], grid)
        flat = norm(block + "norm3", x).reshape(-1, c.d_model)
        x += attention(block + "self_attn_cross", flat, flat_at, source, source_at).reshape(x.shape)
        hidden = linear(block + "feed_forward.fc1", norm(block + "norm4", x))
        x += linear(block + "feed_forward.fc2", hidden / (1 + np.exp(-hidden)))
    x = norm("model.norm_final", x)

    outputs = {}
    chunk = c.d_model // accumulation
    for n in range(layers):
        numbers = []
        for t in range(total):
            project = "model.proj_out_A" if t < total_a else "model.proj_out_B"
            for r in range(c.rank):
                w, j = divmod(r, accumulation)
                numbers.append(linear(project, x[n, t * width + w, j * chunk : (j + 1) * chunk]))
        token_numbers = np.concatenate(numbers).reshape(total, area)
        start = 0
        for (name, kind, shape), count in zip(slots, tokens):
            values = token_numbers[start : start + count].reshape(-1)[: math.prod(shape)]
            outputs[f"{c.prefix}{n}.{name}.lora_{kind}"] = values.reshape(shape)
            start += count
    return outputs
