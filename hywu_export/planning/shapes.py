"""The shape and dtype of every tensor of a graph, for inputs of known shapes. Weights are never read.

ONNX's own inference is asked node by node, and is told the values of small tensors, which are computed
where all that they depend on is known: shapes, indices, sizes. So every `Reshape` has a target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx

_LARGEST_VALUE = 4096
"""Elements of a tensor whose value is kept: shapes and indices are small."""


@dataclass(frozen=True)
class Tensor:
    """``shape`` in elements; ``dtype`` as numpy spells it, or ``bfloat16``."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.ceil(self.elements * ITEM_BITS.get(self.dtype, 64) / 8)


ITEM_BITS = {
    "bool": 8, "int8": 8, "uint8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "int4": 4, "uint4": 4,
    "float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16,
    "float32": 32, "int32": 32, "uint32": 32, "float64": 64, "int64": 64, "uint64": 64,
}  # fmt: skip


@dataclass
class Shapes:
    """What is known of a graph.

    Attributes:
        tensors: every tensor that is an input, an initializer or made by a node, by name.
        constant: those that depend on weights and shapes alone: a compiler computes them beforehand.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)


def infer(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]], where: str = "the graph") -> Shapes:
    """Follows the shapes of the inputs through a graph.

    Args:
        model: without its external data, or with it: only small initializers in the file itself are read.
        inputs: the shape of every input.
        where: what the graph is called in messages.
    Raises:
        UnsupportedError: the shapes do not fit the graph, or that of a node's result does not follow from
            them.
    """
    return _Inference(model, where).run(inputs)


class _Inference:
    def __init__(self, model: onnx.ModelProto, where: str):
        self.model, self.where = model, where
        self.opsets = {opset.domain or "": opset.version for opset in model.opset_import}
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, npt.NDArray[Any]] = {}
        self.found = Shapes()

    def run(self, inputs: Mapping[str, tuple[int, ...]]) -> Shapes:
        import onnx
        from onnx import numpy_helper

        graph = self.model.graph
        for tensor in graph.initializer:
            self._set(tensor.name, tensor.data_type, tuple(tensor.dims))
            self.found.constant.add(tensor.name)
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            if not external and math.prod(tensor.dims) <= _LARGEST_VALUE and tensor.data_type in _SIMPLE:
                self.values[tensor.name] = numpy_helper.to_array(tensor)
        for value in graph.input:
            if value.name not in self.found.tensors:
                self._set(value.name, value.type.tensor_type.elem_type, inputs[value.name])
        for node in graph.node:
            self._node(node)
        return self.found

    def _set(self, name: str, dtype: int, shape: tuple[int, ...]) -> None:
        from onnx import TensorProto, helper

        self.types[name] = helper.make_tensor_type_proto(dtype, shape)
        self.found.tensors[name] = Tensor(shape, DTYPES.get(dtype) or TensorProto.DataType.Name(dtype))

    def _node(self, node: onnx.NodeProto) -> None:
        read = [name for name in node.input if name]
        if all(name in self.found.constant for name in read) or node.op_type == "Shape":
            self.found.constant.update(node.output)
        values = self._evaluate(node, read)
        if values is not None:
            from onnx import helper

            for name, value in zip(node.output, values):
                self.values[name] = value
                self._set(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            return
        for name, kind in self._infer(node, read).items():
            shape = kind.tensor_type.shape.dim
            if not kind.tensor_type.HasField("shape") or not all(d.HasField("dim_value") for d in shape):
                raise self._unknown(node, "depends on values that only a run would show")
            self._set(name, kind.tensor_type.elem_type, tuple(d.dim_value for d in shape))
        missing = [name for name in node.output if name and name not in self.found.tensors]
        if missing:
            raise self._unknown(node, "is not known to ONNX's shape inference")

    def _evaluate(self, node: onnx.NodeProto, read: list[str]) -> list[npt.NDArray[Any]] | None:
        """The values of a node's outputs, where they are small and follow from known ones."""
        if node.op_type == "Shape":
            attributes = {a.name: a.i for a in node.attribute}
            shape = self.found.tensors[read[0]].shape[attributes.get("start", 0) : attributes.get("end")]
            return [np.array(shape, np.int64)]
        if not all(name in self.values for name in read) or node.domain not in ("", "ai.onnx"):
            return None
        if any(attribute.type in (5, 10) for attribute in node.attribute):  # graphs
            return None
        from onnx.reference import ReferenceEvaluator

        try:
            made = ReferenceEvaluator(node).run(None, {name: self.values[name] for name in read})
        except Exception:  # whatever it does not do, inference may still tell the shape of
            return None
        arrays = [np.asarray(value) for value in made]
        small = all(a.size <= _LARGEST_VALUE and a.dtype.kind in "biuf" for a in arrays)
        return arrays if small and len(arrays) == len(node.output) else None

    def _infer(self, node: onnx.NodeProto, read: list[str]) -> dict[str, onnx.TypeProto]:
        import onnx
        from onnx import numpy_helper

        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            raise self._unknown(node, f"is that of {domain or 'ONNX'}'s {node.op_type}") from None
        data = {name: numpy_helper.from_array(self.values[name]) for name in read if name in self.values}
        opsets, version = list(self.model.opset_import), self.model.ir_version
        types = {name: self.types[name] for name in read}
        infer_outputs = onnx.shape_inference.infer_node_outputs
        try:
            try:
                made = infer_outputs(schema, node, types, data, opset_imports=opsets, ir_version=version)
                return dict(made)
            except onnx.checker.ValidationError:
                # Opset 20 has no BF16 for some operators that TensorRT takes: their shapes are those of FP16.
                narrow = {name: _retyped(kind, _BF16, _FP16) for name, kind in types.items()}
                made = infer_outputs(schema, node, narrow, data, opset_imports=opsets, ir_version=version)
                return {name: _retyped(kind, _FP16, _BF16) for name, kind in made.items()}
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, KeyError, ValueError,
                RuntimeError) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            known = [self.found.tensors[name] for name in read if name in self.found.tensors]
            shapes = ", ".join(str(list(tensor.shape)) for tensor in known)
            raise self._unknown(node, f"cannot follow from {shapes} ({reason})") from None

    def _unknown(self, node: onnx.NodeProto, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"The shape that {node.op_type} {node.name or node.output[0]!r} of {self.where} makes {why}",
            "Expected a graph in which every shape follows from those of the inputs",
            "Choose sizes that the bundle takes, or export it with this version of hywu-export",
        )


def _retyped(kind: onnx.TypeProto, old: int, new: int) -> onnx.TypeProto:
    """A type with another element type, if it has the ``old`` one."""
    if kind.tensor_type.elem_type != old:
        return kind
    import onnx

    changed = onnx.TypeProto()
    changed.CopyFrom(kind)
    changed.tensor_type.elem_type = new
    return changed


_FP16, _BF16 = 10, 16  # onnx.TensorProto.FLOAT16, BFLOAT16
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8_e4m3fn",
    19: "float8_e5m2", 21: "uint4", 22: "int4",
}  # fmt: skip
"""Of onnx.TensorProto.DataType."""
_SIMPLE = (1, 2, 3, 6, 7, 9, 10, 11)
"""Those of them that numpy has, and that sizes are made of."""
