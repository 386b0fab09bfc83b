"""The bundle writer: graphs, weights and files go in; a directory with a manifest comes out, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from hywu_export.bundle.staging import StagingDirectory, check_target
from hywu_export.bundle.weights import (
    CHUNK_BYTES,
    NUMPY_DTYPES,
    SAFETENSORS_DTYPES,
    HeldTensor,
    StoredTensor,
    TensorLocation,
    WeightsFile,
    WeightSource,
    file_identity,
    read_tensor,
)
from hywu_runtime.errors import BundleError, CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import onnx_ir as ir

    from hywu_export.tracing import TracedGraph, Transform

FORMAT = 1
INLINE_BYTES = 64 * 2**10
"""Constants up to this size stay in the .onnx; larger ones go to ``weights/constants.safetensors``."""
CONSTANTS = "weights/constants.safetensors"
LINKED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _Source:
    root: Path
    name: str
    licence: str | None
    files: dict[str, dict[str, object]] = field(default_factory=dict)  # linked files: size and header_sha256


@dataclass(frozen=True)
class _Weights:
    checkpoint: WeightSource | Mapping[str, HeldTensor]
    source: str | None
    link: bool


class BundleWriter:
    """Writes a bundle (docs/bundle.md).

    ::

        with BundleWriter(path) as writer:
            writer.add_source("base", root, name="timbrooks/instruct-pix2pix", licence="MIT")
            writer.add_weights("unet", checkpoint, source="base", link=False)
            writer.add_graph(traced)
            writer.add_file("tokenizer/tokenizer.json", data)
            writer.finish({"name": …, "axes": …, "program": …, …})

    Everything is staged beside ``path`` and appears there when ``finish`` returns. A context that is left
    earlier (error, interrupt) leaves nothing. Weights of all graphs that use a component share the file
    ``weights/<component>.safetensors``, in the dtype of the graphs; they are streamed, so memory does not
    grow with the checkpoint. Linked components stay where they are, in their own dtype, but for weights in
    another form.

    Args:
        path: the bundle's directory: new or empty, or with ``overwrite`` a bundle, replaced in one step.
        validate: called with the complete manifest before anything becomes visible.

    Raises:
        BundleError: the path is taken or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        validate: Callable[[dict[str, object]], object] | None = None,
    ):
        self._validate = validate
        self._graphs: dict[str, TracedGraph] = {}
        self._weights: dict[str, _Weights] = {}
        self._sources: dict[str, _Source] = {}
        self._linked: dict[str, dict[str, object]] = {}
        check_target(Path(path).absolute(), overwrite)
        self._staging = StagingDirectory(Path(path).absolute(), overwrite)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.discard()

    def add_source(self, source: str, root: str | Path, *, name: str, licence: str | None = None) -> None:
        """Declares where weights come from; linked files are given relative to ``root``."""
        self._sources[source] = _Source(Path(os.path.abspath(root)), name, licence)

    def add_weights(
        self,
        component: str,
        checkpoint: WeightSource | Mapping[str, HeldTensor],
        *,
        source: str | None = None,
        link: bool = False,
    ) -> None:
        """Says where the parameters ``<component>.*`` are. ``link`` leaves them there, and needs
        ``source``."""
        if component in self._weights:
            raise BundleError(
                f"Weights of component {component!r} are added twice", "A component has one checkpoint"
            )
        if link and source not in self._sources:
            raise BundleError(
                f"Component {component!r} is linked to source {source!r}, which is not declared",
                "A linked checkpoint belongs to a source",
                "Call add_source first",
            )
        self._weights[component] = _Weights(checkpoint, source, link)

    def add_graph(self, traced: TracedGraph) -> None:
        """Adds a graph as ``<name>.onnx``; its weights are looked up when the bundle is finished."""
        if traced.name in self._graphs:
            raise BundleError(f"Graph {traced.name!r} is added to the bundle twice", "Graph names are unique")
        self._graphs[traced.name] = traced

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Adds a file: bytes, or a copy of a file.

        Raises:
            BundleError: the name is not allowed or taken, or the file cannot be read or written.
        """
        self._staging.write(name, [content] if isinstance(content, bytes) else _file_chunks(content))

    def finish(self, manifest: Mapping[str, object]) -> dict[str, object]:
        """Writes weights, graphs and the manifest, and publishes the bundle.

        ``manifest`` holds the sections that the writer cannot know. The writer adds ``format``, ``producer``,
        ``files``, ``graphs``, ``linked``, the sources' entries, and empty sections where one is absent.

        Returns:
            The complete manifest.

        Raises:
            CheckpointError: a parameter is missing in its checkpoint, or has another shape.
            BundleError: the disk is full, or the path was taken in the meantime.
        """
        files = self._lay_out_weights()
        for file in files.values():
            self._staging.write(file.name, file.chunks())
        for traced in self._graphs.values():
            self._staging.write(f"{traced.name}.onnx", [self._serialize(traced, files)])
        complete = self._manifest(manifest)
        if self._validate is not None:
            self._validate(complete)
        text = json.dumps(complete, indent=1, ensure_ascii=False) + "\n"
        self._staging.write("manifest.json", [text.encode()])
        self._staging.publish()
        return complete

    def _manifest(self, given: Mapping[str, object]) -> dict[str, object]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            release = version("hywu-export")
        except PackageNotFoundError:  # run from a source tree
            release = "0"
        graphs = {
            name: {"file": f"{name}.onnx", **traced.signature()} for name, traced in self._graphs.items()
        }
        sources = {
            key: {"name": source.name, "licence": source.licence, "files": source.files}
            for key, source in self._sources.items()
        }
        return {
            "format": FORMAT,
            "name": self._staging.path.name,
            "family": None,
            "producer": {"name": "hywu-export", "version": release},
            "axes": {},
            "tensors": {},
            "program": [],
            "results": {},
            "state": [],
            "guidance": [],
            "tokenizers": {},
            "variants": {},
            "engines": {},
            "licences": [],
            **given,
            "graphs": graphs,
            "sources": sources,
            "linked": self._linked,
            "files": dict(sorted(self._staging.files.items())),
        }

    def _lay_out_weights(self) -> dict[str, WeightsFile]:
        """Weights file name → its layout, for every component that is copied and for large constants."""
        tensors: dict[str, dict[str, StoredTensor]] = {}
        for traced in self._graphs.values():
            for initializer, value in traced.model.graph.initializers.items():
                parameter = traced.initializers.get(initializer)
                if parameter is None:
                    constant = _large_constant(value)
                    if constant is not None:
                        tensors.setdefault(CONSTANTS, {})[constant.name] = constant
                    continue
                stored = self._place(traced, initializer)[-1]
                if stored is None:
                    continue
                file = tensors.setdefault(_weights_file(parameter), {})
                if file.setdefault(stored.name, stored).dtype != stored.dtype:
                    other = file[stored.name].dtype
                    raise UnsupportedError(
                        f"Parameter {parameter!r} is used as {other} and as {stored.dtype}",
                        "All graphs of a bundle use a component in one dtype",
                    )
        return {name: WeightsFile.lay_out(name, group.values()) for name, group in sorted(tensors.items())}

    def _place(
        self, traced: TracedGraph, initializer: str
    ) -> tuple[_Weights, TensorLocation | HeldTensor, StoredTensor | None]:
        """For an initializer: the weights of its component, its parameter's place in them or the parameter
        itself, and what is stored in the bundle: nothing where it is linked."""
        parameter, transform = traced.initializers[initializer], traced.transforms.get(initializer)
        value = traced.model.graph.initializers[initializer]
        shape = _static_shape(value) if transform is None else transform.shape
        component = _component(parameter)
        if component not in self._weights:
            raise BundleError(
                f"Graph {traced.name!r} has the parameter {parameter!r}, but {component!r} has no weights",
                f"Weights were added for {', '.join(sorted(self._weights)) or 'no component'}",
                "Call add_weights for the component",
            )
        weights = self._weights[component]
        names = [
            name.removeprefix(f"{component}.") for name in (parameter, *traced.aliases.get(parameter, ()))
        ]
        for name in names:
            if name in weights.checkpoint:
                location = weights.checkpoint[name]
                break
        else:
            raise CheckpointError(
                f"Checkpoint of component {component!r} has no tensor {names[0]!r}",
                f"The graph {traced.name!r} needs it, with shape {list(shape)}",
                "Check that the configuration belongs to the weights",
            )
        if tuple(location.shape) != shape:
            raise CheckpointError(
                f"Tensor {name!r} of component {component!r} has shape {list(location.shape)}",
                f"The configuration asks for {list(shape)}",
                "Check that the configuration belongs to the weights",
            )
        if location.dtype not in NUMPY_DTYPES:
            raise UnsupportedError(
                f"Tensor {name!r} of component {component!r} is stored as {location.dtype}"
            )
        if transform is not None:
            return weights, location, _transformed(names[0], _static_shape(value), location, transform)
        linked = weights.link and not isinstance(location, HeldTensor)
        return weights, location, None if linked else _stored(names[0], _dtype_name(value), location)

    def _serialize(self, traced: TracedGraph, files: Mapping[str, WeightsFile]) -> bytes:
        """The graph's bytes; its initializers point into weights files, or are links."""
        import onnx_ir as ir

        from hywu_export.bundle.stored_dtype import cast_weights

        model = traced.model.clone()
        graph = model.graph
        graph_file = f"{traced.name}.onnx"
        external: dict[str, tuple[str, int, int]] = {}  # initializer → file, offset, length
        stored: dict[str, ir.DataType] = {}
        for initializer, value in list(graph.initializers.items()):
            parameter = traced.initializers.get(initializer)
            if parameter is None:
                constant = _large_constant(value)
                if constant is not None:
                    external[initializer] = (
                        CONSTANTS,
                        files[CONSTANTS].offsets[constant.name],
                        constant.size,
                    )
                continue
            weights, location, kept = self._place(traced, initializer)
            if kept is not None:
                file = files[_weights_file(parameter)]
                external[initializer] = (file.name, file.offsets[kept.name], kept.size)
            else:
                assert not isinstance(location, HeldTensor)
                link = self._link(weights, parameter, location)
                self._linked.setdefault(graph_file, {})[initializer] = link
                stored[initializer] = ir.DataType.from_numpy(NUMPY_DTYPES[location.dtype])
                # Nothing is there: the runtime supplies the initializer, and a load without it fails.
                place = f"linked/{link['source']}/{link['file']}"
                external[initializer] = (place, location.offset, location.length)
        cast_weights(model, stored)
        for initializer, (place, offset, length) in external.items():
            value = graph.initializers[initializer]
            tensor = value.const_value if value.const_value is not None else value
            assert tensor.dtype is not None
            value.const_value = ir.ExternalTensor(
                place, offset, length, tensor.dtype, shape=ir.Shape(_static_shape(tensor)), name=initializer
            )
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))

    def _link(self, weights: _Weights, parameter: str, location: TensorLocation) -> dict[str, object]:
        assert weights.source is not None
        source = self._sources[weights.source]
        if location.dtype not in LINKED_DTYPES:
            raise UnsupportedError(
                f"Parameter {parameter!r} is stored as {location.dtype}",
                f"Linked weights are {', '.join(LINKED_DTYPES.values())}",
                "Export without --link-weights",
            )
        # Not resolved: a hub's cache is a tree of symbolic links, and its tree is what a source's root shows.
        path = Path(os.path.abspath(location.file))
        if not path.is_relative_to(source.root):
            raise BundleError(
                f"Checkpoint file {path} is outside its source's directory {source.root}",
                "Linked files are found relative to the root of their source",
                "Export without --link-weights, or copy the file there",
            )
        file = path.relative_to(source.root).as_posix()
        if file not in source.files:
            source.files[file] = file_identity(location.file)
        return {
            "source": weights.source,
            "file": file,
            "offset": location.offset,
            "length": location.length,
            "dtype": LINKED_DTYPES[location.dtype],
            "shape": list(location.shape),
        }


