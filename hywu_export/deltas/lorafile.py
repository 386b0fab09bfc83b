"""LoRA files as people have them: PEFT's folders, diffusers' files, and those of other trainers.

Reading gives every module's A and B, with the scale in B, under the name that the file uses; which module of
a base that name means is found by `hywu_export.deltas.catalogue`. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_export.bundle.sources import SafetensorsIndex, TensorLocation, read_json_object
from hywu_export.deltas.scaling import ConfiguredScale
from hywu_export.deltas.spec import DeltaTarget
from hywu_runtime.errors import CheckpointError, DeltaError, UnsupportedError

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

DENOISER, T5 = "denoiser", "t5"  # components whose name depends on the pipeline
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

# What a name starts with → the component that it is in (None: whichever has it), whether its dots are
# underscores, and who writes so.
_PREFIXES: tuple[tuple[str, str | None, bool, str], ...] = (
    (r"lora_unet[_.]", DENOISER, True, "kohya"),
    (r"lora_te1?_", "text_encoder", True, "kohya"),
    (r"lora_te2_", "text_encoder_2", True, "kohya"),
    (r"lora_te3_", T5, True, "kohya"),
    (r"lora_transformer_", DENOISER, True, "OneTrainer"),
    (r"lycoris_", DENOISER, True, "LyCORIS"),
    (r"base_model\.model\.", None, False, "PEFT"),
    (r"(model\.)?diffusion_model\.", DENOISER, False, "ComfyUI"),
    (r"text_encoders\.clip_l\.transformer\.", "text_encoder", False, "ComfyUI"),
    (r"text_encoders\.clip_g\.transformer\.", "text_encoder_2", False, "ComfyUI"),
    (r"text_encoders\.t5xxl\.transformer\.", T5, False, "ComfyUI"),
    (r"(unet|transformer)\.", DENOISER, False, "diffusers"),
    (r"text_encoder\.", "text_encoder", False, "diffusers"),
    (r"text_encoder_2\.", "text_encoder_2", False, "diffusers"),
    (r"text_encoder_3\.", "text_encoder_3", False, "diffusers"),
    (r"", None, False, "diffusers"),
)

# What a name ends with: of PEFT, of kohya's scripts, of diffusers before it used PEFT (`to_q_lora.down`,
# `lora_linear_layer.down`) and of xlabs (`qkv_lora1.down`).
_TENSOR = re.compile(
    r"(?P<name>.+?)"
    r"(?:\.lora_(?P<peft>A|B)(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|(?:\.lora|_lora(?P<number>[12]?)|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|(?:\.lora)?\.(?P<alpha>alpha))"
)
_HALVES = {"A": "down", "B": "up"}

_MERGE = (
    "Merge it into the base and export that (diffusers: load_lora_weights, fuse_lora, save_pretrained), or "
    "extract a LoRA from the merged weights (sd-scripts: networks/extract_lora_from_models.py)"
)
_SAVE_ALONE = "Train or save the LoRA without it"
_FOREIGN = (  # pattern, what it is, what to do
    (r"\.lora_magnitude_vector|\.dora_scale", "the magnitude of a DoRA", _MERGE),
    (r"\.hada_", "a factor of a LoHa", _MERGE),
    (r"\.lokr_", "a factor of a LoKr", _MERGE),
    (r"\.(oft_|boft_|ia3_|glora_|[ab][12]\.weight$)", "of another kind of adapter", _MERGE),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding", _SAVE_ALONE),
    (r"\.(diff|w_norm)$", "a trained difference of a whole weight", _MERGE),
    (r"\.(diff_b|b_norm)$|\.bias$|\.lora_[AB](\.[^.]+)?\.bias", "a LoRA bias", "Train with bias='none'"),
    (r"^bundle_emb\.|^emb_params$|^(clip_[lg]|t5)$", "an embedding of a textual inversion", _SAVE_ALONE),
)


@dataclass(frozen=True)
class LoraPair:
    """One module's LoRA: ``a`` [r, in] or [r, in, kh, kw], ``b`` [out, r] with the scale folded in."""

    a: FloatArray
    b: FloatArray

    @property
    def rank(self) -> int:
        return len(self.a)

    def target(self, module: str) -> DeltaTarget:
        """The target that this pair fits exactly, as the delta of ``module``."""
        rank, features, *kernel = self.a.shape
        if not kernel:
            return DeltaTarget(module, "linear", features, len(self.b), rank)
        return DeltaTarget(module, "conv", features, len(self.b), rank, (kernel[0], kernel[1]))


