"""The layers of an engine: from the engine inspector where there is a GPU, else from the builder's log.

Both tell the same of a layer: its kind, the types of what it reads and writes, and the ONNX nodes that were
fused into it. The log of a version that does not list layers gives None, never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DTYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
    "fp8": "fp8",
    "int4": "int4",
}
_PRODUCTS = ("gemm", "correlation", "conv", "matrix", "matmul", "fmha", "mha", "runtime_fusion", "cask")
"""Parts of the layer kinds that multiply matrices; the others move data or compute element by element.

``runtime_fusion`` is a product that TensorRT-RTX fuses with what follows: ``__myl_FcAdd``."""

_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<rest>.*)$")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: [^,]*, )?Dimensions: \[(?P<shape>[^\]]*)\],.*?"
    r"(?:Datatype: (?P<dtype>\w+)|Format/Datatype: (?P<format>[^}]*?)) ?(?:,[^}]*)?\}"
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\[\x1e\x1f]|\s*$)")  # one after another, or between separators
_MEMORY = {
    "persistent_bytes": re.compile(r"Total Device Persistent Memory: (\d+)"),
    "scratch_bytes": re.compile(r"Max Scratch Memory: (\d+)"),
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+)"),
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+)"),
}


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Attributes:
        kind: as TensorRT calls it: ``gemm``, ``correlation``, ``kgen`` (generated code), …
        inputs, constants, outputs: dtypes of the tensors, such as ``fp16``.
        nodes: names of the ONNX nodes that it computes, as far as it says so.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        """Whether the layer multiplies matrices (or convolves)."""
        return any(part in self.kind.lower() for part in _PRODUCTS)

    @property
    def precision(self) -> str:
        """The dtype in which it computes: a product that of its operands, else the widest that it touches."""
        operands = self.inputs or self.constants or self.outputs
        if self.is_product and operands:
            return operands[0]
        kinds = {*self.inputs, *self.outputs}
        for dtype in ("fp32", "bf16", "fp16", "fp8", "int8"):
            if dtype in kinds:
                return dtype
        return min(kinds, default="none")


def from_log(path: Path) -> list[Layer] | None:
    """The layers that a builder's log lists at its end, or None if it lists none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = list(_listed(file))
    return found or None


def memory_from_log(path: Path) -> dict[str, int]:
    """What a builder's log says about memory on the device; bytes."""
    found: dict[str, int] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            for key, pattern in _MEMORY.items():
                if match := pattern.search(line):
                    found[key] = int(match[1])
    return found


def from_inspector(text: str) -> list[Layer] | None:
    """The layers in the engine inspector's JSON, which ``trtexec --exportLayerInfo`` writes too, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    layers = value.get("Layers") if isinstance(value, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return None  # names alone: the engine was built without details
    return [_from_dict(layer) for layer in layers] or None


def _listed(lines: Iterable[str]) -> Iterator[Layer]:
    listing = False
    for line in lines:
        text = line.removeprefix("[V] ").rstrip("\n")
        if text.startswith("Layers:"):
            listing = True
            text = text.removeprefix("Layers:").lstrip()
        if listing and (layer := _from_line(text)) is not None:
            yield layer
        elif listing and text and not text.startswith("Name: "):
            listing = False


def _from_line(text: str) -> Layer | None:
    match = _LINE.match(text)
    if match is None:
        return None
    inputs, _, rest = match["rest"].partition("], Constants: [")
    constants, _, rest = rest.partition("], Outputs: [") if "], Outputs: [" in rest else ("", "", rest)
    if not rest:  # without constants, in an older version
        inputs, _, rest = match["rest"].partition("], Outputs: [")
    outputs, _, rest = rest.partition("], TacticName:")
    return Layer(
        match["name"],
        match["kind"],
        tuple(_log_dtypes(inputs)),
        tuple(_log_dtypes(constants)),
        tuple(_log_dtypes(outputs)),
        tuple(_NODE.findall(rest.partition("Metadata: ")[2])),
    )


def _log_dtypes(text: str) -> Iterator[str]:
    for match in _TENSOR.finditer(text):
        yield _dtype(match["dtype"] or match["format"] or "")


def _from_dict(layer: dict[str, Any]) -> Layer:
    def dtypes(key: str) -> tuple[str, ...]:
        tensors = layer.get(key) or []
        return tuple(_dtype(str(t.get("Datatype") or t.get("Format/Datatype") or "")) for t in tensors)

    constants = dtypes("Constants")
    weights = layer.get("Weights")
    if isinstance(weights, dict) and "Type" in weights:
        constants += (_dtype(str(weights["Type"])),)
    return Layer(
        str(layer.get("Name", "")),
        str(layer.get("LayerType", "")),
        dtypes("Inputs"),
        constants,
        dtypes("Outputs"),
        tuple(_NODE.findall(str(layer.get("Metadata", "")))),
    )


def _dtype(text: str) -> str:
    """TensorRT's name of a type, alone (``Half``) or in a format (``Row major linear FP16 format``)."""
    words = [word.strip("().,").lower() for word in text.split()]
    return next((_DTYPES[word] for word in words if word in _DTYPES), text.lower() or "unknown")
