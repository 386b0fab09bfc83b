"""LoRA adapters, as PEFT and diffusers save them, to deltas. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_export.bundle.sources import SafetensorsIndex, TensorLocation, read_json_object
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, nearest
from hywu_runtime.errors import CheckpointError, DeltaError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn

FloatArray = npt.NDArray[np.float32]

_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_DENOISERS = ("unet", "transformer")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Settings of peft.LoraConfig that the adapter's result does not depend on, or that are handled below. Any
# other one that is set would be a feature that is unknown here, and ignoring it would give wrong images.
# `fan_in_fan_out` concerns merging into a transposed weight only: A and B have the same form with it.
_KNOWN_SETTINGS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform
    lora_alpha lora_dropout megatron_config megatron_core peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules task_type use_rslora velora_config
    """.split()  # noqa: SIM905
)
# The others (pissa, olora, corda, loftq, ...) also change the base's weights, which the adapter then relies
# on.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")

_LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FOREIGN_KEYS = (
    (r"lora_embedding_[AB]", "a LoRA of an embedding"),
    (r"lora_magnitude_vector|dora_scale", "a DoRA magnitude"),
    (r"lora_[AB](\.[^.]+)?\.bias", "a LoRA bias"),
    (r"\bhada_|\blokr_|\boft_", "a LoHa, LoKr or OFT factor"),
    (
        r"lora_(unet|te\d?|transformer)_|lora[._](up|down)\b|\.processor\.",
        "a LoRA in the layout of another tool",
    ),
    (r"^text_encoder", "a LoRA of the text encoder"),
)


@dataclass(frozen=True)
class LoraPair:
    """One module's LoRA: ``a`` [r, in] or [r, in, kh, kw], ``b`` [out, r] with the scale folded in."""

    a: FloatArray
    b: FloatArray

    def target(self, module: str) -> DeltaTarget:
        """The target that this pair fits exactly, as the delta of ``module``."""
        rank, features, *kernel = self.a.shape
        if not kernel:
            return DeltaTarget(module, "linear", features, len(self.b), rank)
        return DeltaTarget(module, "conv", features, len(self.b), rank, (kernel[0], kernel[1]))


def peft_to_deltas(
    path: str | Path, spec: DeltaSpec | None = None, module: nn.Module | None = None
) -> dict[str, FloatArray]:
    """The deltas, with D = 1, that do what a LoRA adapter does.

    The scale, alpha / r or alpha / sqrt(r), is folded into B.

    Args:
        path: the folder that PEFT's ``save_pretrained`` writes, or the ``pytorch_lora_weights.safetensors``
            of diffusers (or its folder), whose ``unet.`` or ``transformer.`` part is taken.
        spec: ranks are padded with zeros to those of its targets, and targets without LoRA get zeros. None
            takes the modules and ranks of the adapter itself.
        module: the base model, to check the modules and dimensions against; None trusts the adapter or
            ``spec``.

    Returns:
        float32 arrays by the names of ``spec.tensors()``, in that order.

    Raises:
        CheckpointError: files are missing, damaged, contradictory, or do not fit ``module``.
        UnsupportedError: the adapter is more than LoRA of Linear and Conv2d.
        DeltaError: the adapter changes a module that is not in ``spec``, has a larger rank or other
            dimensions than ``spec``, or numbers that are not finite.
    """
    pairs = read_adapter(path)
    if spec is None:
        spec = DeltaSpec(tuple(pair.target(name) for name, pair in pairs.items()))
    if module is not None:
        from hywu_export.deltas.modules import resolve

        resolve(module, spec)
    modules = [target.module for target in spec.targets]
    for name in pairs:
        if name not in modules:
            raise DeltaError(
                f"The adapter changes the module {name!r}, which takes no deltas",
                "Expected an adapter of modules that take them",
                nearest(name, modules),
            )
    deltas: dict[str, FloatArray] = {}
    for target in spec.targets:
        shapes = target.tensors()
        a, b = (np.zeros((1, *shapes[name]), np.float32) for name in (target.a_name, target.b_name))
        if target.module in pairs:
            _fill(target, pairs[target.module], a, b)
        deltas[target.a_name], deltas[target.b_name] = a, b
    return deltas


def _fill(target: DeltaTarget, pair: LoraPair, a: FloatArray, b: FloatArray) -> None:
    """Put ``pair`` into the first ranks of ``a`` [1, R, in, ...] and ``b`` [1, out, R]."""
    rank = len(pair.a)
    if rank > target.rank:
        raise DeltaError(
            f"The adapter's LoRA of module {target.module!r} has rank {rank}",
            f"At most rank {target.rank}, which is what the module takes",
            "Reduce the adapter's rank, or export with a larger one",
        )
    if pair.a.shape[1:] != a.shape[2:] or len(pair.b) != b.shape[1]:
        raise DeltaError(
            f"The adapter has A {list(pair.a.shape)} and B {list(pair.b.shape)} for module {target.module!r}",
            f"Expected A [r, {', '.join(map(str, a.shape[2:]))}] and B [{b.shape[1]}, r]",
            "Check that the adapter was made for this base model",
        )
    a[0, :rank], b[0, :, :rank] = pair.a, pair.b


