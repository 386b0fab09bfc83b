"""Graphs of a bundle as models, and models back into the bundle as a variant of it."""

from __future__ import annotations

import hashlib
import mmap
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from hywu_export.bundle.additions import BundleAddition
from hywu_export.bundle.weights import SAFETENSORS_DTYPES, StoredTensor, WeightsFile
from hywu_runtime.errors import BundleError
from hywu_runtime.manifest import LinkedTensor, Manifest, Variant

if TYPE_CHECKING:
    from hywu_runtime.bundle import Bundle, Weight
    from hywu_runtime.manifest import Precision

INLINE_BYTES = 1024
"""Initializers up to this size stay in the .onnx: shapes, scales, small biases."""


class LinkedWeight(ir.Tensor[Any]):
    """A weight in a checkpoint, mapped into memory; ``link`` is its entry in the manifest."""

    def __init__(self, weight: Weight, link: LinkedTensor, name: str):
        names = {"float32": "FLOAT", "float64": "DOUBLE"}
        dtype = ir.DataType[names.get(weight.dtype, weight.dtype.upper())]
        data = weight.data.view(dtype.numpy()).reshape(weight.shape)
        super().__init__(data, dtype, shape=ir.Shape(weight.shape), name=name)
        self.link = link


def load_graph(bundle: Bundle, graph: str, variant: str | None = None) -> ir.Model:
    """A graph of an opened bundle. Weights are mapped into memory; linked ones are `LinkedWeight`.

    Raises:
        InputError: there is no such variant.
        BundleError: the graph or where its weights are is damaged, or the root of a linked checkpoint was
            not given.
    """
    file = bundle.graph_file(graph, variant)
    try:
        model = ir.load(bundle.file(file))
    except Exception as error:  # protobuf and onnx-ir have many for a damaged file
        raise BundleError(
            f"{file} cannot be loaded: {' '.join(str(error).split())[:200]}",
            "Expected an ONNX graph",
            "The bundle is damaged: copy or export it again",
        ) from error
    links = bundle.manifest.linked.get(file, {})
    for name, weight in bundle.initializers(file).items():
        model.graph.initializers[name].const_value = LinkedWeight(weight, links[name], name)
    _map_weights(bundle, file, model.graph)
    for number, node in enumerate(model.graph):  # passes speak of nodes by name
        node.name = node.name or f"{node.op_type}.{number}"
    return model


def _map_weights(bundle: Bundle, file: str, graph: ir.Graph) -> None:
    """Maps external data. onnx-ir's own reader refuses files with several hard links, as copies of bundles
    and caches have them; that files are the bundle's is seen from the manifest here."""
    maps: dict[str, Any] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        place = posixpath.normpath(posixpath.join(posixpath.dirname(file), str(tensor.location)))
        if place not in bundle.manifest.files:
            raise _no_weight(
                file, name, f"lies in {str(tensor.location)!r}, which the manifest does not list"
            )
        if place not in maps:
            try:
                with bundle.file(place).open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise _no_weight(file, name, f"cannot be mapped from {place}: {error}") from None
            maps[place] = np.frombuffer(mapped, np.uint8)
        start, dtype, shape = tensor.offset or 0, tensor.dtype.numpy(), tensor.shape.numpy()
        data = maps[place][start : start + tensor.nbytes]
        if start < 0 or len(data) != tensor.nbytes:
            raise _no_weight(file, name, f"is cut off: {place} ends before byte {start + tensor.nbytes}")
        value.const_value = ir.Tensor(
            data.view(dtype).reshape(shape), tensor.dtype, shape=ir.Shape(shape), name=name
        )


def _no_weight(file: str, name: str, problem: str) -> BundleError:
    return BundleError(
        f"Weight {name!r} of {file} {problem}",
        "Weights lie in files of the bundle or are linked",
        "The bundle is damaged: copy or export it again",
    )


