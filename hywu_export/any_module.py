"""Bundles of any torch module that takes deltas, with a hypernetwork that makes them or without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.bundle.weights import HeldTensor
from hywu_export.bundle.writer import BundleWriter
from hywu_export.deltas import DeltaSpec, Layout, flatten, inject
from hywu_export.exporter import add_source
from hywu_export.passes.linting import MORE_OPERATORS, check
from hywu_export.tracing import Axis, GraphSpec, Inferred, TensorSpec, TracedGraph
from hywu_export.tracing import trace as trace_graph
from hywu_export.tracing.fake import traceable
from hywu_runtime.codec import encode
from hywu_runtime.errors import DeltaError, InputError, UnsupportedError
from hywu_runtime.manifest import Call, Dtype, Manifest, ProvidedTensor, Results

BASE, GENERATOR = "model", "generator"
"""Names of the graphs, and of the components that hold their weights."""
BATCH, DELTA_BATCH, GATE = "batch", "delta_batch", "gate"
DEFAULT_RANK = 16

Inputs = Sequence[Tensor] | Mapping[str, Tensor]
Dimensions = Mapping[int, Any] | Sequence[Any] | None
Shapes = Mapping[str, Dimensions] | Sequence[Dimensions]


@dataclass(frozen=True)
class Generator:
    """A hypernetwork that makes the deltas of a traced module, in a layout of its own.

    Attributes:
        module: any module.
        example_inputs, dynamic_shapes, input_names: as for :func:`trace`. An input that has the name, dtype
            and shape of one of the traced module is the same tensor.
        layout: how its outputs become deltas; tensors have the names that
            :func:`hywu_export.deltas.layouts.flatten` gives them.
        checkpoint: as for :func:`trace`.
    """

    module: nn.Module
    example_inputs: Inputs
    layout: Layout
    dynamic_shapes: Shapes | None = None
    input_names: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | Path | None = None


@dataclass(frozen=True)
class Traced:
    """A module, traced; ``spec`` are its deltas. :meth:`save` writes the bundle."""

    spec: DeltaSpec
    axes: Mapping[str, Axis]
    inputs: Mapping[str, TensorSpec]
    graphs: Sequence[TracedGraph]
    outputs: Sequence[str]
    weights: Mapping[str, _Weights]

    def save(self, out: str | Path, *, overwrite: bool = False, link_weights: bool = False) -> Manifest:
        """Write the bundle.

        Args:
            out: a new or empty directory, or with ``overwrite`` a bundle, which is replaced.
            link_weights: leave the weights in the checkpoints that were given.

        Raises:
            BundleError: it cannot be written; nothing is left behind.
            CheckpointError: a checkpoint does not hold a parameter, or in another shape.
            InputError: weights are to be linked, but a module came without a checkpoint.
        """
        for name, weights in self.weights.items():
            if link_weights and weights.checkpoint is None:
                raise InputError(
                    f"The weights of the {name} are in memory alone",
                    "Linked weights stay in a checkpoint",
                    "Give `checkpoint` to trace, or write without link_weights",
                )
        with BundleWriter(out, overwrite=overwrite, validate=Manifest.from_dict) as writer:
            licences = []
            for name, weights in self.weights.items():
                if weights.checkpoint is not None:
                    licences.append(add_source(writer, name, weights.checkpoint))
                source = None if weights.checkpoint is None else name
                writer.add_weights(name, weights.tensors, source=source, link=link_weights)
            for graph in self.graphs:
                writer.add_graph(graph)
            generated = tuple(self.spec.tensors()) if len(self.graphs) > 1 else ()
            return Manifest.from_dict(
                writer.finish(
                    {
                        "axes": {name: axis.to_dict() for name, axis in self.axes.items()},
                        "tensors": encode(self._tensors()),
                        "program": encode([Call(graph.name, "request") for graph in self.graphs]),
                        "results": encode(Results(None, generated, tuple(self.outputs))),
                        "deltas": self.spec.to_manifest(),
                        "licences": encode(licences),
                    }
                )
            )

    def _tensors(self) -> dict[str, ProvidedTensor]:
        tensors = {
            name: ProvidedTensor(cast(Dtype, tensor.dtype), tensor.shape, "input")
            for name, tensor in self.inputs.items()
        }
        return tensors | {GATE: ProvidedTensor("float32", (BATCH,), "gate")}


def trace(
    module: nn.Module,
    example_inputs: Inputs,
    targets: Sequence[str] = (),
    max_rank: int | None = None,
    *,
    dynamic_shapes: Shapes | None = None,
    axes: Mapping[str, Axis | tuple[int, int]] | None = None,
    max_batch: int = 8,
    outputs: Sequence[str] | Mapping[str, str] | None = None,
    input_names: Mapping[str, str] | None = None,
    generator: Generator | None = None,
    checkpoint: str | Path | None = None,
) -> Traced:
    """Trace a module with its deltas as inputs, and a hypernetwork before it if there is one.

    The bundle runs with ``hywu_runtime.Editor.run(inputs)``, and ``hywu_run`` of the C ABI. ::

        traced = hywu_export.trace(
            model, {"input_ids": ids}, targets=["q_proj", "v_proj"], max_rank=8,
            dynamic_shapes={"input_ids": ("batch", "sequence")}, axes={"sequence": (2, 512)},
            outputs=["logits"],
        )
        traced.save("bundle")

    Args:
        module: any module, in float32; its parameters may be without data
            (:func:`hywu_export.tracing.fake_module`) where a checkpoint holds them. What it computes must not
            depend on the data by a Python branch.
        example_inputs: tensors for ``forward``, by position or by name. The module runs on them once.
        targets: modules that take deltas, as for `DeltaSpec.from_patterns`; without any, those of the
            generator.
        max_rank: rank of the deltas; None is the generator's own, or 16. Smaller ones are padded.
        dynamic_shapes: for each input, which of its axes are free: names in order (None, or the size itself,
            where one is fixed), or a mapping of positions to names; a ``torch.export.Dim`` is a name with
            limits. The batch is called ``batch``. None frees axis 0 of every input as the batch.
        axes: smallest and largest size of the named axes; ``batch`` is 1 to ``max_batch``.
        outputs: which of what ``forward`` returns, by the names that `deltas.layouts.flatten` gives; a
            mapping renames them. None is all.
        input_names: names in the bundle of inputs that shall not have those of ``forward``'s parameters.
        generator: makes the deltas from inputs of its own, in the same request.
        checkpoint: a safetensors file, or a folder of one set of them, with the module's parameters under its
            own names. None takes the values that the module holds.

    Raises:
        InputError: inputs, axes or names do not fit the module or one another.
        CheckpointError: a target or a tensor of the checkpoint does not exist, or has another shape.
        DeltaError: the layout does not fit the generator or the targets.
        UnsupportedError: the module cannot be traced so.
    """
    with _evaluating([module] if generator is None else [module, generator.module]):
        base = _Described(module, example_inputs, dynamic_shapes, input_names or {}, "the module")
        made = None if generator is None else _Described.of(generator)
        spec = _spec(module, targets, max_rank, generator, made)
        all_axes = _axes([base] if made is None else [base, made], axes or {}, max_batch)
        inputs = dict(base.inputs)
        if made is not None:
            _share(inputs, made.inputs)
        names = _outputs(base.run(module), outputs)
        _check_names([*inputs, GATE, *spec.tensors(), *names.values()])
        deltas = [
            TensorSpec(name, "float32", (DELTA_BATCH, *shape)) for name, shape in spec.tensors().items()
        ]
        graphs = []
        if generator is not None and made is not None:
            given = [TensorSpec(name, "float32", (BATCH, *shape)) for name, shape in spec.tensors().items()]
            generate = _Generate(generator.module, made.order, generator.layout, spec)
            graphs.append(GraphSpec(GENERATOR, generate, list(made.inputs.values()), given))
        gate = TensorSpec(GATE, "float32", (BATCH,))
        apply = _Apply(module, base.order, spec, list(names))
        graphs.append(
            GraphSpec(
                BASE, apply, [*base.inputs.values(), gate, *deltas], [Inferred(n) for n in names.values()]
            )
        )
        weights = {BASE: _Weights.of(module, checkpoint)}
        if generator is not None:
            weights[GENERATOR] = _Weights.of(generator.module, generator.checkpoint)
        traced = [_trace(graph, all_axes) for graph in graphs]
    return Traced(spec, all_axes, inputs, traced, list(names.values()), weights)


class _Described:
    """A module's inputs: how ``forward`` takes them, and what the bundle says about them.

    Attributes:
        inputs: tensor's name in the bundle → its dtype and shape, in order.
        order: the parameter of ``forward`` for each input, or None where they go by position.
        dims: axes that were given as ``torch.export.Dim``, with their limits.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Inputs,
        shapes: Shapes | None,
        renamed: Mapping[str, str],
        what: str,
    ):
        _check_dtypes(module, what)
        self.what = what
        self.order: tuple[str | None, ...]
        if isinstance(examples, Mapping):
            parameters, self.order = tuple(examples), tuple(examples)
            self.examples = tuple(examples.values())
        else:
            self.examples = tuple(examples)
            parameters = _parameters(module, len(self.examples))
            self.order = (None,) * len(self.examples)
        if not self.examples:
            raise InputError(f"There are no example inputs for {what}", "Expected at least one tensor")
        for name in renamed:
            if name not in parameters:
                raise InputError(
                    f"input_names renames {name!r}", f"The inputs of {what} are {', '.join(parameters)}"
                )
        self.dims: dict[str, Axis] = {}
        self.inputs: dict[str, TensorSpec] = {}
        for parameter, example, dimensions in zip(
            parameters, self.examples, self._dimensions(parameters, shapes)
        ):
            if not isinstance(example, Tensor):
                raise InputError(
                    f"The example input {parameter!r} of {what} is a {type(example).__name__}",
                    "Inputs of a graph are tensors",
                    "Wrap the module so that its forward takes tensors alone",
                )
            name = renamed.get(parameter, parameter)
            shape = self._shape(parameter, example, dimensions)
            self.inputs[name] = TensorSpec(name, str(example.dtype).removeprefix("torch."), shape)
        if not any(tensor.shape[:1] == (BATCH,) for tensor in self.inputs.values()):
            raise InputError(
                f"No input of {what} has the axis {BATCH!r} first",
                "Deltas differ from sample to sample, along this axis",
                "Name axis 0 of an input so in dynamic_shapes",
            )

    @classmethod
    def of(cls, generator: Generator) -> _Described:
        return cls(
            generator.module,
            generator.example_inputs,
            generator.dynamic_shapes,
            generator.input_names,
            "the generator",
        )

    def _dimensions(self, parameters: Sequence[str], shapes: Shapes | None) -> Sequence[Dimensions]:
        if shapes is None:
            return [{0: BATCH} if isinstance(t, Tensor) and t.ndim else None for t in self.examples]
        if not isinstance(shapes, Mapping):
            if len(shapes) != len(parameters):
                raise InputError(
                    f"dynamic_shapes has {len(shapes)} entries for {self.what}",
                    f"Expected one for each of {', '.join(parameters)}",
                )
            return shapes
        for name in shapes:
            if name not in parameters:
                raise InputError(
                    f"dynamic_shapes names {name!r}", f"The inputs of {self.what} are {', '.join(parameters)}"
                )
        return [shapes.get(name) for name in parameters]

    def _shape(self, parameter: str, example: Tensor, dimensions: Dimensions) -> tuple[int | str, ...]:
        shape: list[int | str] = list(example.shape)
        if dimensions is None:
            entries: list[tuple[int, Any]] = []
        elif isinstance(dimensions, Mapping):
            entries = list(dimensions.items())
        else:
            if len(dimensions) != example.ndim:
                raise InputError(
                    f"dynamic_shapes gives {parameter!r} {len(dimensions)} axes",
                    f"The example has {example.ndim}, {list(example.shape)}",
                )
            entries = list(enumerate(dimensions))
        for position, dimension in entries:
            if not -example.ndim <= position < example.ndim:
                raise InputError(
                    f"dynamic_shapes names axis {position} of {parameter!r}",
                    f"The example has {example.ndim} axes, {list(example.shape)}",
                )
            name = self._axis(parameter, dimension, int(example.shape[position]))
            if name is not None:
                shape[position] = name
        return tuple(shape)

    def _axis(self, parameter: str, dimension: Any, size: int) -> str | None:
        """The name of a free axis, or None for one that is fixed."""
        if dimension is None or dimension == size:
            return None
        if isinstance(dimension, str):
            return dimension
        if type(dimension) is not Dim:
            raise InputError(
                f"dynamic_shapes gives {dimension!r} for an axis of {parameter!r}, which has size {size}",
                "Expected a name, a torch.export.Dim with a name, None, or the size itself",
            )
        largest = dimension.max if dimension.max < 2**31 else 0  # torch's infinity is no limit
        self.dims[dimension.__name__] = Axis(max(dimension.min, 1), int(largest))
        return str(dimension.__name__)

    def run(self, module: nn.Module) -> dict[str, Any]:
        """What the module makes of the example inputs, by name."""
        try:
            with torch.no_grad(), traceable(module):
                return flatten(_call(module, self.order, self.examples))
        except Exception as error:  # whatever a module raises
            raise InputError(
                f"{self.what[0].upper()}{self.what[1:]} cannot be run on its example inputs "
                f"({type(error).__name__}: {error})",
                "Expected inputs that its forward takes",
                "Correct example_inputs",
            ) from error