@dataclass(frozen=True)
class Entry:
    """One module's LoRA as a file has it.

    Attributes:
        key: what the file's tensors start with, for messages.
        component: `DENOISER`, `T5`, one of `TEXT_ENCODERS`, or None where the file does not say.
        name: of the module in it, in the file's spelling.
        flat: the name has underscores in place of dots.
        pair: the matrices.
    """

    key: str
    component: str | None
    name: str
    flat: bool
    pair: LoraPair


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds; ``writer`` is the tool whose spelling it has: kohya, PEFT, diffusers, …"""

    path: Path
    writer: str
    entries: tuple[Entry, ...]

    @property
    def rank(self) -> int:
        return max(entry.pair.rank for entry in self.entries)


def read_lora(path: str | Path) -> LoraFile:
    """The LoRA at ``path``: a safetensors file, or the folder of PEFT or diffusers around one.

    A folder may also hold one PEFT folder for each component (``unet/``, ``text_encoder/``, …).

    Raises:
        CheckpointError: files are missing, damaged or contradictory.
        UnsupportedError: it is more than LoRA of Linear and Conv2d.
        DeltaError: numbers are not finite.
    """
    path = Path(path)
    parts = [part for part in _parts(path) if (part[1] / _PEFT_CONFIG).is_file()]
    if not parts:
        return replace(_read_file(*_locate(path)), path=path)
    entries: list[Entry] = []
    for component, folder in parts:
        read = _read_file(*_locate(folder)).entries
        entries += (Entry(f"{folder.name}/{e.key}", component, e.name, e.flat, e.pair) for e in read)
    return LoraFile(path, "PEFT", tuple(entries))


def _parts(path: Path) -> Iterator[tuple[str, Path]]:
    """Folders that may hold the adapter of one component each."""
    if path.is_dir() and not (path / _PEFT_CONFIG).is_file():
        for name in ("unet", "transformer"):
            yield DENOISER, path / name
        for name in TEXT_ENCODERS:
            yield name, path / name


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weights file, and the configuration beside it if it is PEFT's."""
    if path.suffix in _PICKLES:
        raise _pickled(path)
    if path.is_file():
        config = path.with_name(_PEFT_CONFIG)
        return path, config if config.is_file() else None
    is_peft = (path / _PEFT_CONFIG).is_file()
    weights = path / (_PEFT_WEIGHTS if is_peft else _DIFFUSERS_WEIGHTS)
    if weights.is_file():
        return weights, path / _PEFT_CONFIG if is_peft else None
    if weights.with_suffix(".bin").is_file():
        raise _pickled(weights.with_suffix(".bin"))
    others = list(path.glob("*.safetensors")) if path.is_dir() and not is_peft else []
    if len(others) == 1:
        return others[0], None
    raise CheckpointError(
        f"{path} is not a LoRA adapter",
        f"Expected a safetensors file, or a folder with {_PEFT_CONFIG} and {_PEFT_WEIGHTS}, or with a "
        f"{_DIFFUSERS_WEIGHTS}",
        "Give the path of the file itself" if others else "Check the path",
    )


def _pickled(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} is pickled, and loading it could run code",
        "Expected safetensors",
        "If you trust it, load it with PEFT or diffusers and save it again: they write safetensors",
    )


@dataclass
class _Module:
    """The tensors of one name: role (``down``, ``up``, ``mid``, ``alpha``) → key and place."""

    key: str
    component: str | None
    name: str
    flat: bool
    tensors: dict[str, tuple[str, TensorLocation]] = field(default_factory=dict)