def read_adapter(path: str | Path) -> dict[str, LoraPair]:
    """The LoRA of every module that the adapter at ``path`` changes, by module path; see `peft_to_deltas`.

    Raises:
        CheckpointError: files are missing, damaged or contradictory.
        UnsupportedError: the adapter is more than LoRA of Linear and Conv2d.
        DeltaError: numbers are not finite.
    """
    path = Path(path)
    weights, is_peft = _locate(path)
    index = SafetensorsIndex.from_file(weights)
    config: Mapping[str, Any] | None
    if is_peft:
        config, prefix = read_json_object(weights.with_name(_PEFT_CONFIG)), _PEFT_PREFIX
    elif any(key.startswith(_PEFT_PREFIX) for key in index):
        raise CheckpointError(
            f"{weights} was saved by PEFT, but its scale is unknown",
            f"Expected {_PEFT_CONFIG} beside it",
            "Fetch the whole folder of the adapter",
        )
    else:
        prefix = next(
            (f"{name}." for name in _DENOISERS if any(key.startswith(f"{name}.") for key in index)), ""
        )
        config = _diffusers_config(weights, prefix)
    scaling = _Scaling(config, weights)
    halves: dict[str, dict[str, FloatArray]] = {}
    adapters = set()
    for key, location in index.items():
        name, side, adapter = _parse_key(key, prefix, weights)
        adapters.add(adapter)
        if len(adapters) > 1:
            raise UnsupportedError(
                f"{weights} holds more than one adapter", "One adapter per file", "Save it alone"
            )
        halves.setdefault(name, {})[side] = _read(key, location)
    if not halves:
        raise CheckpointError(f"{weights} holds no LoRA", "Expected lora_A and lora_B tensors")
    return {name: _pair(name, half, scaling, weights) for name, half in halves.items()}


def _locate(path: Path) -> tuple[Path, bool]:
    """The weights file, and whether it is PEFT's, with a configuration beside it, or else diffusers'."""
    if path.suffix in _PICKLES:
        raise _pickled(path)
    if path.is_file():
        return path, path.with_name(_PEFT_CONFIG).is_file()
    is_peft = (path / _PEFT_CONFIG).is_file()
    weights = path / (_PEFT_WEIGHTS if is_peft else _DIFFUSERS_WEIGHTS)
    if weights.is_file():
        return weights, is_peft
    if weights.with_suffix(".bin").is_file():
        raise _pickled(weights.with_suffix(".bin"))
    raise CheckpointError(
        f"{path} is not a LoRA adapter",
        f"Expected a folder with {_PEFT_CONFIG} and {_PEFT_WEIGHTS}, or a {_DIFFUSERS_WEIGHTS}",
        "Check the path",
    )


def _pickled(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} is pickled, and loading it could run code",
        "Expected safetensors",
        "If you trust it, load it with PEFT or diffusers and save it again: they write safetensors",
    )


def _diffusers_config(weights: Path, prefix: str) -> Mapping[str, Any] | None:
    """The LoRA configuration in the file's metadata. Without one, alpha is r, as diffusers has it."""
    from safetensors import safe_open

    with safe_open(weights, "numpy") as file:
        text = (file.metadata() or {}).get(_DIFFUSERS_METADATA)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{weights}: the metadata {_DIFFUSERS_METADATA} is not JSON: {error}",
            "",
            "Save the adapter again",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{weights}: the metadata {_DIFFUSERS_METADATA} is not a JSON object")
    return {key[len(prefix) :]: value for key, value in config.items() if key.startswith(prefix)} or None


def _parse_key(key: str, prefix: str, weights: Path) -> tuple[str, str, str | None]:
    """Module path, 'A' or 'B', and the adapter's name if the key has one."""
    for pattern, what in _FOREIGN_KEYS:
        if re.search(pattern, key):
            raise UnsupportedError(
                f"{weights}: the tensor {key!r} is {what}",
                "Only LoRA of Linear and Conv2d in the denoiser is supported, with PEFT's names",
                "Load the adapter in diffusers, keep the LoRA of the denoiser, and save that",
            )
    match = _LORA_KEY.fullmatch(key)
    if match is None or not key.startswith(prefix):
        raise UnsupportedError(
            f"{weights}: the tensor {key!r} is not a LoRA",
            f"Expected {prefix}<module path>.lora_A.weight or .lora_B.weight",
            "Save the adapter without further trained weights",
        )
    return match["path"][len(prefix) :], match["side"], match["adapter"]