def _call(module: nn.Module, order: Sequence[str | None], inputs: Sequence[Tensor]) -> Any:
    named = {name: tensor for name, tensor in zip(order, inputs) if name is not None}
    return module(**named) if named else module(*inputs)


class _Apply(nn.Module):
    """The traced module: its inputs, the gate, then the deltas in the order of ``spec.tensors()``."""

    def __init__(
        self, module: nn.Module, order: Sequence[str | None], spec: DeltaSpec, outputs: Sequence[str]
    ):
        super().__init__()
        self.model = module
        self.order, self.names, self.outputs = tuple(order), tuple(spec.tensors()), tuple(outputs)
        self.injection = inject(module, spec)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(self.order)
        with self.injection as injection:
            injection.set(dict(zip(self.names, inputs[count + 1 :])), inputs[count])
            made = flatten(_call(self.model, self.order, inputs[:count]))
        return tuple(made[name] for name in self.outputs)


class _Generate(nn.Module):
    """The hypernetwork and its layout's conversion: its inputs to the deltas of ``spec``."""

    def __init__(self, module: nn.Module, order: Sequence[str | None], layout: Layout, spec: DeltaSpec):
        super().__init__()
        self.generator = module
        self.order, self.layout, self.spec = tuple(order), layout, spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = flatten(_call(self.generator, self.order, inputs))
        return tuple(self.layout.deltas(made, self.spec).values())


