"""Which modules of a base a LoRA file may speak of, and which of them it does speak of. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.deltas.lorafile import DENOISER, T5, TEXT_ENCODERS, Entry, LoraFile, LoraPair
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, dimensions, mismatch, nearest
from hywu_export.deltas.spellings import Layers, Piece, spellings
from hywu_runtime.errors import CheckpointError, InputError
from hywu_runtime.manifest import Manifest

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """A LoRA file whose names are understood.

    Attributes:
        path: the file.
        spelling: whose it is, for people: ``kohya, LDM names``.
        pairs: matrices by the name of the delta: a module's path in the denoiser, or
            ``<component>.<path>``.
    """

    path: Path
    spelling: str
    pairs: Mapping[str, LoraPair]

    @property
    def rank(self) -> int:
        return max((pair.rank for pair in self.pairs.values()), default=0)


class Catalogue:
    """The linear layers and convolutions of a base's components, under all names that they go by.

    Attributes:
        denoiser: the name of the component whose modules need no prefix.
        components: component → path → layer.
    """

    def __init__(self, components: Mapping[str, Layers], denoiser: str):
        self.components: dict[str, Layers] = {
            name: layers if name == denoiser else {_canonical(path): layer for path, layer in layers.items()}
            for name, layers in components.items()
        }
        self.denoiser = denoiser

    @classmethod
    def from_modules(cls, modules: Mapping[str, nn.Module], denoiser: str) -> Catalogue:
        """Of torch modules, by the component's name."""
        from hywu_export.deltas.modules import layers

        return cls({name: layers(module) for name, module in modules.items()}, denoiser)

    @classmethod
    def from_bundle(cls, bundle: str | Path) -> Catalogue:
        """Of a bundle, from its targets and from the names and shapes of its weights.

        Raises:
            BundleError: there is no sound bundle.
        """
        folder = Path(bundle)
        manifest = Manifest.read(folder)
        folder = folder if folder.is_dir() else folder.parent
        components: dict[str, dict[str, DeltaTarget]] = {}
        for component, name, shape in _weights(manifest, folder):
            path = name.removesuffix(".weight")
            if path != name and len(shape) in (2, 4):
                layer = _layer(path, shape)
                components.setdefault(component, {})[path] = layer
        targets = manifest.deltas.targets if manifest.deltas is not None else ()
        bare = {t.module for t in targets if t.module.partition(".")[0] not in components}
        denoiser = max(
            components, key=lambda name: len(bare & components[name].keys()), default="transformer"
        )
        if not bare:  # the deltas are all those of other components
            denoiser = "transformer" if "transformer" in components else "unet"
        for target in targets:  # under the names that deltas have, whatever the weights are called
            prefix, _, rest = target.module.partition(".")
            component, path = (prefix, rest) if prefix in components else (denoiser, target.module)
            if target.kind in ("linear", "conv"):
                kernel = target.kernel or (1, 1)
                components.setdefault(component, {})[path] = DeltaTarget(
                    path, target.kind, target.in_features, target.out_features, 1, (kernel[0], kernel[1])
                )
        return cls(components, denoiser)

    def delta(self, component: str, path: str) -> str:
        """The name of the delta of a module."""
        return path if component == self.denoiser else delta_name(component, path)

    def split(self, delta: str) -> tuple[str, str]:
        """The inverse of `delta`: component and path."""
        component, _, path = delta.partition(".")
        if component != self.denoiser and component in self.components:
            return component, path
        return self.denoiser, delta

    def layer(self, delta: str) -> DeltaTarget:
        """The layer that a delta acts on, under the delta's name."""
        component, path = self.split(delta)
        layer = self.components[component][path]
        return replace(layer, module=delta)

    def spec(self, loras: Sequence[Resolved], rank: int = 1) -> DeltaSpec:
        """All modules that the LoRAs change, in the base's order, each with its largest rank, or ``rank``."""
        ranks: dict[str, int] = {}
        for lora in loras:
            for name, pair in lora.pairs.items():
                ranks[name] = max(ranks.get(name, rank), pair.rank)
        order = [self.delta(component, path) for component, path in self._paths()]
        return DeltaSpec(tuple(replace(self.layer(n), rank=ranks[n]) for n in order if n in ranks))

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Component and path of every layer, the denoiser's first."""
        for component in sorted(self.components, key=lambda name: name != self.denoiser):
            for path in self.components[component]:
                yield component, path

    def resolve(self, lora: LoraFile) -> Resolved:
        """The deltas that the file's entries stand for.

        An entry of a fused layer becomes one pair for each layer of the base, with the rows of B that are
        its own; ranks that do nothing there (trainers keep such slices apart with zeros) are left out.

        Raises:
            CheckpointError: an entry matches no module, its dimensions are others, or a module is there
                twice. One without effect (B is zero) is passed over.
        """
        pairs: dict[str, LoraPair] = {}
        used: list[str] = []
        lost: list[Entry] = []
        for entry in lora.entries:
            found = self._find(entry)
            if found is None:
                if entry.pair.b.any():
                    lost.append(entry)
                else:
                    log.info("%s: %s matches nothing, and is without effect", lora.path, entry.key)
                continue
            component, pieces, spelling = found
            used.append(spelling)
            rows = sum(piece.stop - piece.start for piece in pieces)
            for piece in pieces:
                name = self.delta(component, piece.path)
                layer = self.layer(name)
                pair = _fitted(
                    entry.pair, layer, piece if len(entry.pair.b) == rows else None, len(pieces) > 1
                )
                if pair is None:
                    continue
                if name in pairs and not _equal(pairs[name], pair):
                    raise CheckpointError(
                        f"{lora.path} changes the module {name!r} twice",
                        "Expected one LoRA per module",
                        "Keep one of the two spellings in the file",
                    )
                pairs[name] = pair
        if lost:
            raise self._nothing(lora, lost)
        if not pairs:
            raise CheckpointError(f"{lora.path} changes nothing: all its numbers are zero", "Expected a LoRA")
        names = max(used, key=used.count)
        spelling = f"{lora.writer}, {names} names" if names and lora.writer != "xlabs" else lora.writer
        return Resolved(lora.path, spelling, pairs)

    def _component(self, name: str) -> str:
        if name == DENOISER:
            return self.denoiser
        if name == T5:
            return next((c for c in reversed(TEXT_ENCODERS) if c in self.components), "text_encoder_3")
        return name

    def _find(self, entry: Entry) -> tuple[str, tuple[Piece, ...], str] | None:
        """Component, pieces in it, and whose name it is."""
        wanted = [self._component(entry.component)] if entry.component else [self.denoiser, *self.components]
        for component in wanted:
            for name, meanings in self._names.get((component, entry.flat), ()):
                if entry.name in meanings:
                    return component, meanings[entry.name], name
        return None

    @cached_property
    def _names(self) -> Mapping[tuple[str, bool], list[tuple[str, Mapping[str, tuple[Piece, ...]]]]]:
        """(component, flat) → the spellings that it is looked up in."""
        found = {}
        for component, layers in self.components.items():
            known = spellings(layers)
            found[component, False] = [(s.name, s.meanings) for s in known]
            found[component, True] = [
                (s.name, {name.replace(".", "_"): pieces for name, pieces in s.meanings.items()})
                for s in known
            ]
        return found

    def _nothing(self, lora: LoraFile, lost: Sequence[Entry]) -> CheckpointError:
        entry = lost[0]
        component = self._component(entry.component) if entry.component else self.denoiser
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        wrong = f"{lora.path}: the base model has no module {entry.key!r}{more}"
        if component not in self.components:
            return CheckpointError(
                wrong,
                f"Expected modules of {', '.join(self.components)}",
                "Check that the file was made for this base model",
            )
        own, _, *others = self._names[component, entry.flat]  # not the names of old processors
        known = [name for _, meanings in (own, *others) for name in meanings]
        prefix = entry.key.removesuffix(entry.name) if entry.key.endswith(entry.name) else ""
        hint = nearest(entry.name, known).replace(" '", f" '{prefix}")
        return CheckpointError(wrong, f"Expected names of modules in its {component}", hint)


