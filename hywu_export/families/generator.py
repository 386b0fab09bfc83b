"""The parameter generator and its condition encoder, as graphs beside any base or alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from hywu_export.bundle.sources import SafetensorsIndex, read_json_object
from hywu_export.deltas.spec import DeltaSpec, generator_paths
from hywu_export.families.base import ComputedCondition, ConditionSource, Plan
from hywu_export.generator import GeneratorConfig, ParameterGenerator, load_condition_encoder
from hywu_export.generator.checkpoint import check_checkpoint
from hywu_export.generator.network import FOLD_BYTES
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError
from hywu_runtime.manifest import Call, Implementation, ProvidedTensor

MAX_CONDITION_LENGTH = 32768  # tokens; the released editor's limit is 22800


@dataclass(frozen=True)
class GenerationDefaults:
    """How a pair was trained to be used, from ``generation_config.json`` beside the generator's config.

    Attributes:
        base_prompt: what the base is told instead of the instruction; None gives it the instruction.
        steps: evaluations of the denoiser.
        guidance: scale by name (``text``, ``image``, ``true_cfg``), where it is not the pipeline's default.
    """

    base_prompt: str | None = None
    steps: int | None = None
    guidance: Mapping[str, float] | None = None

    @classmethod
    def read(cls, folder: Path) -> GenerationDefaults:
        """The defaults in ``folder``; empty ones where it has no such file.

        Raises:
            CheckpointError: the file is damaged or holds a value of the wrong type.
        """
        path = folder / "generation_config.json"
        if not path.exists():
            return cls()
        data = read_json_object(path)
        number = (int, float)
        kinds = {
            "base_prompt": (str,),
            "num_inference_steps": (int,),
            "guidance_scale": number,
            "image_guidance_scale": number,
            "true_cfg_scale": number,
        }
        for key, kind in kinds.items():
            value = data.get(key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise CheckpointError(
                    f"{path}: {key} is {value!r}",
                    f"Expected {' or '.join(k.__name__ for k in kind)}",
                    "Correct it",
                )
        scales = {
            "text": data.get("guidance_scale"),
            "image": data.get("image_guidance_scale"),
            "true_cfg": data.get("true_cfg_scale"),
        }
        return cls(
            data.get("base_prompt"),
            data.get("num_inference_steps"),
            {name: float(scale) for name, scale in scales.items() if scale is not None},
        )


class Generate(nn.Module):
    """Condition ``[B, L, input_dim]`` to deltas in the order and shapes of ``shapes``, alpha / rank in B."""

    def __init__(self, generator: ParameterGenerator, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.generator = generator
        self.shapes = dict(shapes)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        made = self.generator.deltas(condition)
        # A convolution's A comes flat from the generator: [B, r, in·kh·kw].
        return tuple(made[name].reshape(-1, *shape) for name, shape in self.shapes.items())


class GenerateFromParts(Generate):
    """As `Generate`, from parts that ``join`` makes one condition of."""

    def __init__(self, generator: ParameterGenerator, shapes: Mapping[str, tuple[int, ...]], join: nn.Module):
        super().__init__(generator, shapes)
        self.join = join

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        made = self.generator.deltas(*self.join(*parts))
        return tuple(made[name].reshape(-1, *shape) for name, shape in self.shapes.items())


class Condition(nn.Module):
    """What the base computed, to the generator's condition."""

    def __init__(self, condition_encoder: nn.Module):
        super().__init__()
        self.condition_encoder = condition_encoder

    def forward(self, text: Tensor, latents: Tensor) -> tuple[Tensor]:
        return (self.condition_encoder(text, latents),)