def _stored(name: str, dtype: str, location: TensorLocation | HeldTensor) -> StoredTensor:
    """A weight for its component's file, in the ``dtype`` of the graphs."""
    if not isinstance(location, HeldTensor):
        return StoredTensor(name, dtype, tuple(location.shape), location)
    if location.dtype != dtype:
        raise UnsupportedError(
            f"The tensor {name!r} is {location.dtype} in memory, and {dtype} in its graph",
            "A tensor in memory has the dtype of the graph",
        )
    return StoredTensor(name, dtype, location.shape, data=location.data)


def _transformed(
    name: str, shape: tuple[int, ...], location: TensorLocation | HeldTensor, transform: Transform
) -> StoredTensor:
    """A weight in another form, made when it is written."""

    def data() -> bytes:
        if isinstance(location, HeldTensor):
            held = np.frombuffer(location.data(), NUMPY_DTYPES[location.dtype]).astype(np.float32)
        else:
            held = np.frombuffer(b"".join(read_tensor(name, location, "F32")), np.float32)
        made = transform.apply(held.reshape(transform.shape))
        assert made.shape == shape
        return np.ascontiguousarray(made, np.float32).tobytes()

    return StoredTensor(f"{name}/{transform.name}", "F32", shape, data=data)


def _component(parameter: str) -> str:
    return parameter.split(".", 1)[0]


def _weights_file(parameter: str) -> str:
    return f"weights/{_component(parameter)}.safetensors"


def _static_shape(value: ir.Value | ir.TensorProtocol) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(d) for d in value.shape.numpy())


def _dtype_name(value: ir.Value) -> str:
    assert value.dtype is not None
    return SAFETENSORS_DTYPES[value.dtype.numpy()]


def _large_constant(value: ir.Value) -> StoredTensor | None:
    """A constant for the file of constants, named by its content, or None for one that stays in the graph."""
    tensor = value.const_value
    if tensor is None or tensor.nbytes <= INLINE_BYTES:
        return None
    data = tensor.tobytes()
    dtype = SAFETENSORS_DTYPES[tensor.dtype.numpy()]
    digest = hashlib.sha256(f"{dtype}{tensor.shape}".encode() + data).hexdigest()
    return StoredTensor(digest[:32], dtype, tuple(tensor.shape.numpy()), data=data)


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise BundleError(f"File {path} cannot be read: {error.strerror or error}") from error
