"""What a family gives the exporter: components, and a plan of graphs and of the program that wires them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from hywu_export.deltas.spec import DeltaSpec
from hywu_export.tracing.spec import Axis, GraphSpec, TensorSpec
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, ProvidedTensor, State

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from hywu_export.families.components import Component
    from hywu_export.schedules import ScheduleTable


LONG_TEXT = "long"
"""The tokenizer whose length may be chosen at export, as diffusers' max_sequence_length, has this name."""


@dataclass(frozen=True)
class Limits:
    """Limits of the axes: ``max_size`` is the longest side, ``area`` the default working size, in pixels.

    ``text_length`` are the tokens of a prompt, where the pipeline leaves them open (`LONG_TEXT`). VAEs work
    in tiles of at most ``tile`` pixels a side if a picture may be larger. ``images`` is the number of
    pictures that each request has.
    """

    max_batch: int = 8
    max_size: int | None = None
    area: int | None = None
    text_length: int | None = None
    tile: int | None = None
    images: int = 1


@dataclass(frozen=True)
class TextEncoding:
    """How a pipeline brings texts to token ids: the tokenizer's ``folder``; the rest as in the manifest.

    The length is that of the text tensors which use it. ``name`` is that of the file in the bundle, the
    folder's by default. ``pad_id`` is given where the folder's own settings are not to be asked, but its
    ``tokenizer.json`` taken as it is; without ``special_tokens``, what that file would add to a text is left
    out.
    """

    folder: Path
    template: str = "{}"
    pad_side: Literal["left", "right"] = "right"
    truncate: bool = True
    lowercase: bool = False
    name: str | None = None
    pad_id: int | None = None
    special_tokens: bool = True


@dataclass
class Plan:
    """A bundle, or a part of one, before tracing; parts are merged with `add`.

    Attributes:
        graphs: what to trace.
        axes: the axes that the graphs' shapes name.
        tensors: tensors that the runtime provides.
        program: calls in order.
        state, guidance, image: as in the manifest.
        result: the tensor that holds the edited image, if any.
        tokenizers: what text tensors are encoded with, by the name that these give.
        strength: the part of the steps that runs by default, where an edit starts from the photo; the
            family's schedules then have a ``start``.
        steps: the pipeline's own default, if the sampler takes it.
    """

    graphs: list[GraphSpec] = field(default_factory=list)
    axes: dict[str, Axis] = field(default_factory=dict)
    tensors: dict[str, ProvidedTensor] = field(default_factory=dict)
    program: list[Call] = field(default_factory=list)
    state: list[State] = field(default_factory=list)
    guidance: list[Guidance] = field(default_factory=list)
    image: ImagePolicy | None = None
    result: str | None = None
    tokenizers: dict[str, TextEncoding] = field(default_factory=dict)
    strength: float | None = None
    steps: int | None = None

    def add(self, part: Plan) -> None:
        """Take in a part whose calls are of the request phase, to run after this plan's own of that phase,
        but before those that read what the part makes."""
        made = {output.name for graph in part.graphs for output in graph.outputs}
        reads = {graph.name: {value.name for value in graph.inputs} for graph in self.graphs}
        at = next(
            (
                index
                for index, call in enumerate(self.program)
                if call.phase in ("step", "final")
                or made & {call.inputs.get(name, name) for name in reads[call.graph]}
            ),
            len(self.program),
        )
        self.program[at:at] = part.program
        self.graphs += part.graphs
        self.axes |= part.axes
        self.tensors |= part.tensors


@dataclass(frozen=True)
class ConditionSource:
    """What a base offers to a condition encoder: hidden states of the instruction, latents of the photo."""

    text: TensorSpec
    latents: TensorSpec


@dataclass(frozen=True)
class ComputedCondition:
    """A base that computes the condition itself.

    Attributes:
        part: graphs and calls that make ``inputs`` from what the base's own plan provides.
        inputs: tensors of the condition, on the way.
        join: a module that makes of them the condition ``[B, n, input_dim]``, and its mask, boolean ``[B,
        n]``:
            what is false is padding.
    """

    part: Plan
    inputs: Sequence[TensorSpec]
    join: nn.Module


@dataclass(frozen=True)
class ReferenceEdit:
    """One edit, of one photo, by the pipeline itself.

    Attributes:
        photo: uint8 ``[H, W, 3]``, at the working size.
        prompt: what the base is told.
        sampler, steps: how it samples.
        latents: standard normal, float32 ``[1, C, h, w]``.
        seed: of the ``torch.Generator`` that the scheduler draws its noise from, in the shape of ``latents``.
        guidance: scale by name.
        strength: the part of the steps that runs; None for a family whose edits start from noise.
        text_length: tokens of the prompt; None is the pipeline's own choice.
        negative_prompt: what guidance leads away from.
        more_photos: those after the first, for a pipeline that takes several.
    """

    photo: npt.NDArray[np.uint8]
    prompt: str
    sampler: str
    steps: int
    latents: npt.NDArray[np.float32]
    seed: int
    guidance: Mapping[str, float]
    strength: float | None = None
    text_length: int | None = None
    negative_prompt: str = ""
    more_photos: tuple[npt.NDArray[np.uint8], ...] = ()


class Family(Protocol):
    """One base pipeline, opened from its folder. Construction checks what can be without weights."""

    pipeline_class: str
    denoiser: str  # the component that deltas act on
    default_targets: tuple[str, ...]
    scheduler: tuple[str | type, Mapping[str, Any]]  # class, or its name, and settings of the pipeline's own

    def __init__(self, folder: Path): ...

    @property
    def components(self) -> Mapping[str, Component]: ...

    @property
    def condition_source(self) -> ConditionSource | ComputedCondition: ...

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        """Graphs and program of the base with the deltas of ``spec`` as inputs.

        ``base_prompt`` is what the base is told instead of the instruction, if the generator was trained that
        way. ``coefficients`` is the length of a row of the schedule.
        """
        ...

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        """What diffusers' own pipeline makes of ``edit`` in float32, without deltas: uint8 ``[H, W, 3]``."""
        ...


@runtime_checkable
class OwnSchedule(Protocol):
    """A family whose step graph gives a schedule's rows a meaning of its own, and so makes the tables."""

    def schedule(self, sampler: str, max_steps: int) -> ScheduleTable:
        """The table of a sampler, by short name or class, for step counts up to ``max_steps``.

        Raises:
            InputError, UnsupportedError: the sampler does not exist, or does not go with this pipeline.
        """
        ...