@dataclass(frozen=True)
class _Weights:
    """Where a component's parameters are."""

    tensors: Any  # a WeightSource, or tensors in memory
    checkpoint: Path | None

    @classmethod
    def of(cls, module: nn.Module, checkpoint: str | Path | None) -> _Weights:
        if checkpoint is None:
            return cls({name: _held(name, value) for name, value in module.state_dict().items()}, None)
        path = Path(checkpoint)
        index = SafetensorsIndex.from_file(path) if path.is_file() else SafetensorsIndex.from_folder(path)
        return cls(index, path.parent if path.is_file() else path)


def _held(name: str, value: Tensor) -> HeldTensor:
    def data() -> bytes:
        if value.is_meta:
            raise InputError(
                f"The parameter {name!r} has no data",
                "Expected a checkpoint that holds it",
                "Give `checkpoint`, or load the module",
            )
        return bytes(value.detach().cpu().contiguous().numpy().tobytes())

    dtype = {
        torch.float32: "F32",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.bool: "BOOL",
        torch.uint8: "U8",
    }
    return HeldTensor(dtype.get(value.dtype, str(value.dtype)), tuple(value.shape), data)


def _spec(
    module: nn.Module,
    targets: Sequence[str],
    max_rank: int | None,
    generator: Generator | None,
    made: _Described | None,
) -> DeltaSpec:
    if max_rank is not None and max_rank < 1:
        raise InputError(f"max_rank is {max_rank}", "Expected 1 or more")
    if generator is None or made is None:
        if not targets:
            raise InputError(
                "Nothing takes deltas", "Expected targets, or a generator", "Name modules, such as ['q_proj']"
            )
        return DeltaSpec.from_patterns(module, targets, max_rank or DEFAULT_RANK)
    from hywu_export.deltas.modules import find, refusal, target_of

    able = {path: target_of(path, m, 1) for path, m in module.named_modules() if refusal(m) is None}
    rows = {path: target.out_features for path, target in able.items()}
    deltas = generator.layout.deltas(made.run(generator.module), out_features=rows)
    suffix = ".lora_A"
    ranks = {
        name.removesuffix(suffix): int(a.shape[1]) for name, a in deltas.items() if name.endswith(suffix)
    }
    if max_rank is not None and max(ranks.values(), default=0) > max_rank:
        raise DeltaError(
            f"The generator makes deltas of rank {max(ranks.values())}",
            f"max_rank is {max_rank}",
            "Raise it, or leave it out",
        )
    spec = DeltaSpec(tuple(find(module, path, max_rank or rank) for path, rank in ranks.items()))
    if targets:
        wanted = {t.module for t in DeltaSpec.from_patterns(module, targets, 1).targets}
        if wanted != set(ranks):
            other = sorted(wanted ^ set(ranks))[0]
            raise DeltaError(
                f"{other!r} is {'a target' if other in wanted else 'made by the generator'}, but not "
                f"{'made by the generator' if other in wanted else 'a target'}",
                "Expected the same modules",
                "Leave `targets` out to take the generator's",
            )
    return spec


