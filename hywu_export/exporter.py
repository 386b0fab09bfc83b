"""From checkpoints to a bundle: the whole job of ``hywu export``."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hywu_export.bundle.sources import read_json_object
from hywu_export.deltas.merging import MODES, Mode
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError
from hywu_runtime.manifest import (
    Guidance,
    Licence,
    Manifest,
    Results,
    Sampler,
    Schedules,
    Strength,
    Tokenizer,
)

if TYPE_CHECKING:
    from hywu_export.bundle.writer import BundleWriter
    from hywu_export.deltas import DeltaSpec
    from hywu_export.deltas.catalogue import Resolved
    from hywu_export.families.base import Family, Limits, Plan, TextEncoding
    from hywu_export.families.generator import GeneratorPart
    from hywu_export.schedules import ScheduleTable
    from hywu_export.tracing import GraphSpec, TracedGraph

log = logging.getLogger(__name__)

DEFAULT_STEPS = 20
DEFAULT_RANK = 16
_USUAL_SIDE = 512
_PIXELS_PER_TOKEN = 16**2  # a latent of 8 x 8 pixels, and patches or a second level of 2 x 2
SCHEDULE_FILE = "schedule.safetensors"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """What may be chosen about an export; None is the checkpoint's or the family's own choice.

    Attributes:
        targets: module patterns that take deltas, for a base without a generator; those that start with
            ``<component>.`` are looked up in that component.
        loras: LoRA files whose modules the bundle takes, each with its largest rank among them.
        max_rank: rank of ``targets`` (None: 16), and the smallest one of the modules of ``loras``.
        samplers: names of samplers; the first is the default.
        max_steps: largest step count in the schedule.
        steps, guidance: defaults of an edit.
        max_batch, max_size, size: limits, and the side in pixels of the default working area.
        text_length: tokens of a prompt, where the pipeline leaves them open (its max_sequence_length).
        vae_tile: side in pixels of the VAE's tiles, if pictures may be larger.
        images: how many pictures each request has, for a pipeline that takes several.
        link_weights: leave the weights in the checkpoints.
        winograd: write 3x3 convolutions as Winograd products, for CPUs; see `hywu_export.convolutions`.
        hoist: compute once per request what no step changes.
        deltas: whether the denoiser's linear layers run deltas beside them ("low-rank"), have them merged
            into their weights once per request ("merged"), or whichever pays at the default steps and size
            ("auto"); see `hywu_export.deltas.merging`.
        stages: into how many graphs, one after another, the large ones are cut; see `hywu_export.stages`.
        overwrite: replace an existing bundle.
    """

    targets: Sequence[str] = ()
    loras: Sequence[Path] = ()
    max_rank: int | None = None
    samplers: Sequence[str] = ()
    max_steps: int = 100
    steps: int | None = None
    guidance: Mapping[str, float] = field(default_factory=dict)
    max_batch: int = 8
    max_size: int | None = None
    size: int | None = None
    text_length: int | None = None
    vae_tile: int | None = None
    images: int = 1
    link_weights: bool = False
    winograd: bool = False
    hoist: bool = True
    deltas: Mode = "low-rank"
    stages: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        positive = (
            "max_rank",
            "max_steps",
            "steps",
            "max_batch",
            "max_size",
            "size",
            "text_length",
            "vae_tile",
            "stages",
            "images",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}", "Expected 1 or more", "Choose another value")
        if self.deltas not in MODES:
            raise InputError(
                f"deltas is {self.deltas!r}", f"Expected {', '.join(MODES)}", "Choose one of these"
            )
        if self.deltas != "low-rank" and not self.hoist:
            raise InputError(
                "Merged weights were asked for in every step",
                "Merging pays where it is done once per request",
                "Leave out --no-hoist, or choose --deltas low-rank",
            )
        if self.size is not None and self.max_size is not None and self.size > self.max_size:
            raise InputError(
                f"size is {self.size}, and max_size {self.max_size}",
                "Photos are worked on at a size within the limits",
                "Raise max_size, or lower size",
            )


def export(
    out: str | Path,
    base: str | Path | None = None,
    generator: str | Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    understood: Callable[[Resolved], object] | None = None,
) -> Manifest:
    """Write the bundle ``out`` from a diffusers pipeline folder, a generator folder, or both.

    ``progress(what, done, total)`` is called before each stage, ``understood`` with every LoRA file.

    Raises:
        CheckpointError, UnsupportedError, DeltaError, InputError: what was given cannot be exported.
        BundleError: the bundle cannot be written. Nothing is left behind in any case.
    """
    from hywu_export.bundle.writer import BundleWriter

    options = options or ExportOptions()
    if base is None and generator is None:
        raise InputError(
            "There is nothing to export", "A base, a generator, or both", "Give --base or --generator"
        )
    if generator is not None and (options.targets or options.loras):
        raise InputError(
            "Targets were given beside a generator",
            "The generator's own targets are the bundle's",
            "Leave out --targets and --lora, or the generator",
        )
    job = _Job(None if base is None else Path(base), None if generator is None else Path(generator), options)
    for lora in job.loras:
        if understood is not None:
            understood(lora)
    total = len(job.plan.graphs) + 2
    tell = progress or (lambda what, done, total: None)
    with BundleWriter(out, overwrite=options.overwrite, validate=Manifest.from_dict) as writer:
        for done, graph in enumerate(job.plan.graphs):
            tell(f"tracing {graph.name}", done, total)
            job.trace(graph)
        job.add_graphs(writer)
        tell("schedules and tokenizer", total - 2, total)
        sections = job.sections(writer)
        tell("weights", total - 1, total)
        manifest = Manifest.from_dict(writer.finish(sections))
        tell("done", total, total)
    return manifest


class _Job:
    """One export. Construction opens and checks everything, so that what can fail does so at once."""

    def __init__(self, base: Path | None, generator: Path | None, options: ExportOptions):
        from hywu_export.families import open_base
        from hywu_export.families.base import Limits
        from hywu_export.families.generator import GeneratorPart
        from hywu_export.stages import Cutter

        self.options = options
        self.folders = {"base": base, "generator": generator}
        self.generator = None if generator is None else GeneratorPart(generator)
        self.family = None if base is None else open_base(base)
        self.spec: DeltaSpec | None = None
        self.tables: dict[str, ScheduleTable] = {}
        self.loras: list[Resolved] = []
        self._unread: set[str] = set()
        columns, base_prompt = 0, None
        if self.family is None:
            _refuse_options_of_a_base(options)
        else:
            self.spec = self._merged(self.family, self._delta_spec(self.family))
            self.tables = _schedules(self.family, options)
            columns = next(iter(self.tables.values())).coefficients.shape[1]
            base_prompt = None if self.generator is None else self.generator.defaults.base_prompt
        area = None if options.size is None else options.size**2
        limits = Limits(
            options.max_batch, options.max_size, area, options.text_length, options.vae_tile, options.images
        )
        self._planning = (self.family, self.generator, self.spec, limits, base_prompt, columns)
        self.plan = make_plan(*self._planning)
        _check_tiles(self.plan, options.vae_tile)
        self.cutter = Cutter(options.stages, self.plan.axes)
        self.traced: list[TracedGraph] = []
        self.guidance = self._guidance()
        self.default_steps = self._default_steps()
        self._check_start()
        encodings = {_tokenizer_path(encoding): encoding for encoding in self.plan.tokenizers.values()}
        self.tokenizers = {path: _open_tokenizer(encoding) for path, encoding in encodings.items()}

    def _delta_spec(self, family: Family) -> DeltaSpec:
        from hywu_export.deltas.catalogue import Catalogue
        from hywu_export.deltas.convert import resolve

        modules = {name: component.module for name, component in family.components.items()}
        if self.generator is not None:
            return self.generator.spec(modules[family.denoiser])
        options, rank = self.options, self.options.max_rank
        catalogue = Catalogue.from_modules(modules, family.denoiser)
        self.loras = [resolve(path, catalogue) for path in options.loras]
        spec = catalogue.spec(self.loras, rank or 1)
        others = [name for name in modules if name != family.denoiser]
        if options.targets:
            spec = spec.union(_matching(family, options.targets, rank or DEFAULT_RANK))
        if not spec.without(*others).targets:
            # Also beside those of text encoders alone: the denoiser's graphs read the gate.
            rank = rank or spec.rank or DEFAULT_RANK
            spec = spec.union(_matching(family, family.default_targets, rank))
        return spec

    def _merged(self, family: Family, spec: DeltaSpec) -> DeltaSpec:
        """With the choice of where deltas are merged: in the denoiser, the rest runs once per request."""
        from hywu_export.deltas import DeltaSpec, merging

        trained = None if self.generator is None else self.generator.defaults.steps
        steps = self.options.steps or trained or DEFAULT_STEPS
        tokens = (self.options.size or _USUAL_SIDE) ** 2 // _PIXELS_PER_TOKEN
        others = [name for name in family.components if name != family.denoiser]
        chosen = merging.choose(spec.without(*others), self.options.deltas, steps, tokens)
        merged = {target.module: target for target in chosen.targets}
        return DeltaSpec(tuple(merged.get(target.module, target) for target in spec.targets))

    def trace(self, graph: GraphSpec) -> None:
        """Traces a graph."""
        self.traced.append(self._traced(graph.name))

    def add_graphs(self, writer: BundleWriter) -> None:
        """Gives the writer the traced graphs, or what they are parted into, each of them checked."""
        from hywu_export.convolutions import accelerate
        from hywu_export.invariants import split
        from hywu_export.passes import check
        from hywu_export.stages import graphs_to_cut

        if self.options.winograd:
            before, self.traced = self.traced, [accelerate(traced, self.plan) for traced in self.traced]
            if all(new is old for new, old in zip(self.traced, before)):
                log.warning("--winograd changes nothing: at the default size it pays for no convolution")
        if self.options.hoist:
            merged = self.spec is not None and any(target.merged for target in self.spec.targets)
            self.traced = [part for traced in self.traced for part in split(traced, self.plan, merged)]
        large = graphs_to_cut(self.traced, self.options.stages)
        for traced in self.traced:
            for part in self.cutter.cut(traced) if traced.name in large else [traced]:
                axes = {**self.plan.axes, **self.cutter.axes}
                check(part.model, axes, part.inputs, part.outputs, part.name)
                writer.add_graph(part)

    def _traced(self, name: str) -> TracedGraph:
        """A graph of the plan, without the deltas that no output of it depends on.

        Models have such modules: the last layer of a text encoder of which an earlier layer's output is
        used. LoRA files change them all the same, so the bundle takes their deltas, and no graph reads them.
        """
        from hywu_export.tracing import trace

        traced = trace(_named(self.plan, name), self.plan.axes)
        deltas = set() if self.spec is None else set(self.spec.tensors())
        unread = {v.name or "" for v in traced.model.graph.inputs if not v.uses()} & deltas
        if not unread:
            return traced
        self._unread |= {delta.rpartition(".")[0] for delta in unread}
        log.info("Without effect in %s: deltas of %s", name, ", ".join(sorted(self._unread)))
        self.plan = make_plan(*self._planning, unread=self._unread)
        return trace(_named(self.plan, name), self.plan.axes)

    def sections(self, writer: BundleWriter) -> dict[str, object]:
        """Add weights and files to the writer; return the sections of the manifest that it cannot know."""
        from hywu_runtime.codec import encode

        plan, options = self.plan, self.options
        licences = [
            add_source(writer, source, folder)
            for source, folder in self.folders.items()
            if folder is not None
        ]
        if self.family is not None:
            for component in self.family.components.values():
                writer.add_weights(
                    component.name, component.tensors, source="base", link=options.link_weights
                )
        if self.generator is not None:
            for name, index in self.generator.weights.items():
                writer.add_weights(name, index, source="generator", link=options.link_weights)
        sections: dict[str, object] = {
            "family": None if self.family is None else self.family.pipeline_class,
            "axes": {name: axis.to_dict() for name, axis in {**plan.axes, **self.cutter.axes}.items()},
            "tensors": encode(plan.tensors),
            "program": encode(self.cutter.program(plan.program)),
            "results": encode(Results(plan.result, self._delta_results())),
            "state": encode(plan.state),
            "guidance": encode(self.guidance),
            "licences": encode(licences),
        }
        if plan.image is not None:
            sections["image"] = encode(plan.image)
        if self.spec is not None:
            sections["deltas"] = self.spec.to_manifest()
        if self.tokenizers:
            sections["tokenizers"] = encode(self._add_tokenizers(writer))
        if self.tables:
            sections["schedules"] = encode(self._add_schedules(writer))
        return sections

    def _delta_results(self) -> tuple[str, ...]:
        if self.generator is None:
            return ()
        made = next(graph for graph in self.plan.graphs if graph.name == "generator")
        return tuple(output.name for output in made.outputs)

    def _guidance(self) -> list[Guidance]:
        known = [scale.name for scale in self.plan.guidance]
        for name in self.options.guidance:
            if name not in known:
                raise InputError(
                    f"There is no guidance called {name!r} here",
                    f"Expected {' or '.join(known) or 'none'}",
                    "Correct the name, or leave it out",
                )
            if not math.isfinite(self.options.guidance[name]):
                raise InputError(
                    f"The guidance {name} is {self.options.guidance[name]}", "A finite number", "Correct it"
                )
        trained = {} if self.generator is None else dict(self.generator.defaults.guidance or {})
        defaults = trained | dict(self.options.guidance)
        return [
            replace(scale, default=defaults.get(scale.name, scale.default)) for scale in self.plan.guidance
        ]

    def _default_steps(self) -> int:
        """The step count asked for, or the generator's own brought into the sampler's range."""
        if not self.tables:
            return 0
        low, high = next(iter(self.tables.values())).step_range()
        asked = self.options.steps
        if asked is not None and not low <= asked <= high:
            raise InputError(
                f"The default step count is {asked}",
                f"The sampler {next(iter(self.tables))} takes {low} to {high} in this bundle",
                "Choose one of these, or a larger --max-steps",
            )
        trained = None if self.generator is None else self.generator.defaults.steps
        return asked or min(max(trained or self.plan.steps or DEFAULT_STEPS, low), high)

    def _check_start(self) -> None:
        """Whether the default sampler can do what the pipeline does by default: start midway."""
        strength = self.plan.strength
        if strength is None or strength == 1 or next(iter(self.tables.values())).order is not None:
            return
        raise InputError(
            f"The sampler {next(iter(self.tables))} cannot start midway, as a strength of {strength} asks",
            "Its steps build on earlier ones",
            "Name it after one that can: the first is the default",
        )

    def _add_tokenizers(self, writer: BundleWriter) -> dict[str, Tokenizer]:
        for path, (file, _) in self.tokenizers.items():
            writer.add_file(path, file)
        texts = [tensor for tensor in self.plan.tensors.values() if tensor.source == "text"]
        lengths = {text.tokenizer: text.shape[1] for text in texts}
        entries = {}
        for name, encoding in self.plan.tokenizers.items():
            path = _tokenizer_path(encoding)
            _, pad_id = self.tokenizers[path]
            entries[name] = Tokenizer(
                path,
                int(lengths[name]),
                pad_id,
                encoding.pad_side,
                truncate=encoding.truncate,
                template=encoding.template,
                lowercase=encoding.lowercase,
            )
        return entries

    def _add_schedules(self, writer: BundleWriter) -> Schedules:
        from hywu_export.schedules import write_schedules

        with tempfile.TemporaryDirectory() as folder:
            write_schedules(Path(folder) / SCHEDULE_FILE, self.tables)
            writer.add_file(SCHEDULE_FILE, Path(folder) / SCHEDULE_FILE)
        samplers = {
            name: Sampler(table.class_name, table.step_range(), table.stochastic, table.order)
            for name, table in self.tables.items()
        }
        strength = None if self.plan.strength is None else Strength(self.plan.strength)
        return Schedules(SCHEDULE_FILE, next(iter(self.tables)), self.default_steps, samplers, strength)


def make_plan(
    family: Family | None,
    generator: GeneratorPart | None,
    spec: DeltaSpec | None,
    limits: Limits,
    base_prompt: str | None,
    coefficients: int,
    unread: Collection[str] = (),
) -> Plan:
    """The plan of a bundle of ``family`` with its ``spec``, of ``generator``, or of both.

    ``unread`` are targets whose deltas no graph is to read. The rest is as for `Family.plan`.
    """
    from hywu_export.deltas import DeltaSpec
    from hywu_export.families.component_deltas import add_component_deltas
    from hywu_export.tracing import Axis

    if family is None or spec is None:
        assert generator is not None
        plan = generator.plan(None, None)
        plan.axes["batch"] = Axis(1, limits.max_batch)
        return plan
    others = [name for name in family.components if name != family.denoiser]
    read = DeltaSpec(tuple(target for target in spec.targets if target.module not in unread))
    plan = family.plan(read.without(*others), limits, base_prompt, coefficients)
    add_component_deltas(plan, read, others)
    if generator is not None:
        plan.add(generator.plan(spec, family.condition_source))
    return plan


def _named(plan: Plan, name: str) -> GraphSpec:
    return next(graph for graph in plan.graphs if graph.name == name)


def _refuse_options_of_a_base(options: ExportOptions) -> None:
    for name in (
        "targets", "loras", "samplers", "steps", "max_size", "size", "text_length", "vae_tile", "winograd",
    ):  # fmt: skip
        if getattr(options, name):
            raise InputError(
                f"The option {name} was given without a base",
                "A generator alone has no targets, no sampler and no pictures",
                "Leave it out, or give the base",
            )


def _check_tiles(plan: Plan, tile: int | None) -> None:
    """Tiles that were asked for are made, unless every picture fits into one."""
    if tile is None or plan.image is None or plan.image.max <= tile:
        return
    if all(graph.tile is None for graph in plan.graphs):
        raise UnsupportedError(
            f"Tiles of {tile} pixels were asked for",
            "This family's VAE takes a picture as a whole",
            "Leave out --vae-tile",
        )


def _matching(family: Family, patterns: Sequence[str], rank: int) -> DeltaSpec:
    """The targets that ``patterns`` match, each in the component that it starts with, or in the denoiser."""
    from hywu_export.deltas import DeltaSpec
    from hywu_export.deltas.catalogue import delta_name

    of: dict[str, list[str]] = {}
    for pattern in patterns:
        component, _, rest = pattern.partition(".")
        inside = rest != "" and component in family.components
        of.setdefault(component if inside else family.denoiser, []).append(rest if inside else pattern)
    spec = DeltaSpec(())
    for component in sorted(of, key=lambda name: name != family.denoiser):
        found = DeltaSpec.from_patterns(family.components[component].module, of[component], rank)
        if component != family.denoiser:
            found = DeltaSpec(
                tuple(replace(t, module=delta_name(component, t.module)) for t in found.targets)
            )
        spec = spec.union(found)
    return spec


def _schedules(family: Family, options: ExportOptions) -> dict[str, ScheduleTable]:
    from hywu_export.families.base import OwnSchedule
    from hywu_export.schedules import make_scheduler, trace_scheduler

    own, config = family.scheduler
    tables: dict[str, ScheduleTable] = {}
    for sampler in options.samplers or (own,):
        if isinstance(family, OwnSchedule):
            name = sampler if isinstance(sampler, str) else sampler.__name__
            table = family.schedule(name, options.max_steps)
        else:
            table = trace_scheduler(make_scheduler(sampler, config), options.max_steps)
        tables[table.name] = table
    history = max(table.history for table in tables.values())
    return {name: table.widen(history) for name, table in tables.items()}


_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def _tokenizer_path(encoding: TextEncoding) -> str:
    return f"tokenizer/{encoding.name or encoding.folder.name}.json"


def _open_tokenizer(encoding: TextEncoding) -> tuple[bytes, int]:
    """A tokenizer as a file of the ``tokenizers`` library, and the id that it pads with."""
    from transformers import AutoTokenizer

    folder = encoding.folder
    if encoding.pad_id is not None:
        data = read_json_object(folder / "tokenizer.json") | {"truncation": None, "padding": None}
        if not encoding.special_tokens:
            data["post_processor"] = None
        return json.dumps(data, ensure_ascii=False).encode(), encoding.pad_id
    # Without these, transformers makes a tokenizer that knows no words.
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} holds no vocabulary",
            f"Expected {' or '.join(' and '.join(names) for names in _TOKENIZER_FILES)}",
            "Fetch the checkpoint whole",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
        pad_id = int(tokenizer.pad_token_id)
    except Exception as error:  # whatever transformers raises for a damaged folder
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded ({error})",
            "Files of one tokenizer, with a padding token",
            "Fetch the checkpoint whole",
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str().encode(), pad_id


_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "license.txt", "NOTICE")


def add_source(writer: BundleWriter, source: str, folder: Path) -> Licence:
    """Declare a source and carry its licence: the name from the model card, the text from its file."""
    licence = None
    card = folder / "README.md"
    if card.exists():
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        named = header and re.search(r"^license:\s*([\w.+-]+)\s*$", header.group(1), re.MULTILINE)
        licence = named.group(1) if named else None
    writer.add_source(source, folder, name=folder.resolve().name, licence=licence)
    text = next((folder / name for name in _LICENCE_FILES if (folder / name).is_file()), None)
    if text is None:
        return Licence(source, licence)
    target = f"licences/{source}-{text.name}"
    writer.add_file(target, text)
    return Licence(source, licence, target)
