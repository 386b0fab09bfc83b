"""The manifest of a bundle: typed, validated, and written back deterministically.

``docs/bundle.md`` says what every section means. The dataclasses here have the same names for the same
things. Reading is strict: what a bundle may say is decided in one place, here and in
:mod:`hywu_runtime.validation`, so that nothing behind it checks again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from hywu_runtime import codec
from hywu_runtime.codec import Rule
from hywu_runtime.errors import BundleError

FORMAT = 1
FILE_NAME = "manifest.json"
MAX_BYTES = 64 * 2**20
MAX_DIMENSION = 2**31 - 1


def is_safe_path(path: str) -> bool:
    """Whether ``path`` is relative, normal and portable, so that it cannot leave its directory."""
    return (
        len(path) <= 1024
        and not re.search(r'[\x00-\x1f\x7f\\:*?"<>|]', path)
        and all(part not in ("", ".", "..") and not part.endswith((" ", ".")) for part in path.split("/"))
        and not any(0xD800 <= ord(c) <= 0xDFFF for c in path)
    )


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 512 and text.isprintable()


Name: TypeAlias = Annotated[str, Rule("a name of 1 to 512 printable characters", _is_name)]
FilePath: TypeAlias = Annotated[
    str,
    Rule(
        "a relative path with `/` between parts, without `..`, `.`, empty parts, drives or backslashes",
        is_safe_path,
    ),
]
Template: TypeAlias = Annotated[
    str,
    Rule(
        "a text of at most 65536 characters with `{}` in it once",
        lambda s: s.count("{}") == 1 and len(s) <= 65536,
    ),
]
Digest: TypeAlias = Annotated[
    str, Rule("64 lower-case hexadecimal digits", lambda s: re.fullmatch("[0-9a-f]{64}", s) is not None)
]
Count: TypeAlias = Annotated[int, Rule("an integer of at least 0", lambda n: n >= 0)]
Size: TypeAlias = Annotated[
    int, Rule(f"an integer from 1 to {MAX_DIMENSION}", lambda n: 1 <= n <= MAX_DIMENSION)
]
Shape: TypeAlias = Annotated[tuple[Size | Name, ...], Rule("at most 8 dimensions", lambda s: len(s) <= 8)]
Dtype: TypeAlias = Literal["uint8", "int32", "int64", "float16", "float32"]
WeightDtype: TypeAlias = Literal[
    "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool"
]
Precision: TypeAlias = Literal["fp16", "bf16", "int8", "int8-weights"]
ComputeCapability: TypeAlias = Annotated[
    str,
    Rule('a compute capability as "8.6"', lambda c: re.fullmatch("[1-9][0-9]?[.][0-9]", c) is not None),
]
SizeRange: TypeAlias = Annotated[
    tuple[Size, ...],
    Rule("three integers: smallest, best, largest", lambda s: len(s) == 3 and s[0] <= s[1] <= s[2]),
]
Phase: TypeAlias = Literal["load", "request", "step", "final"]
PHASES: tuple[Phase, ...] = ("load", "request", "step", "final")
ITEM_SIZES = {
    "uint8": 1,
    "int8": 1,
    "bool": 1,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}


@dataclass(frozen=True)
class Producer:
    """The program that wrote the bundle."""

    name: Name
    version: Name


@dataclass(frozen=True)
class File:
    """One file of the bundle: size in bytes and SHA-256."""

    size: Count
    sha256: Digest


@dataclass(frozen=True)
class Term:
    """A part of a size: ``times`` the product of the sizes of the axes ``of``, divided by ``divide``."""

    of: Annotated[tuple[Name, ...], Rule("at most 4 names of axes", lambda o: len(o) <= 4)] = ()
    times: Size = 1
    divide: Size = 1

    def size(self, sizes: Mapping[str, int]) -> int | None:
        """Its value, or None where the size of an axis is not known."""
        if any(name not in sizes for name in self.of):
            return None
        return self.times * math.prod(sizes[name] for name in self.of) // self.divide


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: limits (``min``, ``max``, ``multiple``, ``one_or``), ``of`` another, ``divide``d, or a
    ``sum`` of terms."""

    min: Size | None = None
    max: Size | None = None
    multiple: Size = 1
    one_or: Name | None = None
    of: Name | None = None
    divide: Size | None = None
    sum: Annotated[tuple[Term, ...], Rule("1 to 16 terms", lambda s: 1 <= len(s) <= 16)] = ()

    @property
    def derived(self) -> bool:
        """Whether its size follows from those of other axes."""
        return self.of is not None or bool(self.sum)

    @property
    def terms(self) -> tuple[Term, ...]:
        """A derived axis as a sum."""
        return self.sum if self.of is None else (Term((self.of,), divide=self.divide or 1),)

    def size(self, sizes: Mapping[str, int]) -> int | None:
        """The size of a derived axis, or None where that of an axis that it depends on is not known."""
        parts = [term.size(sizes) for term in self.terms]
        return None if None in parts else sum(part for part in parts if part is not None)