def _axes(
    described: Sequence[_Described], given: Mapping[str, Axis | tuple[int, int]], max_batch: int
) -> dict[str, Axis]:
    """The free axes of all inputs, with their limits."""
    used = [d for module in described for t in module.inputs.values() for d in t.shape if isinstance(d, str)]
    dims = {name: axis for module in described for name, axis in module.dims.items()}
    axes: dict[str, Axis] = {}
    for name in dict.fromkeys(used):
        limits = given.get(name, dims.get(name, Axis(1, max_batch) if name == BATCH else None))
        axis = Axis(*limits) if isinstance(limits, tuple) else limits
        if axis is None or (axis.of is None and axis.max < max(axis.min, 2)):
            raise InputError(
                f"The axis {name!r} has {'no limits' if axis is None or not axis.max else 'one size only'}",
                "A free axis has a smallest and a largest size",
                f"Give axes={{{name!r}: (smallest, largest)}}, or fix it",
            )
        axes[name] = axis
    for name in given:
        if name not in axes and not any(axis.of == name for axis in axes.values()):
            raise InputError(
                f"axes gives limits for {name!r}",
                f"The free axes of the inputs are {', '.join(axes)}",
                "Name it in dynamic_shapes, or leave it out",
            )
    axes |= {name: a for name, a in given.items() if name not in axes and isinstance(a, Axis)}
    axes[DELTA_BATCH] = Axis(1, axes[BATCH].max, one_or=BATCH)
    return axes