def _read_file(weights: Path, config_file: Path | None) -> LoraFile:
    index = SafetensorsIndex.from_file(weights)
    configs = {
        part: ConfiguredScale(config, weights)  # first: it says what an adapter is better than its keys do
        for part, config in (_peft_config(config_file) or _diffusers_configs(weights)).items()
    }
    modules: dict[str, _Module] = {}
    writers: list[str] = []
    adapters = set()
    for key, location in index.items():
        match = _parse(key, location, weights)
        if match is None:
            continue
        if match["peft"]:
            adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise UnsupportedError(
                f"{weights} holds more than one adapter", "One adapter per file", "Save it alone"
            )
        name = match["name"] + (match["number"] or "")
        if name not in modules:
            component, rest, flat, writer = _split(name)
            writers.append("diffusers before PEFT" if match["old"] and writer == "diffusers" else writer)
            modules[name] = _Module(name, component, rest, flat)
        role = _HALVES.get(match["peft"], match["kohya"] or match["old"] or match["alpha"])
        modules[name].tensors[role] = key, location
    if not modules:
        raise CheckpointError(f"{weights} holds no LoRA", "Expected lora_A and lora_B tensors")
    scales = _Scales(weights, configs, modules)
    entries = tuple(
        Entry(key, m.component, m.name, m.flat, _pair(m, scales, weights)) for key, m in modules.items()
    )
    writer = "xlabs" if _is_xlabs(modules) else max(dict.fromkeys(writers), key=writers.count)
    return LoraFile(weights, writer, entries)


def _is_xlabs(names: Mapping[str, object]) -> bool:
    return any(re.search(r"_blocks\.\d+\.processor\.(qkv|proj)", name) for name in names)


def _parse(key: str, location: TensorLocation, weights: Path) -> re.Match[str] | None:
    """The parts of a key; None for a tensor that has no effect."""
    for pattern, what, remedy in _FOREIGN:
        if re.search(pattern, key):
            if re.search(r"\.(diff|diff_b|bias|w_norm|b_norm)$", key) and not _read(key, location).any():
                log.info("%s: %s is zero, and without effect", weights, key)
                return None
            raise UnsupportedError(
                f"{weights}: the tensor {key!r} is {what}",
                "Expected plain LoRA of linear layers and convolutions",
                remedy,
            )
    match = _TENSOR.fullmatch(key)
    if match is None:
        raise UnsupportedError(
            f"{weights}: the tensor {key!r} is not a LoRA",
            "Expected <module>.lora_A.weight and .lora_B.weight, or .lora_down.weight and .lora_up.weight",
            "Save the adapter without further trained weights",
        )
    return match


def _split(name: str) -> tuple[str | None, str, bool, str]:
    """Component, rest of the name, whether its dots are underscores, and who writes so."""
    for pattern, component, flat, writer in _PREFIXES:
        match = re.match(pattern, name)
        if match is not None:
            rest = name[match.end() :]
            if flat:
                rest = rest.replace(".", "_")
            return component, rest.replace(".processor.", "."), flat, writer
    raise AssertionError("the last prefix is empty")


