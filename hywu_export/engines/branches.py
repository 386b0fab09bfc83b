"""Where the delta branches of a graph went: from the nodes of the ONNX graph to the layers of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from hywu_export.engines.layers import Layer

_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Branch:
    """The nodes of one target's delta branch.

    Attributes:
        module: the target.
        down, up: the products with A and with B.
        add: the node that adds the branch to the layer's own output.
        base: the layer's own product; None where it is not found.
    """

    module: str
    down: tuple[str, ...]
    up: tuple[str, ...]
    add: str | None
    base: str | None


@dataclass(frozen=True)
class Fused:
    """A branch in an engine: the layers that hold its parts; None where no layer says so."""

    branch: Branch
    down: Layer | None
    up: Layer | None
    add: Layer | None
    base: Layer | None

    @property
    def parts(self) -> dict[str, Layer | None]:
        """The layers by the part that they hold."""
        return {"a": self.down, "b": self.up, "sum": self.add, "base": self.base}


def find_branches(model: onnx.ModelProto) -> list[Branch]:
    """The delta branches of a graph: the deltas are followed from the inputs to the sum that they end in."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    inputs = {value.name for value in model.graph.input}
    found = []
    for name in inputs:
        module = name.removesuffix(".lora_A")
        if module == name or f"{module}.lora_B" not in inputs:
            continue
        down, _ = _follow(name, readers)
        up, add = _follow(f"{module}.lora_B", readers)
        base = _base(add, {n.name for n in (*down, *up)}, makers) if add is not None else None
        down = [node for node in down if node.name not in {n.name for n in up}]
        found.append(
            Branch(
                module,
                tuple(node.name for node in down if node.op_type in _PRODUCTS),
                tuple(node.name for node in up if node.op_type in _PRODUCTS),
                add.name if add is not None else None,
                base.name if base is not None else None,
            )
        )
    return sorted(found, key=lambda branch: branch.module)


def locate(branches: Sequence[Branch], layers: Sequence[Layer]) -> list[Fused]:
    """Finds the layers that compute each branch."""
    places: dict[str, Layer] = {}
    for layer in layers:
        for node in layer.nodes:
            # A node may be listed with several layers; the product is computed where products are.
            if node not in places or (layer.is_product and not places[node].is_product):
                places[node] = layer

    def place(names: Sequence[str | None]) -> Layer | None:
        return next((places[name] for name in names if name in places), None)

    return [Fused(b, place(b.down), place(b.up), place([b.add]), place([b.base])) for b in branches]


def _follow(
    name: str, readers: dict[str, list[onnx.NodeProto]]
) -> tuple[list[onnx.NodeProto], onnx.NodeProto | None]:
    """The nodes that a delta reaches before the first sum, and that sum."""
    found: dict[str, onnx.NodeProto] = {}
    add = None
    waiting = [name]
    while waiting:
        for node in readers.get(waiting.pop(), []):
            if node.op_type == "Add" and any(n.op_type in _PRODUCTS for n in found.values()):
                add = add or node
            elif node.name not in found and node.op_type != "Shape":
                found[node.name] = node
                waiting.extend(node.output)
    return list(found.values()), add


def _base(add: onnx.NodeProto, branch: set[str], makers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The product behind the other operand of the sum."""
    for name in add.input:
        node = makers.get(name)
        if node is not None and node.name not in branch:
            return next(_products(node, makers), None)
    return None


def _products(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The first products upstream of a node, itself included."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop(0)
        if current.op_type in _PRODUCTS:
            yield current
            continue
        if current.name in seen:
            continue
        seen.add(current.name)
        waiting += [makers[name] for name in current.input if name in makers]
