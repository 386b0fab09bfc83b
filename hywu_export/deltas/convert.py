"""LoRA files to deltas, exactly, and deltas to LoRA files. Needs no torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from hywu_export.deltas.catalogue import Catalogue, Resolved, taken_at_its_word
from hywu_export.deltas.lorafile import FloatArray, LoraPair, read_lora
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, nearest
from hywu_runtime.deltas import Deltas, is_delta_file
from hywu_runtime.errors import DeltaError, InputError, UnsupportedError
from hywu_runtime.files import write_atomically
from hywu_runtime.manifest import Manifest

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

Weighted: TypeAlias = "tuple[str | Path, float]"


def load_lora(lora: str | Path | Sequence[Weighted], bundle: str | Path) -> Deltas:
    """The deltas, with D = 1, that do in ``bundle`` what one or several LoRA files do in its base::

        editor.edit(photo, prompt, deltas=load_lora([("a.safetensors", 0.8), ("b.safetensors", 0.5)], bundle))

    Several add up, exactly: their ranks follow one another. Targets without LoRA get zeros.

    Args:
        lora: a file or folder as `read_lora` takes it, or pairs of one and its weight.
        bundle: whose targets and ranks the deltas are to have.
    Raises:
        CheckpointError: a file is missing, damaged, or was not made for the bundle's base.
        UnsupportedError: a file is more than LoRA of linear layers and convolutions.
        DeltaError: the bundle takes no deltas for a module, or not of this rank; a weight is not finite.
        BundleError: there is no sound bundle.
    """
    files = [(lora, 1.0)] if isinstance(lora, (str, Path)) else list(lora)
    catalogue = Catalogue.from_bundle(bundle)
    resolved = [(resolve(path, catalogue), weight) for path, weight in files]
    return Deltas(for_bundle(resolved, bundle))


def resolve(path: str | Path, catalogue: Catalogue | None) -> Resolved:
    """A LoRA or delta file, its names looked up in ``catalogue``; None takes diffusers' spelling at its word.

    Raises:
        CheckpointError, UnsupportedError, DeltaError, InputError: it cannot be read, or not be understood.
    """
    if is_delta_file(path):
        found = _as_lora(Path(path))
    else:
        file = read_lora(path)
        found = taken_at_its_word(file) if catalogue is None else catalogue.resolve(file)
    log.info("%s: %s, %d modules, rank %d", path, found.spelling, len(found.pairs), found.rank)
    return found


def _as_lora(path: Path) -> Resolved:
    """A delta file for one sample, without the ranks that it was only filled up with."""
    deltas = Deltas.load(path)
    if deltas.batch != 1 or any(tensor.ndim == 4 for tensor in deltas.values()):
        what = "those of experts" if deltas.batch == 1 else f"for {deltas.batch} samples"
        raise DeltaError(
            f"The deltas in {path} are {what}",
            "Expected linear layers and convolutions, for one sample",
            "Give them alone, as --deltas",
        )
    pairs = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in deltas):
        a, b = (deltas.get(f"{module}.{half}") for half in ("lora_A", "lora_B"))
        if a is None or b is None or a.shape[1] != b.shape[2]:
            raise DeltaError(f"{path} has no pair of A and B for {module!r}", "Expected both, of one rank")
        live = b[0].any(0) & a[0].reshape(a.shape[1], -1).any(1)
        if live.any():
            pairs[module] = LoraPair(a[0][live], b[0][:, live])
    return Resolved(path, "deltas", pairs)


def for_bundle(loras: Sequence[tuple[Resolved, float]], bundle: str | Path) -> dict[str, FloatArray]:
    """The weighted sum of LoRAs as the delta tensors of ``bundle``; see `load_lora`."""
    from hywu_runtime.codec import encode

    manifest = Manifest.read(bundle)
    if manifest.deltas is None:
        raise UnsupportedError(
            f"The bundle {bundle} takes no deltas",
            "Expected one with delta targets",
            _again(bundle, [lora for lora, _ in loras]),
        )
    spec = DeltaSpec.from_manifest(encode(manifest.deltas))
    targets = {target.module: target for target in spec.targets}
    lacking: dict[str, list[str]] = {}
    for lora, _ in loras:
        for name in lora.pairs:
            if name not in targets:
                lacking.setdefault(name, []).append(str(lora.path))
    if lacking:
        names = list(lacking)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise DeltaError(
            f"{lacking[names[0]][0]} changes {', '.join(map(repr, names[:3]))}{more}, which the bundle "
            f"{bundle} takes no deltas for",
            f"Expected LoRA of the {len(targets)} modules that it was exported with",
            _again(bundle, [lora for lora, _ in loras]),
        )
    total = combine(loras)
    needed = max((pair.rank for name, pair in total.items() if pair.rank > targets[name].rank), default=0)
    if needed:
        name = next(name for name, pair in total.items() if pair.rank > targets[name].rank)
        what = "The LoRA has" if len(loras) == 1 else f"The {len(loras)} LoRAs together have"
        raise DeltaError(
            f"{what} rank {total[name].rank} for module {name!r}",
            f"The bundle {bundle} takes up to rank {targets[name].rank} there",
            _again(bundle, [lora for lora, _ in loras], needed),
        )
    return fit(total, spec)


def _again(bundle: str | Path, loras: Sequence[Resolved], rank: int | None = None) -> str:
    files = " ".join(f"--lora {lora.path}" for lora in loras)
    ranks = "" if rank is None else f" --max-rank {rank}"
    return f"Export it again with them: hywu export --base DIR {files}{ranks} --out BUNDLE"


def combine(loras: Sequence[tuple[Resolved, float]]) -> dict[str, LoraPair]:
    """The weighted sum by module: A above A, B beside B, the weight in B.

    Raises:
        DeltaError: a weight is not finite.
    """
    parts: dict[str, list[LoraPair]] = {}
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise DeltaError(f"{lora.path} has the weight {weight}", "Expected a finite weight", "Correct it")
        for name, pair in lora.pairs.items():
            parts.setdefault(name, []).append(LoraPair(pair.a, pair.b * np.float32(weight)))
    return {
        name: LoraPair(
            np.concatenate([pair.a for pair in pairs]), np.concatenate([pair.b for pair in pairs], 1)
        )
        for name, pairs in parts.items()
    }


def fit(pairs: Mapping[str, LoraPair], spec: DeltaSpec) -> dict[str, FloatArray]:
    """The delta tensors of ``spec`` with D = 1; zeros where ``pairs`` has no module or a smaller rank.

    Raises:
        DeltaError: a module is not in ``spec``, or has a larger rank or other dimensions.
    """
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
    if pair.rank > target.rank:
        raise DeltaError(
            f"The adapter's LoRA of module {target.module!r} has rank {pair.rank}",
            f"At most rank {target.rank}, which is what the module takes",
            "Reduce the adapter's rank, or export with a larger one",
        )
    if pair.a.shape[1:] != a.shape[2:] or len(pair.b) != b.shape[1]:
        raise DeltaError(
            f"The adapter has A {list(pair.a.shape)} and B {list(pair.b.shape)} for module {target.module!r}",
            f"Expected A [r, {', '.join(map(str, a.shape[2:]))}] and B [{b.shape[1]}, r]",
            "Check that the adapter was made for this base model",
        )
    a[0, : pair.rank], b[0, :, : pair.rank] = pair.a, pair.b


def peft_to_deltas(
    path: str | Path, spec: DeltaSpec | None = None, module: nn.Module | None = None
) -> dict[str, FloatArray]:
    """The deltas, with D = 1, that do what a LoRA file does, without a bundle.

    Args:
        path: a file or folder as `read_lora` takes it.
        spec: ranks are padded with zeros to those of its targets, and targets without LoRA get zeros. None
            takes the modules and ranks of the file itself.
        module: the base model, to look up names in; None takes names in diffusers' spelling at their word.

    Returns:
        float32 arrays by the names of ``spec.tensors()``, in that order.

    Raises:
        CheckpointError: files are missing, damaged, contradictory, or do not fit ``module``.
        UnsupportedError: the adapter is more than LoRA of linear layers and convolutions.
        DeltaError: the adapter changes a module that is not in ``spec``, has a larger rank or other
            dimensions than ``spec``, or numbers that are not finite.
        InputError: names are of another spelling, and there is no ``module``.
    """
    catalogue = None if module is None else Catalogue.from_modules({"denoiser": module}, "denoiser")
    pairs = resolve(path, catalogue).pairs
    if spec is None:
        spec = DeltaSpec(tuple(pair.target(name) for name, pair in pairs.items()))
    return fit(pairs, spec)


# Of text encoders diffusers reads PEFT's halves only if attention is among the targets, these always.
_TEXT_HALVES = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}


def save_lora(deltas: Deltas, path: str | Path, bundle: str | Path, sample: int | None = None) -> None:
    """Writes deltas as a LoRA file that diffusers' ``load_lora_weights`` takes, with the same effect.

    Names are diffusers' own (``unet.….lora_A.weight``, ``text_encoder.….lora_linear_layer.down.weight``).
    All modules get one rank, the largest, filled up with zeros: then alpha is that rank in every reader, and
    the scale 1.

    Args:
        deltas: of ``bundle``, for one sample, or with ``sample`` for a batch.
        bundle: tells which component a module is in.
    Raises:
        DeltaError: there are deltas of experts, or for several samples and none is chosen.
        InputError: the file cannot be written.
    """
    from safetensors.numpy import save

    if sample is not None:
        deltas = deltas.select(sample)
    if deltas.batch != 1:
        raise InputError(
            f"The deltas are for {deltas.batch} samples", "Expected one", f"Choose 0 to {deltas.batch - 1}"
        )
    catalogue = Catalogue.from_bundle(bundle)
    tensors: dict[str, FloatArray] = {}
    for name, tensor in sorted(deltas.items()):
        module, _, half = name.rpartition(".")
        if tensor.ndim == 4:
            raise DeltaError(
                f"The deltas of {module!r} are those of experts",
                "Expected linear layers and convolutions: LoRA files have no form for experts",
                "Keep them as a delta file",
            )
        component, path_there = catalogue.split(module)
        axis = 0 if half == "lora_A" else 1
        widths = [(0, 0)] * (tensor.ndim - 1)
        widths[axis] = (0, deltas.rank - tensor.shape[axis + 1])
        matrix = np.pad(tensor[0], widths)
        if half == "lora_B" and deltas[f"{module}.lora_A"].ndim == 5:
            matrix = matrix[:, :, None, None]  # as a convolution has it
        if component.startswith("text_encoder"):
            half = _TEXT_HALVES[half]
        tensors[f"{component}.{path_there}.{half}.weight"] = np.ascontiguousarray(matrix)
    data = save(tensors, metadata={"format": "pt"})
    write_atomically(path, lambda stream: stream.write(data))