def write_variant(
    bundle: str | Path,
    name: str,
    precision: Precision,
    graphs: Mapping[str, ir.Model],
    extra: Mapping[str, Iterable[bytes]] | None = None,
    report: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    suffix: str = ".onnx",
) -> Manifest:
    """Adds models to a bundle as its variant ``name``, in the place of one of that name.

    Weights are written one at a time, so memory does not grow with the models; what several graphs use alike
    is stored once, and linked weights stay where they are. The same models give the same bytes.

    Args:
        graphs: by the names of the bundle's graphs, with their signatures.
        extra: further files of the variant's folder, by name.
        report: which of them is the report.
        suffix: of the graphs' files; see `hywu_runtime.backends.onnxruntime.INTEGER_PRODUCTS`.
    Returns:
        the bundle's new manifest.
    Raises:
        BundleError: the disk is full, or the bundle cannot be written; it is as it was.
    """
    folder = f"variants/{name}"
    tell = progress or (lambda what, done, total: None)
    with BundleAddition(bundle, folder) as addition:
        stored = _Stored(graphs)
        files = stored.files()
        total = len(files) + len(graphs)
        for done, file in enumerate(files.values()):
            tell(file.name, done, total)
            addition.write(file.name, file.chunks())
        for done, (graph, model) in enumerate(graphs.items(), len(files)):
            tell(graph, done, total)
            addition.write(f"{graph}{suffix}", [stored.serialize(graph, model, files)])
        for path, chunks in (extra or {}).items():
            addition.write(path, chunks)
        linked = {f"{folder}/{graph}{suffix}": links for graph, links in stored.links.items()}
        variant = Variant(
            precision,
            {graph: f"{folder}/{graph}{suffix}" for graph in graphs},
            None if report is None else f"{folder}/{report}",
        )
        return addition.commit(
            lambda m: replace(m, variants={**m.variants, name: variant}, linked={**m.linked, **linked})
        )


def component_sizes(graphs: Mapping[str, ir.Model]) -> dict[str, int]:
    """Bytes of the weights by component, as they are stored; what several graphs share counts once."""
    tensors = {
        name: value.const_value.nbytes
        for model in graphs.values()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    sizes: Counter[str] = Counter()
    for name, size in tensors.items():
        sizes[_component(name)] += size
    return dict(sizes)


def _component(initializer: str) -> str:
    first = initializer.split(".", 1)[0]
    return "constants" if "/" in first else first


class _Stored:
    """Where each initializer of a variant's graphs lies: a weights file, a checkpoint, or the graph."""

    def __init__(self, graphs: Mapping[str, ir.Model]):
        self.links: dict[str, dict[str, LinkedTensor]] = {}
        self._places: dict[tuple[str, str], tuple[str, str]] = {}  # graph, initializer → weights file, tensor
        self._tensors: dict[str, dict[str, StoredTensor]] = {}
        self._digests: dict[str, str] = {}  # of tensors whose name several graphs have
        uses = Counter(name for model in graphs.values() for name in model.graph.initializers)
        for graph, model in graphs.items():
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                assert tensor is not None
                if isinstance(tensor, LinkedWeight):
                    self.links.setdefault(graph, {})[name] = tensor.link
                elif tensor.nbytes > INLINE_BYTES:
                    self._store(graph, name, tensor, shared=uses[name] > 1)

    def _store(self, graph: str, name: str, tensor: ir.TensorProtocol, shared: bool) -> None:
        file = f"weights/{_component(name)}.safetensors"
        key = name
        if shared:
            digest = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes()).hexdigest()
            if self._digests.setdefault(name, digest) != digest:
                key = f"{name}@{graph}"
        dtype = SAFETENSORS_DTYPES[tensor.dtype.numpy()]
        shape = tuple(tensor.shape.numpy())
        self._tensors.setdefault(file, {})[key] = StoredTensor(key, dtype, shape, data=tensor.tobytes)
        self._places[graph, name] = (file, key)

    def files(self) -> dict[str, WeightsFile]:
        """The weights files, laid out."""
        return {
            file: WeightsFile.lay_out(file, tensors.values())
            for file, tensors in sorted(self._tensors.items())
        }

    def serialize(self, graph: str, model: ir.Model, files: Mapping[str, WeightsFile]) -> bytes:
        """A graph's bytes; its initializers point into the weights files, or are links."""
        copy = model.clone()
        for name, value in copy.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if (graph, name) in self._places:
                file, key = self._places[graph, name]
                place, offset, length = file, files[file].offsets[key], tensor.nbytes
            elif name in self.links.get(graph, {}):
                link = self.links[graph][name]
                place, offset, length = f"linked/{link.source}/{link.file}", link.offset, link.length
            else:
                value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, name=name)
                continue
            value.const_value = ir.ExternalTensor(
                place, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
        return bytes(ir.to_proto(copy).SerializeToString(deterministic=True))
