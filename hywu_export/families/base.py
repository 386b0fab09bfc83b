"""What a family gives the exporter: components, and a plan of graphs and of the program that wires them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hywu_export.deltas.spec import DeltaSpec
from hywu_export.tracing.spec import Axis, GraphSpec, TensorSpec
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, ProvidedTensor, State

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hywu_export.families.components import Component


@dataclass(frozen=True)
class Limits:
    """Limits of the axes: ``max_size`` is the longest side, ``area`` the default working size, in pixels.

    VAEs work in tiles of at most ``tile`` pixels a side if a picture may be larger.
    """

    max_batch: int = 8
    max_size: int | None = None
    area: int | None = None
    tile: int | None = None


@dataclass(frozen=True)
class TextEncoding:
    """How a pipeline brings texts to token ids: the tokenizer's ``folder``; the rest as in the manifest.

    The length is that of the text tensors which use it.
    """

    folder: Path
    template: str = "{}"
    pad_side: Literal["left", "right"] = "right"


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

    def add(self, part: Plan) -> None:
        """Take in a part whose calls are of the request phase, to run after this plan's own of that phase."""
        phases = [call.phase for call in self.program]
        at = phases.index("step") if "step" in phases else len(phases)
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
class ReferenceEdit:
    """One edit, of one photo, by the pipeline itself.

    Attributes:
        photo: uint8 ``[H, W, 3]``, at the working size.
        prompt: what the base is told.
        sampler, steps: how it samples.
        latents: standard normal, float32 ``[1, C, h, w]``.
        seed: of the ``torch.Generator`` that the scheduler draws its noise from, in the shape of ``latents``.
        guidance: scale by name.
    """

    photo: npt.NDArray[np.uint8]
    prompt: str
    sampler: str
    steps: int
    latents: npt.NDArray[np.float32]
    seed: int
    guidance: Mapping[str, float]


class Family(Protocol):
    """One base pipeline, opened from its folder. Construction checks what can be without weights."""

    pipeline_class: str
    denoiser: str  # the component that deltas act on
    default_targets: tuple[str, ...]
    scheduler: tuple[str, Mapping[str, Any]]  # class name and configuration of the pipeline's own

    def __init__(self, folder: Path): ...

    @property
    def components(self) -> Mapping[str, Component]: ...

    @property
    def condition_source(self) -> ConditionSource: ...

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        """Graphs and program of the base with the deltas of ``spec`` as inputs.

        ``base_prompt`` is what the base is told instead of the instruction, if the generator was trained that
        way. ``coefficients`` is the length of a row of the schedule.
        """
        ...

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        """What diffusers' own pipeline makes of ``edit`` in float32, without deltas: uint8 ``[H, W, 3]``."""
        ...