def _share(inputs: dict[str, TensorSpec], others: Mapping[str, TensorSpec]) -> None:
    """Add a generator's inputs to the module's; one that both have is one tensor."""
    for name, tensor in others.items():
        if inputs.setdefault(name, tensor) != tensor:
            mine = inputs[name]
            raise InputError(
                f"Both the module and the generator have an input {name!r}, {mine.dtype} {list(mine.shape)} "
                f"and {tensor.dtype} {list(tensor.shape)}",
                "Inputs of one name are one tensor",
                f"Rename one: input_names={{{name!r}: …}}",
            )


def _outputs(made: Mapping[str, Any], asked: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Name in what ``forward`` returns → name in the bundle."""
    names = dict(asked) if isinstance(asked, Mapping) else {name: name for name in asked or made}
    for name in names:
        if name not in made:
            raise InputError(
                f"The module returns no {name!r}", f"It returns {', '.join(made)}", "Correct `outputs`"
            )
        if not isinstance(made[name], Tensor):
            raise InputError(
                f"The module's result {name!r} is a {type(made[name]).__name__}",
                "Outputs of a graph are tensors",
                "Name those that are in `outputs`",
            )
    if not names:
        raise InputError("There are no outputs", "Expected at least one tensor")
    return names


def _check_names(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(
                f"Two tensors of the bundle would be called {name!r}",
                "Inputs, outputs, the gate and the deltas have names of their own",
                "Rename it with input_names, or with a mapping for outputs",
            )
        seen.add(name)


def _parameters(module: nn.Module, count: int) -> tuple[str, ...]:
    """Names for so many inputs that are given by position: those of ``forward``."""
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{index}" for index in range(count - len(names))]
        elif parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            names.append(parameter.name)
    if len(names) < count:
        raise InputError(
            f"There are {count} example inputs", f"The module's forward takes {', '.join(names) or 'none'}"
        )
    return tuple(names[:count])


def _check_dtypes(module: nn.Module, what: str) -> None:
    for name, value in module.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise UnsupportedError(
                f"The parameter {name!r} of {what} is {str(value.dtype).removeprefix('torch.')}",
                "Graphs compute in float32; other precisions are variants that are made afterwards",
                "Call module.float() first",
            )


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the modules are in evaluation mode."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _trace(graph: GraphSpec, axes: Mapping[str, Axis]) -> TracedGraph:
    traced = trace_graph(graph, axes)
    check(traced.model, axes, traced.inputs, traced.outputs, graph.name, MORE_OPERATORS)
    return traced