@dataclass(frozen=True)
class Resize:
    """How a photograph is brought to another size: sides are multiples of ``multiple``; areas in pixels."""

    filter: Literal["lanczos", "bicubic"]
    multiple: Size
    area: Size | None = None
    min_area: Size | None = None
    max_area: Size | None = None


@dataclass(frozen=True)
class ProvidedTensor:
    """A tensor that the runtime provides; ``source`` says from what, the other keys depend on it."""

    dtype: Dtype
    shape: Shape
    source: Literal["image", "text", "mask", "noise", "schedule", "guidance", "gate", "input"]
    text: Name | None = None
    constant: str | None = None
    tokenizer: Name | None = None
    of: Name | None = None
    draw: Literal["initial", "step"] | None = None
    column: Literal["initial_scale", "timesteps", "coefficients", "start"] | None = None
    guidance: Name | None = None
    index: Count | None = None
    origin: Name | None = field(default=None, metadata={"key": "from"})
    resize: tuple[Resize, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the tensor has another value in every step."""
        return self.draw == "step" or self.column in ("timesteps", "coefficients")


@dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: Name
    dtype: Dtype
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """An ONNX file and its signature.

    ``stage``: where it runs if there are several devices. ``stage_of``: the graph that it is a part of; the
    parts run one after another. Information only.
    """

    file: FilePath
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    stage: Annotated[int, Rule("an integer from 0 to 255", lambda n: 0 <= n <= 255)] = 0
    stage_of: Name | None = None


@dataclass(frozen=True)
class Implementation:
    """Where in the toolchain a graph's code lives. Information only."""

    file: Name
    class_name: Name = field(metadata={"key": "class"})


@dataclass(frozen=True)
class Call:
    """One use of a graph. ``inputs``, ``outputs``: the graph's name to tensor; others keep their name."""

    graph: Name
    phase: Phase
    inputs: Mapping[Name, Name] = field(default_factory=dict)
    outputs: Mapping[Name, Name] = field(default_factory=dict)
    guided: bool | None = None
    implementation: Implementation | None = None

    def runs(self, guided: bool) -> bool:
        """Whether the call belongs to guided (or unguided) requests."""
        return self.guided is None or self.guided == guided


@dataclass(frozen=True)
class Results:
    """What the program is for."""

    image: Name | None = None
    deltas: tuple[Name, ...] = ()
    outputs: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Zeros:
    """An initial state of zeros."""

    zeros: Shape


@dataclass(frozen=True)
class State:
    """A tensor carried from step to step."""

    tensor: Name
    next: Name
    initial: Name | Zeros


@dataclass(frozen=True)
class Sampler:
    """One table of the schedule file. ``steps`` are the smallest and the largest step count.

    ``order`` is the number of evaluations that a step of the sampler stands for, where it may start midway.
    """

    class_name: Name = field(metadata={"key": "class"})
    steps: Annotated[
        tuple[Size, ...], Rule("two integers, smallest first", lambda s: len(s) == 2 and s[0] <= s[1])
    ]
    stochastic: bool = False
    order: Size | None = None


@dataclass(frozen=True)
class Strength:
    """How much of the schedule a request runs that starts midway, from its photo: 1 is all of it."""

    default: Annotated[float, Rule("a number above 0 and at most 1", lambda s: 0 < s <= 1)]


@dataclass(frozen=True)
class Schedules:
    """The schedule file and its samplers."""

    file: FilePath
    default: Name
    default_steps: Size
    samplers: Mapping[Name, Sampler]
    strength: Strength | None = None


@dataclass(frozen=True)
class Guidance:
    """A guidance scale; a request is guided only if it is above ``above``, or at least ``at_least``."""

    name: Name
    default: float
    above: float | None = None
    at_least: float | None = None

    @property
    def decides(self) -> bool:
        """Whether the scale has a say in whether a request is guided; otherwise graphs merely read it."""
        return self.above is not None or self.at_least is not None

    def satisfied(self, scale: float) -> bool:
        """Whether ``scale`` asks for guidance."""
        if self.above is not None:
            return scale > self.above
        return self.at_least is not None and scale >= self.at_least


def is_guided(guidance: Iterable[Guidance], scales: Mapping[str, Iterable[float]] | None = None) -> bool:
    """Whether a request is guided: there is a condition, and each one holds for at least one sample.

    ``scales``: the values of each scale, one per sample; None stands for the defaults.
    """
    deciding = [scale for scale in guidance if scale.decides]
    return bool(deciding) and all(
        any(map(scale.satisfied, (scale.default,) if scales is None else scales[scale.name]))
        for scale in deciding
    )


@dataclass(frozen=True)
class ImagePolicy:
    """How a photograph's size becomes a working size; lengths in pixels. ``sizes``: (width, height)."""

    tensor: Name
    multiple: Size
    min: Size
    max: Size
    default_area: Size
    sizes: tuple[Annotated[tuple[Size, ...], Rule("a width and a height", lambda s: len(s) == 2)], ...] = ()
    enlarge: bool = False


@dataclass(frozen=True)
class DeltaTarget:
    """A module that takes a delta."""

    module: Name
    kind: Literal["linear", "conv", "experts"]
    in_features: Size = field(metadata={"key": "in"})
    out_features: Size = field(metadata={"key": "out"})
    rank: Size
    kernel: Annotated[tuple[Size, ...], Rule("two integers", lambda k: len(k) == 2)] | None = None
    experts: Size | None = None

    def shapes(self, rank: int | None = None) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape without the leading delta batch, at ``rank`` or the target's own."""
        r = self.rank if rank is None else rank
        kernel = self.kernel or ()
        experts = () if self.experts is None else (self.experts,)
        return {
            f"{self.module}.lora_A": (*experts, r, self.in_features, *kernel),
            f"{self.module}.lora_B": (*experts, self.out_features, r),
        }


@dataclass(frozen=True)
class DeltaSpec:
    """Which deltas the bundle takes."""

    rank: Size
    gate: Name
    axis: Name
    targets: tuple[DeltaTarget, ...]

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape without the leading delta batch, in the order of ``targets``."""
        return {name: shape for target in self.targets for name, shape in target.shapes().items()}


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer file and how prompts are brought to one length."""

    file: FilePath
    max_length: Annotated[int, Rule("an integer from 1 to 1048576", lambda n: 1 <= n <= 2**20)]
    pad_id: Annotated[int, Rule("a token id", lambda n: 0 <= n < 2**31)]
    pad_side: Literal["left", "right"] = "right"
    truncate: bool = True
    template: Template = "{}"
    lowercase: bool = False


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint file that linked weights point into."""

    size: Count
    header_sha256: Digest


@dataclass(frozen=True)
class Source:
    """A checkpoint that the bundle was made from."""

    name: str
    licence: str | None = None
    files: Mapping[FilePath, SourceFile] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkedTensor:
    """Where an initializer's bytes are: little-endian, row-major, ``offset`` from the start of the file."""

    source: Name
    file: FilePath
    offset: Count
    length: Count
    dtype: WeightDtype
    shape: Annotated[tuple[Count, ...], Rule("at most 8 dimensions", lambda s: len(s) <= 8)]


@dataclass(frozen=True)
class Variant:
    """The graphs in another precision, with the same signatures. Graphs not named keep their file."""

    precision: Precision
    graphs: Mapping[Name, FilePath]
    report: FilePath | None = None


@dataclass(frozen=True)
class Engine:
    """Compiled graphs for a device. ``shapes``: axis to its smallest, best and largest size.

    ``sources`` are the files that it was built from, with the hash they had: where one has changed since,
    the engine is stale.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: Name
    compute_capabilities: Annotated[
        tuple[ComputeCapability, ...], Rule("at least one compute capability", lambda c: len(c) > 0)
    ]
    shapes: Mapping[Name, SizeRange]
    graphs: Mapping[Name, FilePath]
    sources: Mapping[FilePath, Digest]
    variant: Name | None = None
    device: Name | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    report: FilePath | None = None

    def covers(self, axes: Mapping[str, int]) -> str | None:
        """The first of the axes whose size the engine does not take, or None."""
        for name, (low, _, high) in self.shapes.items():
            if name in axes and not low <= axes[name] <= high:
                return name
        return None


@dataclass(frozen=True)
class Licence:
    """The licence of a source, and the file of the bundle with its text."""

    of: Name
    licence: str | None = None
    file: FilePath | None = None


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest. Build it and pass it to :func:`dumps`, or :meth:`read` one; both validate."""

    format: Literal[1]
    name: str
    family: str | None
    producer: Producer
    files: Mapping[FilePath, File]
    axes: Mapping[Name, Axis]
    tensors: Mapping[Name, ProvidedTensor]
    graphs: Mapping[Name, Graph]
    program: tuple[Call, ...]
    results: Results
    state: tuple[State, ...] = ()
    schedules: Schedules | None = None
    guidance: tuple[Guidance, ...] = ()
    image: ImagePolicy | None = None
    deltas: DeltaSpec | None = None
    tokenizers: Mapping[Name, Tokenizer] = field(default_factory=dict)
    sources: Mapping[Name, Source] = field(default_factory=dict)
    linked: Mapping[FilePath, Mapping[Name, LinkedTensor]] = field(default_factory=dict)
    variants: Mapping[Name, Variant] = field(default_factory=dict)
    engines: Mapping[Name, Engine] = field(default_factory=dict)
    licences: tuple[Licence, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Reads and validates a bundle's manifest.

        Args:
            path: the bundle directory or its ``manifest.json``.
        Raises:
            BundleError: there is no manifest, or it is not a valid one; the message names the key.
        """
        path = Path(path)
        try:
            path = path / FILE_NAME if path.is_dir() else path
            if path.exists() and not path.is_file():
                raise ValueError("not a file")
            with path.open("rb") as stream:
                text = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BundleError(
                f"No bundle can be read at {codec.show(str(path), 300)}: {reason}",
                f"Expected a directory with a {FILE_NAME}",
                "Check the path, or make a bundle with `hywu export`",
            ) from None
        if len(text) > MAX_BYTES:
            raise BundleError(
                f"{FILE_NAME} is larger than {MAX_BYTES >> 20} MiB",
                "A manifest names files, it does not hold them",
                "Copy or export the bundle again",
            )
        return cls.from_dict(codec.parse(text))

    @classmethod
    def from_dict(cls, value: Any) -> Manifest:
        """The manifest in ``value``, plain JSON values.

        Raises:
            BundleError: not a valid manifest; the message names the key.
        """
        if not isinstance(value, dict):
            raise codec.malformed("(top level)", f"is {codec.show(value)}", "an object")
        version = value.get("format")
        if isinstance(version, bool) or version != FORMAT:
            raise BundleError(
                f"manifest.json: `format` is {codec.show(version)}",
                f"This version of hywu_runtime reads format {FORMAT}",
                "Install a version that reads it, or export the bundle again with this one",
            )
        try:
            manifest: Manifest = codec.decode(cls, value, "")
        except RecursionError:
            raise codec.malformed("(top level)", "nests too deeply", "a manifest of format 1") from None
        manifest.validate()
        return manifest

    def validate(self) -> None:
        """Checks what types cannot: references, the program's data flow, shapes.

        Raises:
            BundleError: naming the key.
        """
        from hywu_runtime.validation import validate

        validate(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without keys at their default; ``from_dict`` gives an equal manifest back."""
        result: dict[str, Any] = codec.encode(self)
        return result

    def dumps(self) -> str:
        """The text of ``manifest.json``: the same manifest gives the same bytes.

        Raises:
            BundleError: the manifest is not valid.
        """
        value = self.to_dict()
        Manifest.from_dict(value)
        return json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n"

    @cached_property
    def signatures(self) -> dict[str, Value]:
        """Every tensor of the bundle with its dtype and shape: provided, made by calls, carried, deltas."""
        found: dict[str, Value] = {
            name: Value(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()
        }
        if self.deltas is not None:
            for name, shape in self.deltas.tensors.items():
                found[name] = Value(name, "float32", (self.deltas.axis, *shape))
        for call in self.program:
            for value in self.graphs[call.graph].outputs:
                name = call.outputs.get(value.name, value.name)
                found.setdefault(name, Value(name, value.dtype, value.shape))
        for state in self.state:
            if state.next in found:
                found[state.tensor] = Value(state.tensor, found[state.next].dtype, found[state.next].shape)
        return found

    @cached_property
    def least_sizes(self) -> dict[str, int]:
        """The smallest size of every axis."""
        own = {name: axis.min or 1 for name, axis in self.axes.items() if not axis.derived}
        return own | {name: axis.size(own) or 1 for name, axis in self.axes.items() if axis.derived}

    def stale(self, engine: str) -> str | None:
        """The first file that an engine was built from and that is another one by now, or None."""
        for path, digest in self.engines[engine].sources.items():
            entry = self.files.get(path)
            if entry is None or entry.sha256 != digest:
                return path
        return None

    def reads(self, call: Call) -> dict[str, str]:
        """A call's graph inputs: graph name to tensor name."""
        return {v.name: call.inputs.get(v.name, v.name) for v in self.graphs[call.graph].inputs}

    def writes(self, call: Call) -> dict[str, str]:
        """A call's graph outputs: graph name to tensor name."""
        return {v.name: call.outputs.get(v.name, v.name) for v in self.graphs[call.graph].outputs}
