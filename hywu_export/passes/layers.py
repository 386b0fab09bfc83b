"""The layers of a graph that can be quantized: products with a constant weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

LEAST_DIMENSION = 16
"""Layers with a smaller reduction or output dimension are left alone: INT8 gains nothing there."""

_ANONYMOUS = "constant/"  # initializers that are no parameters, see passes.naming


@dataclass(frozen=True)
class Layer:
    """A MatMul, Gemm or Conv with a constant weight.

    Attributes:
        name: the module's path: the parameter's name without ``.weight``; from a module's second use on, with
            a number (``#2``).
        node: the product.
        data: the activation, the product's first input.
        weight: the parameter as it is stored.
        op: ``MatMul``, ``Gemm`` or ``Conv``.
        transposed: the parameter is ``[N, K]``, where the product reads ``[K, N]``.
        reduction, outputs: K and N. For a convolution, K is the input channels of a group times the kernel's
            taps.
    """

    name: str
    node: ir.Node
    data: ir.Value
    weight: ir.Value
    op: str
    transposed: bool
    reduction: int
    outputs: int

    @property
    def small(self) -> bool:
        """Whether it is too small to be worth quantizing."""
        return min(self.reduction, self.outputs) < LEAST_DIMENSION

    @property
    def output_axis(self) -> int:
        """The axis of the stored weight that holds the output channels."""
        return 0 if self.op == "Conv" or self.transposed else 1


def find_layers(model: ir.Model) -> list[Layer]:
    """All layers of a model's graph, in the order of the graph."""
    layers: list[Layer] = []
    uses: dict[str, int] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain not in ("", "ai.onnx"):
            continue
        data, operand = node.inputs[0], node.inputs[1]
        if data is None or operand is None or data.is_initializer():
            continue
        weight, turned = _parameter(operand)
        if weight is None or weight.shape is None:
            continue
        shape = tuple(int(d) for d in weight.shape.numpy())
        if node.op_type == "Conv":
            reduction, outputs, transposed = math.prod(shape[1:]), shape[0], False
            if turned:
                continue
        else:
            if len(shape) != 2 or (node.op_type == "Gemm" and not _plain_gemm(node)):
                continue
            transposed = turned != bool(_attribute(node, "transB", 0))
            outputs, reduction = shape if transposed else shape[::-1]
        path = (weight.name or "").removesuffix(".weight")
        uses[path] = uses.get(path, 0) + 1
        name = path if uses[path] == 1 else f"{path}#{uses[path]}"
        layers.append(Layer(name, node, data, weight, node.op_type, transposed, reduction, outputs))
    return layers


def _parameter(value: ir.Value) -> tuple[ir.Value | None, bool]:
    """The parameter that a weight operand is, through a Cast and a transposition of two axes."""
    turned = False
    while not value.is_initializer():
        node = value.producer()
        if node is None or node.inputs[0] is None:
            return None, False
        if node.op_type == "Transpose":
            permutation = node.attributes.get("perm")
            if permutation is not None and tuple(permutation.as_ints()) != (1, 0):
                return None, False
            turned = not turned
        elif node.op_type not in ("Cast", "Identity"):
            return None, False
        value = node.inputs[0]
    return (None, False) if (value.name or "").startswith(_ANONYMOUS) else (value, turned)


def _plain_gemm(node: ir.Node) -> bool:
    return (
        not _attribute(node, "transA", 0)
        and _attribute(node, "alpha", 1.0) == 1.0
        and _attribute(node, "beta", 1.0) == 1.0
    )


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)
