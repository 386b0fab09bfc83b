"""What a graph is compiled from: its ONNX file, files of weights, and weights linked to a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hywu_runtime.errors import BundleError, EngineError, UnsupportedError

if TYPE_CHECKING:
    import onnx

    from hywu_runtime.bundle import Bundle

_LINKED = "linked/"  # where external data of linked weights seems to lie, see docs/bundle.md


@dataclass(frozen=True)
class GraphSource:
    """A graph and the files that it is compiled from.

    Attributes:
        name: the graph's name in the manifest.
        file: its ONNX file, relative to the bundle.
        weights: files with its external data, relative to the bundle.
        linked: external data in checkpoints: (location in the ONNX file, source, file of the source).
    """

    root: Path
    name: str
    file: str
    weights: tuple[str, ...]
    linked: tuple[tuple[str, str, str], ...]

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the bundle that the graph is compiled from."""
        return (self.file, *self.weights)

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The ONNX model without its external data."""
        return _load(self.root / self.file)


def graph_source(bundle: Bundle, graph: str, variant: str | None) -> GraphSource:
    """Looks up what ``graph`` is compiled from.

    Raises:
        InputError: there is no such variant.
        BundleError: a file is missing, damaged, or not one of the bundle's.
    """
    file = bundle.graph_file(graph, variant)
    model = _load(bundle.file(file))
    links = {(t.source, t.file) for t in bundle.manifest.linked.get(file, {}).values()}
    weights: list[str] = []
    linked: list[tuple[str, str, str]] = []
    for location in _locations(model):
        source, _, path = location.removeprefix(_LINKED).partition("/")
        if location.startswith(_LINKED) and (source, path) in links:
            linked.append((location, source, path))
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(file), location))
        if name not in bundle.manifest.files:
            raise BundleError(
                f"{file} has weights in {location!r}, which the manifest does not list",
                "Weights lie in files of the bundle or are linked",
                "The bundle is damaged: copy or export it again",
            )
        weights.append(name)
    return GraphSource(bundle.root, graph, file, tuple(weights), tuple(linked))


def check_hashes(bundle: Bundle, files: Sequence[str]) -> None:
    """Compares what is on the disk with the manifest, so that no engine is made from damaged weights.

    Raises:
        BundleError: naming the first file that is another one.
    """
    for name in files:
        expected, digest = bundle.manifest.files[name].sha256, hashlib.sha256()
        with bundle.file(name).open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
        if digest.hexdigest() != expected:
            raise BundleError(
                f"{name} has SHA-256 {digest.hexdigest()}",
                f"Expected {expected}",
                "The bundle is damaged: copy or export it again",
            )


@contextlib.contextmanager
def model_path(bundle: Bundle, source: GraphSource) -> Iterator[Path]:
    """The path from which a parser reads the graph and all its weights; nothing is copied.

    Where weights are linked, it is a directory of symbolic links in which they lie where the ONNX file says.
    """
    file = bundle.file(source.file)
    if not source.linked:
        yield file.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="hywu-build-") as name:
        view = Path(name)
        places = {source.file.rpartition("/")[2]: file}
        for weights in source.weights:
            places[posixpath.relpath(weights, posixpath.dirname(source.file) or ".")] = bundle.file(weights)
        for location, checkpoint, path in source.linked:
            places[location] = bundle.sources[checkpoint] / path
        for place, target in places.items():
            (view / place).parent.mkdir(parents=True, exist_ok=True)
            (view / place).symlink_to(target.resolve())
        yield view / file.name


def check_signed(source: GraphSource, variant: str | None) -> None:
    """Refuses what is quantized to UINT8: the form of INT8 that is for ONNX Runtime on the CPU alone.

    Raises:
        UnsupportedError: naming the graph and the first node.
    """
    import onnx

    types = _types(source.model)
    for node in source.model.graph.node:
        if node.op_type == "QuantizeLinear":
            zero = node.input[2] if len(node.input) > 2 else ""
            declared = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
            dtype = types.get(zero) if zero else declared or onnx.TensorProto.UINT8  # what ONNX defaults to
        elif node.op_type == "DequantizeLinear":
            dtype = types.get(node.input[0]) or types.get(node.input[2] if len(node.input) > 2 else "")
        else:
            continue
        if dtype == onnx.TensorProto.UINT8:
            what = f"Variant {variant!r}" if variant is not None else "The bundle"
            raise UnsupportedError(
                f"{what} is quantized for ONNX Runtime on the CPU: graph {source.name!r} is in UINT8 (first "
                f"at {node.name or node.op_type!r})",
                "TensorRT and TensorRT-RTX take signed INT8 with zero point 0",
                "Calibrate for TensorRT: `hywu calibrate BUNDLE --variant int8 --backend tensorrt`",
            )


def check_plain(source: GraphSource) -> None:
    """Refuses convolutions that stand as Winograd products, for which compilers for GPUs know better.

    Raises:
        UnsupportedError: naming the graph.
    """
    from hywu_export.passes.winograd import is_winograd_constant

    if any(is_winograd_constant(tensor.name) for tensor in source.model.graph.initializer):
        raise UnsupportedError(
            f"Graph {source.name!r} was exported for CPUs: its convolutions are Winograd products",
            "Expected convolutions, for which TensorRT and TensorRT-RTX choose algorithms themselves",
            "Export the bundle again without --winograd",
        )


def check_turing(source: GraphSource, fp32: bool) -> None:
    """Refuses what compute capability 7.5 cannot compute: BF16, and in TensorRT-RTX FP32 matrix products.

    Args:
        fp32: the backend has FP32 matrix products.
    Raises:
        UnsupportedError: naming the graph and the first node.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(source.model)
    types = _types(model)
    for node in model.graph.node:
        found = {types.get(name) for name in (*node.input, *node.output)}
        if onnx.TensorProto.BFLOAT16 in found:
            raise UnsupportedError(
                f"Graph {source.name!r} computes in BF16 (first at {node.name!r}), which GPUs of compute "
                "capability 7.5 (Turing) do not have",
                "BF16 needs 8.0 or later",
                "Leave 7.5 out, or build the variant fp16 for it: --variant fp16 --compute-capability 75",
            )
        if (
            not fp32
            and node.op_type in ("MatMul", "Gemm")
            and types.get(node.input[0]) == onnx.TensorProto.FLOAT
        ):
            raise UnsupportedError(
                f"Graph {source.name!r} multiplies matrices in FP32 (first at {node.name!r}), which "
                "TensorRT-RTX cannot do on compute capability 7.5 (Turing)",
                "FP32 matrix products need 8.0 or later; on 7.5 they are FP16 or INT8",
                "Leave 7.5 out, or build a variant without them: --variant fp16 --compute-capability 75",
            )


def _types(model: onnx.ModelProto) -> Mapping[str, int]:
    graph = model.graph
    types = {i.name: i.data_type for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _load(path: Path) -> onnx.ModelProto:
    try:
        import onnx
    except ImportError as error:
        raise UnsupportedError(
            f"The package onnx cannot be imported ({error})",
            "Expected what the extra `rtx` or `tensorrt` installs",
            "pip install 'hywu-export[rtx]'",
        ) from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has a class of its own for every way to be damaged
        raise EngineError(
            f"{path.name} cannot be read as ONNX: {' '.join(str(error).split())[:200]}",
            "Expected the graph that was exported",
            "The bundle is damaged: copy or export it again",
        ) from error


def _locations(model: onnx.ModelProto) -> list[str]:
    """Locations of external data, each once, in the order of the initializers."""
    found: dict[str, None] = {}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                found.setdefault(entry.value)
    return list(found)
