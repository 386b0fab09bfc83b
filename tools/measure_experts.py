"""What two forms of the expert layers cost in ONNX Runtime: every expert on every token, and gathered by
expert.

    python -m tools.measure_experts [--experts 64] [--top-k 8] [--hidden 512] [--width 384] [--tokens
    256,1024]

*Dense* is what the graphs of a bundle have. *Gathered*: pairs of a token and one of its experts are sorted by
expert into slots, and every expert's slots are filled up to whole blocks of one size, so that a block has one
expert, whose weights it takes a copy of. There are at most ``(pairs + experts * (block - 1)) // block``
blocks whatever the router says, and that many are always computed: shapes are static, and nothing waits for
the host. It is traced here for one number of tokens at a time, because torch.export cannot follow these
divisions for all of them.

One layer's routed experts with deltas of rank 16 on w1, w2 and w3, random weights, one thread; CPU seconds of
a run, the smallest of a few taken in turns. Beside them stands what each form computes and what it copies.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.hunyuan.experts import Experts, Router
from hywu_export.tracing import GraphSpec, TensorSpec, trace

PIECES = 8
"""Parts that the blocks are computed in, one after the other: each part holds copies of weights."""
_CHUNK = 128  # pairs that are counted by one product


class Groups(NamedTuple):
    """Where tokens go: ``token`` of every slot and ``expert`` of every block, ``[batch, slots]`` and
    ``[batch, blocks]``; ``slot`` of every pair, ``[batch, n * k]``. int64; what is in a slot that no pair has
    is computed in vain."""

    token: Tensor
    expert: Tensor
    slot: Tensor


def group(chosen: Tensor, experts: int, block: int, pieces: int = 1) -> Groups:
    """Sort the pairs of ``chosen`` ``[batch, n, k]``; the number of blocks is a multiple of ``pieces``."""
    batch, n, k = chosen.shape
    pairs = n * k
    kinds = torch.arange(experts)
    hit = (chosen.flatten(1).unsqueeze(-1) == kinds).to(torch.float32)  # [batch, pairs, experts]
    count = hit.sum(1, keepdim=True)
    needed = ((count + (block - 1)) / block).floor()
    earlier = (kinds.unsqueeze(1) > kinds).to(torch.float32)
    first = (needed * earlier).sum(-1).unsqueeze(1)  # block, per expert
    rank = (_counted(hit) * hit).sum(-1) - 1.0
    slot = ((hit * first).sum(-1) * block + rank).to(torch.int64)

    blocks = -(-((pairs + experts * (block - 1)) // block) // pieces) * pieces
    order = torch.arange(blocks, dtype=torch.float32).unsqueeze(-1)
    expert = (first <= order).to(torch.int64).sum(-1) - 1
    token = torch.arange(n).unsqueeze(1).expand(-1, k).flatten().expand(batch, -1)
    empty = torch.zeros_like(slot[:, :1]).expand(-1, blocks * block)
    return Groups(empty.scatter(1, slot, token), expert, slot)


def _counted(hit: Tensor) -> Tensor:
    """How many pairs up to each have the same expert, per expert: ``[batch, pairs, experts]``."""
    batch, pairs, experts = hit.shape
    chunks = (pairs + _CHUNK - 1) // _CHUNK
    parts = F.pad(hit, (0, 0, 0, _CHUNK - 1))[:, : chunks * _CHUNK].reshape(batch, chunks, _CHUNK, experts)
    within = torch.ones(_CHUNK, _CHUNK).tril() @ parts
    order = torch.arange(chunks)
    earlier = (order.unsqueeze(1) > order).to(torch.float32)[..., None]
    before = (within[:, :, -1].unsqueeze(1) * earlier).sum(2)
    return (within + before.unsqueeze(2)).reshape(batch, chunks * _CHUNK, experts)[:, :pairs]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[batch, m]`` of every sample of ``x`` ``[batch, n, d]``: ``[batch, m, d]``."""
    batch, n, d = x.shape
    start = torch.arange(batch).unsqueeze(1) * n
    return x.flatten(0, 1).index_select(0, (index + start).flatten()).reshape(batch, -1, d)