class _Scales:
    """The factor of each module's B · A: from the configuration, from an ``alpha`` tensor, or 1.

    Without either alpha is r, as diffusers and kohya's scripts have it.
    """

    def __init__(self, weights: Path, configs: Mapping[str, ConfiguredScale], modules: Mapping[str, _Module]):
        self._weights, self._configs = weights, configs
        named = any("alpha" in module.tensors for module in modules.values())
        if configs and named:
            raise CheckpointError(
                f"{weights} has alpha tensors and a LoRA configuration",
                "Expected the scale to be given once",
                "Take out the metadata or adapter_config.json that does not belong to the file",
            )
        by_peft = any(key.startswith("base_model.model.") for key in modules)
        # Trainers of Flux that write BFL's names this way take alpha to be r, and so does diffusers.
        if by_peft and not configs and not named and not any("double_blocks." in key for key in modules):
            raise CheckpointError(
                f"{weights} was saved by PEFT, but its scale is unknown",
                f"Expected {_PEFT_CONFIG} beside it",
                "Fetch the whole folder of the adapter",
            )

    def __call__(self, module: _Module, rank: int) -> float:
        if "alpha" in module.tensors:
            key, location = module.tensors["alpha"]
            alpha = _read(key, location)
            if alpha.size != 1:
                raise CheckpointError(
                    f"{self._weights}: {key!r} has shape {list(alpha.shape)}", "Expected one number"
                )
            return float(alpha.reshape(())) / rank
        config = self._configs.get(module.component or "") or self._configs.get("")
        return 1.0 if config is None else config(module.name, rank)


def _peft_config(file: Path | None) -> dict[str, Mapping[str, Any]]:
    return {} if file is None else {"": read_json_object(file)}


def _diffusers_configs(weights: Path) -> dict[str, Mapping[str, Any]]:
    """LoRA configurations in the file's metadata by component, under ``""`` where none is named."""
    from safetensors import safe_open

    with safe_open(weights, "numpy") as file:
        text = (file.metadata() or {}).get(_DIFFUSERS_METADATA)
    if text is None:
        return {}
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
    configs: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        prefix, dot, setting = key.partition(".")
        part = DENOISER if prefix in ("unet", "transformer") else prefix
        if not dot:
            part, setting = "", key
        configs.setdefault(part, {})[setting] = value
    return dict(configs)


def _read(key: str, location: TensorLocation) -> FloatArray:
    """The tensor in float32, which holds every float16 and bfloat16 exactly."""
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if key.endswith("alpha"):
        dtypes |= {"I64": "<i8", "I32": "<i4"}
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


def _pair(module: _Module, scales: _Scales, weights: Path) -> LoraPair:
    halves = {role: _read(*place) for role, place in module.tensors.items() if role != "alpha"}
    keys = {role: key.removeprefix(module.key) for role, (key, _) in module.tensors.items()}
    if not {"down", "up"} <= halves.keys():
        found = ", ".join(keys.values())
        raise CheckpointError(f"{weights}: the module {module.key!r} has only {found}", "Expected A and B")
    a, b = halves["down"], halves["up"]
    if "mid" in halves:
        a = _with_middle(module, a, halves["mid"], weights)
    if b.ndim == 4 and b.shape[2:] == (1, 1):
        b = b[:, :, 0, 0]
    if a.ndim not in (2, 4) or b.ndim != 2 or len(a) != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise CheckpointError(
            f"{weights}: the module {module.key!r} has {keys['down']} {list(a.shape)} and {keys['up']} "
            f"{list(halves['up'].shape)}",
            "Expected [r, in] and [out, r], or [r, in, kh, kw] and [out, r, 1, 1]",
        )
    with np.errstate(over="ignore"):
        b = (b * scales(module, len(a))).astype(np.float32)
    if not np.isfinite(b).all():
        raise DeltaError(f"{weights}: {keys['up']} of module {module.key!r} is not finite after scaling")
    return LoraPair(a, b)


def _with_middle(module: _Module, down: FloatArray, mid: FloatArray, weights: Path) -> FloatArray:
    """LoCon's three factors as two, exactly: k×k ``mid`` [r, s, kh, kw] after pointwise ``down`` [s, in]."""
    if down.ndim == 4 and down.shape[2:] == (1, 1):
        down = down[:, :, 0, 0]
    if down.ndim != 2 or mid.ndim != 4 or mid.shape[1] != len(down):
        raise CheckpointError(
            f"{weights}: the module {module.key!r} has lora_down {list(down.shape)} and lora_mid "
            f"{list(mid.shape)}",
            "Expected [s, in, 1, 1] and [r, s, kh, kw]",
        )
    return np.asarray(np.einsum("rskl,si->rikl", mid, down, optimize=True), np.float32)