def delta_name(component: str, path: str) -> str:
    """The name of the delta of a module in another component than the denoiser."""
    return f"{component}.{_canonical(path)}"


def _canonical(path: str) -> str:
    """The path of a text encoder's module as deltas name it, see `hywu_export.deltas.modules.submodule`."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.")) else path


def taken_at_its_word(lora: LoraFile) -> Resolved:
    """The deltas of a file that spells paths as diffusers does, without a base to look them up in.

    Raises:
        InputError: the file's names are of another spelling.
    """
    for entry in lora.entries:
        if entry.flat or lora.writer not in ("PEFT", "diffusers"):
            raise InputError(
                f"{lora.path} has names as {lora.writer} writes them, as {entry.key!r}",
                "Expected a base or a bundle, whose modules tell what they mean",
                "Give --bundle or --base",
            )
    own = (DENOISER, None)
    return Resolved(
        lora.path,
        lora.writer,
        {e.name if e.component in own else f"{e.component}.{e.name}": e.pair for e in lora.entries},
    )


def _weights(manifest: Manifest, folder: Path) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Component, name in it and shape of the bundle's weights."""
    for path in manifest.files:
        if path.startswith("weights/") and path.endswith(".safetensors"):
            component = Path(path).stem
            for name, location in SafetensorsIndex.from_file(folder / path).items():
                yield component, name, location.shape
    for tensors in manifest.linked.values():
        for name, linked in tensors.items():
            component, _, rest = name.partition(".")
            yield component, rest, linked.shape


def _layer(path: str, shape: Sequence[int]) -> DeltaTarget:
    kernel = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
    return DeltaTarget(path, "conv" if len(shape) == 4 else "linear", shape[1], shape[0], 1, kernel)


def _fitted(pair: LoraPair, layer: DeltaTarget, piece: Piece | None, cut: bool) -> LoraPair | None:
    """``pair`` for ``layer``, with the rows of ``piece``; None where they are zero.

    A pointwise convolution and a linear layer are the same to a LoRA.
    """
    a, b = pair.a, pair.b
    if piece is not None:
        b = b[piece.start : piece.stop]
        if piece.swapped:
            b = np.concatenate(np.split(b, 2)[::-1])
    if layer.kind == "linear" and a.shape[2:] == (1, 1):
        a = a[:, :, 0, 0]
    elif layer.kind == "conv" and a.ndim == 2 and layer.kernel == (1, 1):
        a = a[:, :, None, None]
    made_for = LoraPair(a, b).target(layer.module)
    if piece is None or (made_for.kind, made_for.in_features, made_for.out_features, made_for.kernel) != (
        layer.kind, layer.in_features, layer.out_features, layer.kernel,
    ):  # fmt: skip
        raise mismatch(layer, f"the adapter's delta is for {dimensions(made_for)}")
    if cut:
        live = b.any(0)
        if not live.any():
            return None
        a, b = a[live], b[:, live]
    return LoraPair(np.ascontiguousarray(a), np.ascontiguousarray(b))


def _equal(one: LoraPair, other: LoraPair) -> bool:
    return np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