def _read(key: str, location: TensorLocation) -> FloatArray:
    """The tensor in float32, which holds every float16 and bfloat16 exactly."""
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if location.dtype not in dtypes:
        raise UnsupportedError(
            f"{location.file}: the tensor {key!r} has dtype {location.dtype}",
            f"Expected one of {', '.join(dtypes)}",
            "Save the adapter in one of these",
        )
    with location.file.open("rb") as file:
        file.seek(location.offset)
        raw = np.frombuffer(file.read(location.length), dtypes[location.dtype]).reshape(location.shape)
    array = (raw.astype("<u4") << 16).view("<f4") if location.dtype == "BF16" else raw.astype(np.float32)
    if not np.isfinite(array).all():
        raise DeltaError(f"{location.file}: the tensor {key!r} holds numbers that are not finite")
    return array


def _pair(name: str, halves: Mapping[str, FloatArray], scaling: _Scaling, weights: Path) -> LoraPair:
    if len(halves) != 2:
        raise CheckpointError(
            f"{weights}: the module {name!r} has only lora_{'/'.join(halves)}", "Expected A and B"
        )
    a, b = halves["A"], halves["B"]
    if b.ndim == 4 and b.shape[2:] == (1, 1):
        b = b[:, :, 0, 0]
    if a.ndim not in (2, 4) or b.ndim != 2 or len(a) != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise CheckpointError(
            f"{weights}: the module {name!r} has lora_A {list(a.shape)} and lora_B {list(halves['B'].shape)}",
            "Expected [r, in] and [out, r], or [r, in, kh, kw] and [out, r, 1, 1]",
        )
    with np.errstate(over="ignore"):
        b = (b * scaling(name, len(a))).astype(np.float32)
    if not np.isfinite(b).all():
        raise DeltaError(f"{weights}: lora_B of module {name!r} is not finite after scaling")
    return LoraPair(a, b)


class _Scaling:
    """The scale of each module's LoRA by PEFT's rules; 1 where there is no configuration.

    Raises:
        CheckpointError: the configuration is malformed.
        UnsupportedError: it asks for more than LoRA.
    """

    def __init__(self, config: Mapping[str, Any] | None, source: Path):
        self.source = source
        self.config = config
        if config is None:
            return
        self._refuse_unsupported(config)
        number = (int, float)
        self.rank = self._value("r", None, int, lambda value: value > 0)
        self.alpha = self._value("lora_alpha", None, number, math.isfinite)
        self.ranks = self._pattern("rank_pattern", int, lambda value: value > 0)
        self.alphas = self._pattern("alpha_pattern", number, math.isfinite)

    def __call__(self, module: str, rank: int) -> float:
        """The factor of ``module``, whose A has ``rank``."""
        if self.config is None:
            return 1.0
        expected = self._lookup(self.ranks, module, self.rank)
        if rank != expected:
            raise CheckpointError(
                f"{self.source}: the LoRA of module {module!r} has rank {rank}",
                f"Expected {expected} by its settings",
            )
        alpha: float = self._lookup(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @staticmethod
    def _lookup(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
        return next((value for pattern, value in patterns.items() if pattern.match(module)), default)

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise self._unsupported(f"is of type {kind!r}")
        init = config.get("init_lora_weights")
        if not isinstance(init, bool) and init not in _PLAIN_INITS:
            raise self._unsupported(
                f"was initialised with {init!r}, which changes the base's weights as well"
            )
        if config.get("bias", "none") != "none":
            raise self._unsupported(f"trained biases (bias = {config['bias']!r})")
        for name in sorted(config.keys() - _KNOWN_SETTINGS):
            if config[name]:
                raise self._unsupported(f"uses {name} = {config[name]!r}")

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"The adapter {self.source} {what}",
            "Only plain LoRA is supported",
            "Convert or retrain it as plain LoRA",
        )

    def _value(
        self, name: str, value: Any, kind: type | tuple[type, ...], valid: Callable[[Any], bool]
    ) -> Any:
        """``value``, or the setting ``name`` if None, checked to be a ``valid`` number of ``kind``."""
        assert self.config is not None
        value = self.config.get(name) if value is None else value
        if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
            raise CheckpointError(
                f"{self.source}: the adapter's {name} is {value!r}", "Expected a usable number"
            )
        return value

    def _pattern(
        self, name: str, kind: type | tuple[type, ...], valid: Callable[[Any], bool]
    ) -> dict[re.Pattern[str], Any]:
        """A ``*_pattern`` setting, whose keys are regular expressions for the last parts of a module path."""
        assert self.config is not None
        entries = self.config.get(name) or {}
        if not isinstance(entries, Mapping):
            raise CheckpointError(f"{self.source}: the adapter's {name} is {entries!r}", "Expected an object")
        patterns = {}
        for key, value in entries.items():
            try:
                pattern = re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise CheckpointError(
                    f"{self.source}: {key!r} in the adapter's {name} is no pattern: {error}"
                ) from error
            patterns[pattern] = self._value(f"{name}[{key!r}]", value, kind, valid)
        return patterns
