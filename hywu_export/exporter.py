"""From checkpoints to a bundle: the whole job of ``hywu export``."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hywu_runtime.errors import CheckpointError, InputError
from hywu_runtime.manifest import Guidance, Licence, Manifest, Results, Sampler, Schedules, Tokenizer

if TYPE_CHECKING:
    from hywu_export.bundle.writer import BundleWriter
    from hywu_export.deltas import DeltaSpec
    from hywu_export.families.base import Family, Limits, Plan
    from hywu_export.families.generator import GeneratorPart
    from hywu_export.schedules import ScheduleTable

log = logging.getLogger(__name__)

DEFAULT_STEPS = 20
SCHEDULE_FILE = "schedule.safetensors"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """What may be chosen about an export; None is the checkpoint's or the family's own choice.

    Attributes:
        targets: module patterns that take deltas, for a base without a generator.
        lora: a PEFT adapter whose targets and ranks the bundle takes, instead of ``targets``.
        max_rank: rank of those deltas.
        samplers: names of samplers; the first is the default.
        max_steps: largest step count in the schedule.
        steps, guidance: defaults of an edit.
        max_batch, max_size, size: limits, and the side in pixels of the default working area.
        link_weights: leave the weights in the checkpoints.
        overwrite: replace an existing bundle.
    """

    targets: Sequence[str] = ()
    lora: Path | None = None
    max_rank: int = 16
    samplers: Sequence[str] = ()
    max_steps: int = 100
    steps: int | None = None
    guidance: Mapping[str, float] = field(default_factory=dict)
    max_batch: int = 8
    max_size: int | None = None
    size: int | None = None
    link_weights: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rank", "max_steps", "steps", "max_batch", "max_size", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}", "Expected 1 or more", "Choose another value")
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
) -> Manifest:
    """Write the bundle ``out`` from a diffusers pipeline folder, a generator folder, or both.

    ``progress(what, done, total)`` is called before each stage.

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
    if generator is not None and (options.targets or options.lora):
        raise InputError(
            "Targets were given beside a generator",
            "The generator's own targets are the bundle's",
            "Leave out --targets and --lora, or the generator",
        )
    job = _Job(None if base is None else Path(base), None if generator is None else Path(generator), options)
    total = len(job.plan.graphs) + 2
    tell = progress or (lambda what, done, total: None)
    with BundleWriter(out, overwrite=options.overwrite, validate=Manifest.from_dict) as writer:
        for done, graph in enumerate(job.plan.graphs):
            tell(f"tracing {graph.name}", done, total)
            job.add_graph(writer, graph)
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

        self.options = options
        self.folders = {"base": base, "generator": generator}
        self.generator = None if generator is None else GeneratorPart(generator)
        self.family = None if base is None else open_base(base)
        self.spec: DeltaSpec | None = None
        self.tables: dict[str, ScheduleTable] = {}
        columns, base_prompt = 0, None
        if self.family is None:
            _refuse_options_of_a_base(options)
        else:
            self.spec = _delta_spec(self.family, self.generator, options)
            self.tables = _schedules(self.family, options)
            columns = next(iter(self.tables.values())).coefficients.shape[1]
            base_prompt = None if self.generator is None else self.generator.defaults.base_prompt
        area = None if options.size is None else options.size**2
        limits = Limits(options.max_batch, options.max_size, area)
        self.plan = make_plan(self.family, self.generator, self.spec, limits, base_prompt, columns)
        self.guidance = self._guidance()
        self.default_steps = self._default_steps()
        folders = dict.fromkeys(encoding.folder for encoding in self.plan.tokenizers.values())
        self.tokenizers = {folder: _open_tokenizer(folder) for folder in folders}

    def add_graph(self, writer: BundleWriter, graph: Any) -> None:
        from hywu_export.passes import check
        from hywu_export.tracing import trace

        traced = trace(graph, self.plan.axes)
        check(traced.model, self.plan.axes, traced.inputs, traced.outputs, graph.name)
        writer.add_graph(traced)

    def sections(self, writer: BundleWriter) -> dict[str, object]:
        """Add weights and files to the writer; return the sections of the manifest that it cannot know."""
        from hywu_runtime.codec import encode

        plan, options = self.plan, self.options
        licences = [
            _add_source(writer, source, folder)
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
            "axes": {name: axis.to_dict() for name, axis in plan.axes.items()},
            "tensors": encode(plan.tensors),
            "program": encode(plan.program),
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
        return asked or min(max(trained or DEFAULT_STEPS, low), high)

    def _add_tokenizers(self, writer: BundleWriter) -> dict[str, Tokenizer]:
        paths = {folder: f"tokenizer/{folder.name}.json" for folder in self.tokenizers}
        for folder, (file, _) in self.tokenizers.items():
            writer.add_file(paths[folder], file)
        texts = [tensor for tensor in self.plan.tensors.values() if tensor.source == "text"]
        lengths = {text.tokenizer: text.shape[1] for text in texts}
        entries = {}
        for name, encoding in self.plan.tokenizers.items():
            _, pad_id = self.tokenizers[encoding.folder]
            entries[name] = Tokenizer(
                paths[encoding.folder],
                int(lengths[name]),
                pad_id,
                encoding.pad_side,
                template=encoding.template,
            )
        return entries

    def _add_schedules(self, writer: BundleWriter) -> Schedules:
        from hywu_export.schedules import write_schedules

        with tempfile.TemporaryDirectory() as folder:
            write_schedules(Path(folder) / SCHEDULE_FILE, self.tables)
            writer.add_file(SCHEDULE_FILE, Path(folder) / SCHEDULE_FILE)
        samplers = {
            name: Sampler(table.class_name, table.step_range(), table.stochastic)
            for name, table in self.tables.items()
        }
        return Schedules(SCHEDULE_FILE, next(iter(self.tables)), self.default_steps, samplers)


def make_plan(
    family: Family | None,
    generator: GeneratorPart | None,
    spec: DeltaSpec | None,
    limits: Limits,
    base_prompt: str | None,
    coefficients: int,
) -> Plan:
    """The plan of a bundle of ``family`` with its ``spec``, of ``generator``, or of both.

    The rest is as for `Family.plan`.
    """
    from hywu_export.tracing import Axis

    if family is None or spec is None:
        assert generator is not None
        plan = generator.plan(None, None)
        plan.axes["batch"] = Axis(1, limits.max_batch)
        return plan
    plan = family.plan(spec, limits, base_prompt, coefficients)
    if generator is not None:
        plan.add(generator.plan(spec, family.condition_source))
    return plan


def _refuse_options_of_a_base(options: ExportOptions) -> None:
    for name in ("targets", "lora", "samplers", "steps", "max_size", "size"):
        if getattr(options, name):
            raise InputError(
                f"The option {name} was given without a base",
                "A generator alone has no targets, no sampler and no pictures",
                "Leave it out, or give the base",
            )


def _delta_spec(family: Family, generator: GeneratorPart | None, options: ExportOptions) -> DeltaSpec:
    from hywu_export.deltas import DeltaSpec

    denoiser = family.components[family.denoiser].module
    if generator is not None:
        return generator.spec(denoiser)
    if options.lora is not None:
        return DeltaSpec.from_peft(options.lora, denoiser)
    return DeltaSpec.from_patterns(denoiser, options.targets or family.default_targets, options.max_rank)


def _schedules(family: Family, options: ExportOptions) -> dict[str, ScheduleTable]:
    from hywu_export.schedules import make_scheduler, sampler_name, trace_scheduler

    own, config = family.scheduler
    tables: dict[str, ScheduleTable] = {}
    for sampler in options.samplers or (own,):
        scheduler = make_scheduler(sampler, config)
        tables[sampler_name(scheduler)] = trace_scheduler(scheduler, options.max_steps)
    history = max(table.history for table in tables.values())
    return {name: table.widen(history) for name, table in tables.items()}


_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def _open_tokenizer(folder: Path) -> tuple[bytes, int]:
    """A tokenizer as a file of the ``tokenizers`` library, and the id that it pads with."""
    from transformers import AutoTokenizer

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


def _add_source(writer: BundleWriter, source: str, folder: Path) -> Licence:
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
