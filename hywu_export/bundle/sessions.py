"""Models in memory on ONNX Runtime's CPU, without a copy of their weights on disk or in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hywu_runtime.backends.onnxruntime import OnnxRuntime, OrtSession
from hywu_runtime.bundle import Bundle, Weight

if TYPE_CHECKING:
    import onnx_ir as ir

_INLINE_BYTES = 1024


def load_model(model: ir.Model, name: str = "graph") -> OrtSession:
    """A session of a model; its weights stay where they are mapped.

    Raises:
        BundleError: ONNX Runtime does not take it.
    """
    import onnx_ir as ir

    model = model.clone()
    weights: dict[str, Weight] = {}
    for key, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        if tensor.nbytes <= _INLINE_BYTES:
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=key)
            continue
        shape = tuple(array.shape)
        weights[key] = Weight(array.reshape(-1).view(np.uint8), tensor.dtype.numpy().name, shape)
        value.const_value = ir.ExternalTensor(
            "in-memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(shape), name=key
        )
    with tempfile.TemporaryDirectory(prefix="hywu-") as folder:
        file = Path(folder) / f"{name}.onnx"
        file.write_bytes(ir.to_proto(model).SerializeToString())
        return OnnxRuntime("ort-cpu", 0, None).load(file, weights)


class ModelBackend(OnnxRuntime):
    """ONNX Runtime's CPU, running models in memory in place of a bundle's own graphs.

    Args:
        models: by graph; the others run from the bundle. They have the bundle's signatures.
    """

    def __init__(self, bundle: Bundle, models: Mapping[str, ir.Model]):
        super().__init__("ort-cpu", 0, None)
        self._models = {
            bundle.file(bundle.manifest.graphs[name].file): (name, m) for name, m in models.items()
        }

    def load(self, file: Path, weights: Mapping[str, Weight], stage: int = 0) -> OrtSession:
        """See :class:`hywu_runtime.backends.Backend`."""
        if file in self._models:
            name, model = self._models[file]
            return load_model(model, name=name)
        return super().load(file, weights)
