"""What single layers gain on this CPU: convolutions as Winograd products, linear layers in INT8.

    python -m bench.layers [--threads 2] [--rounds 9]

Sizes are those of the InstructPix2Pix UNet at 256x256 with three guidance rows. Both forms run in turn.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir

from hywu_export.passes.quantize import Quantized, half_scale, quantize
from hywu_export.passes.winograd import winograd
from hywu_runtime.backends.onnxruntime import INTEGER_PRODUCTS, OnnxRuntime

ROWS = 3
CONVOLUTIONS = ((320, 320, 32), (640, 640, 32), (960, 320, 32), (640, 640, 16), (1920, 640, 16))
LINEARS = ((3072, 320, 2560), (3072, 1280, 320), (768, 640, 5120), (192, 1280, 10240))


@click.command(help=__doc__)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(threads: int, rounds: int) -> None:
    backend = OnnxRuntime("ort-cpu", 0, threads)
    print(f"{threads} threads\n\nconvolution 3x3      direct  Winograd  ratio")
    for inputs, outputs, side in CONVOLUTIONS:
        shape = [ROWS, inputs, side, side]
        direct = _model("Conv", shape, [outputs, inputs, 3, 3], {"pads": [1, 1, 1, 1]})
        fast = direct.clone()
        if not winograd(fast, {}, {}):
            raise click.ClickException(f"{inputs} to {outputs} at {side}: it would not pay")
        one, two = _in_turn(backend, (direct, fast), ("a.onnx", "b.onnx"), shape, rounds)
        times = f"{1e3 * one:5.1f} ms  {1e3 * two:5.1f} ms  {one / two:.2f}"
        print(f"{inputs:4} to {outputs:4}, {side}x{side}  {times}")
    print("\nlinear               FP32      INT8   ratio")
    for tokens, inner, outer in LINEARS:
        wide = _model("MatMul", [tokens, inner], [inner, outer], {})
        narrow = quantize(wide.clone(), {"layer": Quantized(half_scale(4.0))}, unsigned=True)
        names = ("a.onnx", f"b{INTEGER_PRODUCTS}")
        one, two = _in_turn(backend, (wide, narrow), names, [tokens, inner], rounds)
        times = f"{1e3 * one:5.1f} ms  {1e3 * two:5.1f} ms  {one / two:.2f}"
        print(f"{tokens:4}, {inner:4} to {outer:5}  {times}")


def _model(kind: str, shape: list[int], weight: list[int], attributes: dict[str, Any]) -> ir.Model:
    """``y`` of one product of ``x`` with a random weight."""
    rng = np.random.default_rng(0)
    array = (rng.standard_normal(weight) / np.sqrt(np.prod(weight[1:]))).astype(np.float32)
    value = ir.Value(name="layer.weight", const_value=ir.tensor(array, name="layer.weight"))
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weight)
    x = ir.Value(name="x", type=value.type, shape=ir.Shape(shape))
    node = ir.node(kind, [x, value], attributes, name="layer")
    y = node.outputs[0]
    y.name, y.type = "y", value.type
    y.shape = ir.Shape([shape[0], weight[0], *shape[2:]] if kind == "Conv" else [shape[0], weight[1]])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[value], opset_imports={"": 20}, name="layer")
    return ir.Model(graph, ir_version=10)


def _in_turn(
    backend: OnnxRuntime, models: Any, names: tuple[str, str], shape: list[int], rounds: int
) -> tuple[float, float]:
    """Median seconds of two models."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    sessions = []
    with tempfile.TemporaryDirectory() as folder:
        for model, name in zip(models, names):
            (Path(folder) / name).write_bytes(ir.to_proto(model).SerializeToString())
            sessions.append(backend.load(Path(folder) / name, {}))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for session, taken in zip(sessions, times):
            start = time.perf_counter()
            session.run({"x": x})
            if number:
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