class GeneratorPart:
    """A generator checkpoint, checked on construction and ready to be planned.

    Raises:
        CheckpointError: generator, condition encoder or ``targets.json`` is damaged or inconsistent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = GeneratorConfig.from_file(folder / "config.json")
        self.index = check_checkpoint(folder)
        targets = folder / "targets.json"
        self.targets = targets if targets.exists() else None
        self.condition_encoder = load_condition_encoder(folder)
        self.defaults = GenerationDefaults.read(folder)

    @property
    def weights(self) -> dict[str, SafetensorsIndex]:
        """Component name → where its weights are."""
        weights = {"generator": self.index}
        if self.condition_encoder is not None:
            folder = self.folder / "condition_encoder"
            weights["condition_encoder"] = SafetensorsIndex.from_folder(folder, "model")
        return weights

    def spec(self, denoiser: nn.Module) -> DeltaSpec:
        """The targets in the base's denoiser."""
        return DeltaSpec.from_generator(self.config, self.targets, denoiser)

    @cached_property
    def _module(self) -> ParameterGenerator:
        config = self.config
        module = fake_module(lambda: ParameterGenerator(config))
        size = 4 * config.num_base_model_layers * module.layout.hw * config.d_model
        if size > FOLD_BYTES:
            return module
        return ParameterGenerator.from_pretrained(self.folder).fold_condition_independent(FOLD_BYTES)

    def plan(self, spec: DeltaSpec | None, source: ConditionSource | ComputedCondition | None) -> Plan:
        """Graphs and calls that make the deltas of ``spec``; without a base, under the generator's own names.

        With a condition encoder and a ``source``, or a base that computes it, the condition is computed;
        otherwise it is an input.
        """
        made = self._outputs(spec)
        encoder = self.condition_encoder
        plan = Plan()
        shapes = {key: shape for key, (_, shape) in made.items()}
        outputs = [TensorSpec(name, "float32", ("batch", *shape)) for name, shape in made.values()]
        if isinstance(source, ComputedCondition) and encoder is None:
            width = source.inputs[0].shape[-1]
            if width != self.config.input_dim:
                raise CheckpointError(
                    f"The base's condition has {width} channels",
                    f"The generator's config.json says input_dim = {self.config.input_dim}",
                    "Use a generator that was trained for this base",
                )
            plan.add(source.part)
            module = GenerateFromParts(self._module, shapes, source.join)
            plan.graphs.append(GraphSpec("generator", module, source.inputs, outputs))
            plan.program.append(Call("generator", "request"))
            return plan
        if encoder is not None and isinstance(source, ConditionSource):
            condition = self._computed_condition(encoder, source)
            plan.graphs.append(
                GraphSpec("condition", Condition(encoder), [source.text, source.latents], [condition])
            )
            kind = type(encoder)
            implementation = Implementation(kind.__module__.replace(".", "/") + ".py", kind.__name__)
            plan.program.append(Call("condition", "request", implementation=implementation))
        else:
            condition = TensorSpec(
                "condition", "float32", ("batch", "condition_length", self.config.input_dim)
            )
            # One token would be taken for a missing axis by the generator's input form.
            plan.axes["condition_length"] = Axis(2, MAX_CONDITION_LENGTH)
            plan.tensors["condition"] = ProvidedTensor("float32", condition.shape, "input")
        plan.graphs.append(
            GraphSpec(
                "generator",
                Generate(self._module, shapes),
                [condition],
                outputs,
            )
        )
        plan.program.append(Call("generator", "request"))
        return plan

    def _computed_condition(self, encoder: nn.Module, source: ConditionSource) -> TensorSpec:
        """The condition that the encoder makes of what the base offers, of the shape that a trial gives."""
        shapes = [
            [size if isinstance(size, int) else 8 for size in t.shape] for t in (source.text, source.latents)
        ]
        width = self.config.input_dim
        try:
            with torch.no_grad():
                shape = tuple(encoder(*map(torch.zeros, shapes)).shape)
        except RuntimeError as error:
            raise CheckpointError(
                f"The condition encoder in {self.folder} does not take the base's tensors ({error})",
                f"Expected one for {shapes[0][-1]} channels of text and {shapes[1][1]} of latents",
                "Use a generator that was trained for this base",
            ) from error
        if shape[-1] != width:
            raise CheckpointError(
                f"The condition encoder in {self.folder} gives {shape[-1]} channels",
                f"The generator's config.json says input_dim = {width}",
                "Check that generator and condition encoder belong together",
            )
        return TensorSpec("condition", "float32", ("batch", shape[1], width))

    def _outputs(self, spec: DeltaSpec | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The generator's key → name in the bundle and shape without the batch."""
        layout = self._module.layout
        own = {
            slot.key(self.config.prefix, layer): slot.shape
            for layer in range(self.config.num_base_model_layers)
            for slot in layout.slots
        }
        if spec is None:
            return {key: (key, shape) for key, shape in own.items()}
        shapes = spec.tensors()
        outputs = {}
        for key, path in generator_paths(self.config, self.targets).items():
            for suffix in ("lora_A", "lora_B"):
                name = f"{path}.{suffix}"
                outputs[f"{key}.{suffix}"] = (name, shapes[name])
        return outputs