class Layer(nn.Module):
    """Router and experts with deltas, dense, or gathered in blocks; inputs are tokens, the gate and the
    deltas."""

    def __init__(self, experts: int, top_k: int, hidden: int, width: int, block: int):
        super().__init__()
        self.router = Router(hidden, experts, top_k)
        self.experts = Experts(experts, hidden, width)
        self.spec = DeltaSpec.from_patterns(self.experts, ["w1", "w2", "w3"], 16)
        self.injection = inject(self.experts, self.spec)
        self.block = block

    def forward(self, x: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        deltas = dict(zip(self.spec.tensors(), tensors))
        chosen, shares = self.router(x)
        if self.block:
            return (self._gathered(x, chosen, shares, gate, deltas),)
        with self.injection as injection:
            injection.set(deltas, gate)
            return (self.experts(x, chosen, shares),)

    def _gathered(
        self, x: Tensor, chosen: Tensor, shares: Tensor, gate: Tensor, deltas: dict[str, Tensor]
    ) -> Tensor:
        both, down = self.experts.weights()
        width = self.experts.width
        weights = {"w1": both[:, width:], "w2": down, "w3": both[:, :width]}
        groups = group(chosen, self.experts.count, self.block, PIECES)
        batch, blocks = groups.expert.shape
        tokens = take(x, groups.token).reshape(batch, blocks, self.block, -1)
        made = []
        for index, kinds in zip(tokens.chunk(PIECES, 1), groups.expert.chunk(PIECES, 1)):
            hit = (kinds.unsqueeze(-1) == torch.arange(self.experts.count)).to(x.dtype)

            def project(name: str, x: Tensor, kinds: Tensor = kinds, hit: Tensor = hit) -> Tensor:
                weight = weights[name]
                picked = weight.index_select(0, kinds.flatten()).reshape(*kinds.shape, *weight.shape[1:])
                # A product with zeros and ones picks deltas, whatever their own batch is.
                a, b = (
                    (hit @ t.flatten(2)).unflatten(-1, t.shape[2:])
                    for t in (deltas[f"{name}.lora_A"], deltas[f"{name}.lora_B"])
                )
                low = (x @ a.transpose(2, 3)) * gate.reshape(-1, 1, 1, 1)
                return x @ picked.transpose(2, 3) + low @ b.transpose(2, 3)

            made.append(project("w2", project("w3", index) * F.silu(project("w1", index))))
        pairs = take(torch.cat(made, 1).flatten(1, 2), groups.slot).unflatten(1, shares.shape[1:])
        return (pairs * shares.unsqueeze(-1)).sum(2)


def session(layer: Layer, hidden: int, tokens: int) -> Any:
    """The exported layer in ONNX Runtime."""
    import onnx_ir as ir
    import onnxruntime as ort

    x = TensorSpec("x", "float32", (1, tokens, hidden))
    names = layer.spec.tensors().items()
    inputs = [x, TensorSpec("gate", "float32", (1,))]
    inputs += [TensorSpec(name, "float32", (1, *shape)) for name, shape in names]
    outputs = [TensorSpec("y", "float32", x.shape)]
    traced = trace(GraphSpec("experts", layer, inputs, outputs), {})
    for name, value in traced.model.graph.initializers.items():
        if value.const_value is None:
            tensor = layer.state_dict()[name]
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.to_proto(traced.model).SerializeToString()
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


@click.command(help=__doc__)
@click.option("--experts", default=64)
@click.option("--top-k", default=8)
@click.option("--hidden", default=512)
@click.option("--width", default=384)
@click.option("--blocks", default="0,16,64,256", help="Tokens of a block; 0 is the dense form.")
@click.option("--tokens", default="256,1024,4096")
@click.option("--runs", default=3)
def main(experts: int, top_k: int, hidden: int, width: int, blocks: str, tokens: str, runs: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in blocks.split(",")]
    layers = {}
    for block in sizes:
        torch.manual_seed(0)
        layers[block] = Layer(experts, top_k, hidden, width, block).requires_grad_(False).eval()
        for parameter in layers[block].parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    deltas = {
        name: rng.standard_normal((1, *shape)).astype(np.float32) * 0.05
        for name, shape in layers[sizes[0]].spec.tensors().items()
    }
    click.echo("| tokens | form | rows | GMAC | weights copied, MB | CPU s |\n|---|---|---|---|---|---|")
    for count in (int(n) for n in tokens.split(",")):
        sessions = {block: session(layer, hidden, count) for block, layer in layers.items()}
        x = rng.standard_normal((1, count, hidden)).astype(np.float32)
        best: dict[int, float] = {}
        found = {}
        for _ in range(runs):
            for block in sizes:
                start = time.process_time()
                feed = {"x": x, "gate": np.ones(1, np.float32), **deltas}
                found[block] = sessions[block].run(None, feed)[0]
                best[block] = min(best.get(block, np.inf), time.process_time() - start)
        for block in sizes:
            np.testing.assert_allclose(found[block], found[sizes[0]], rtol=0, atol=1e-3)
            made = -(-((count * top_k + experts * (block - 1)) // block) // PIECES) * PIECES if block else 0
            rows = made * block if block else count * experts
            name = f"gathered, blocks of {block}" if block else "dense"
            macs, copied = rows * 3 * hidden * width / 1e9, made * 3 * hidden * width * 4 / 1e6
            click.echo(f"| {count} | {name} | {rows} | {macs:.1f} | {copied:.0f} | {best[block]:.2f} |")


if __name__ == "__main__":
    main()
