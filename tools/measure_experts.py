"""What the two forms of the expert layers cost in ONNX Runtime: every expert on every token, and gathered by
expert.

    python -m tools.measure_experts [--experts 64] [--top-k 8] [--hidden 512] [--width 384]
        [--tokens 256,1024,4096] [--blocks 0,64,256]

One layer's router and routed experts with deltas of rank 16 on w1, w2 and w3, random weights, one thread; CPU
seconds of a run, the smallest of a few taken in turns. Beside them stands what each form computes and what it
copies. Both forms have the number of tokens free.
"""

from __future__ import annotations

import time
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.hunyuan.experts import Experts, Router
from hywu_export.families.hunyuan.routing import PIECES, blocks_of_a_piece
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, trace


class Layer(nn.Module):
    """Router and experts with deltas, gathered in blocks, or dense with ``block`` 0; inputs are tokens
    ``[batch, height, width, hidden]``, the gate and the deltas."""

    def __init__(self, experts: int, top_k: int, hidden: int, width: int, block: int):
        super().__init__()
        torch.manual_seed(0)
        self.router = Router(hidden, experts, top_k)
        self.experts = Experts(experts, hidden, width, block)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.requires_grad_(False).eval()
        self.spec = DeltaSpec.from_patterns(self.experts, ["w1", "w2", "w3"], 16)
        self.injection = inject(self.experts, self.spec)

    def forward(self, picture: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        x = picture.flatten(1, 2)
        with self.injection as injection:
            injection.set(dict(zip(self.spec.tensors(), tensors)), gate)
            made = self.experts(x, *self.router(x))
        return (made.unflatten(1, picture.shape[1:3]),)


def session(layer: Layer, hidden: int) -> Any:
    """The exported layer in ONNX Runtime."""
    import onnx_ir as ir
    import onnxruntime as ort

    x = TensorSpec("x", "float32", ("batch", "height", "width", hidden))
    inputs = [x, TensorSpec("gate", "float32", ("batch",))]
    inputs += [TensorSpec(name, "float32", (1, *shape)) for name, shape in layer.spec.tensors().items()]
    axes = {"batch": Axis(1, 2), "height": Axis(2, 512), "width": Axis(2, 512)}
    traced = trace(GraphSpec("experts", layer, inputs, [TensorSpec("y", "float32", x.shape)]), axes)
    state = layer.state_dict()
    for name in traced.initializers:
        value = traced.model.graph.initializers[name]
        value.const_value = ir.tensor(state[name].numpy(), name=name)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.to_proto(traced.model).SerializeToString()
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


@click.command(help=__doc__)
@click.option("--experts", default=64)
@click.option("--top-k", default=8)
@click.option("--hidden", default=512)
@click.option("--width", default=384)
@click.option("--blocks", default="0,64,256", help="Tokens of a block; 0 is the dense form.")
@click.option("--tokens", default="256,1024,4096")
@click.option("--runs", default=3)
def main(experts: int, top_k: int, hidden: int, width: int, blocks: str, tokens: str, runs: int) -> None:
    rng = np.random.default_rng(0)
    sizes, counts = ([int(size) for size in text.split(",")] for text in (blocks, tokens))
    layers = {block: Layer(experts, top_k, hidden, width, block) for block in sizes}
    deltas = {
        name: rng.standard_normal((1, *shape)).astype(np.float32) * 0.05
        for name, shape in layers[sizes[0]].spec.tensors().items()
    }
    sessions = {block: session(layer, hidden) for block, layer in layers.items()}
    click.echo("| tokens | form | rows | GMAC | weights copied, MB | CPU s |\n|---|---|---|---|---|---|")
    for count in counts:
        x = rng.standard_normal((1, 2, count // 2, hidden)).astype(np.float32)
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
            made = PIECES * blocks_of_a_piece(count * top_k, experts, block) if block else 0
            rows = made * block if block else count * experts
            name = f"gathered, blocks of {block}" if block else "dense"
            macs, copied = rows * 3 * hidden * width / 1e9, made * 3 * hidden * width * 4 / 1e6
            click.echo(f"| {count} | {name} | {rows} | {macs:.1f} | {copied:.0f} | {best[block]:.2f} |")


if __name__ == "__main__":
    main()
