"""Which modules of a base model take deltas, and the names and shapes of those deltas. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from hywu_runtime.errors import CheckpointError, DeltaError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "conv", "experts"]


@runtime_checkable
class _Sizes(Protocol):
    """One plain entry of a generator's mapping."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


@runtime_checkable
class _Group(Protocol):
    """One grouped entry: every weight of every expert takes a delta."""

    @property
    def num_experts(self) -> int: ...

    @property
    def weights(self) -> Mapping[str, _Sizes]: ...


class GeneratorTargets(Protocol):
    """What is asked of a generator's configuration; ``pg_mapping`` holds `_Sizes` and `_Group`."""

    @property
    def rank(self) -> int: ...

    @property
    def prefix(self) -> str: ...

    @property
    def num_base_model_layers(self) -> int: ...

    @property
    def pg_mapping(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class DeltaTarget:
    """One module that takes a delta: a linear layer, a two-dimensional convolution, or one weight of all
    experts of a layer.

    Attributes:
        module: its path in the base model.
        in_features, out_features: of the base's weight; channels for a convolution.
        rank: of the delta.
        kernel: height and width of a convolution's kernel.
        experts: how many there are, each with a delta of its own.
        merged: whether a traced graph adds the delta to a linear layer's weight, ``W + B A``, and multiplies
            once, instead of running the low-rank branch beside it. No matter of the manifest.

    Raises:
        DeltaError: a size that cannot be.
    """

    module: str
    kind: Kind
    in_features: int
    out_features: int
    rank: int
    kernel: tuple[int, int] = (1, 1)
    experts: int | None = None
    merged: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "conv", "experts"):
            raise DeltaError(
                f"Delta target {self.module!r} has kind {self.kind!r}",
                "A target is 'linear', 'conv' or 'experts'",
            )
        sizes = (self.in_features, self.out_features, self.rank, *self.kernel, self.experts or 1)
        if min(sizes) < 1 or (self.kind != "conv" and self.kernel != (1, 1)):
            raise DeltaError(
                f"Delta target {self.module!r} has in {self.in_features}, out {self.out_features}, "
                f"rank {self.rank}, kernel {self.kernel}, experts {self.experts}",
                "Every size is at least 1, and only convolutions have a kernel",
            )
        if (self.kind == "experts") != (self.experts is not None):
            raise DeltaError(
                f"Delta target {self.module!r} of kind {self.kind!r} has experts {self.experts}",
                "A number of experts goes with kind 'experts', and with no other",
            )

    @property
    def a_name(self) -> str:
        return f"{self.module}.lora_A"

    @property
    def b_name(self) -> str:
        return f"{self.module}.lora_B"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of A and B by name, without the leading delta-batch axis."""
        kernel = self.kernel if self.kind == "conv" else ()
        experts = () if self.experts is None else (self.experts,)
        return {
            self.a_name: (*experts, self.rank, self.in_features, *kernel),
            self.b_name: (*experts, self.out_features, self.rank),
        }


@dataclass(frozen=True)
class DeltaSpec:
    """The targets of one base model, in a fixed order.

    Raises:
        DeltaError: a module is there twice.
    """

    targets: tuple[DeltaTarget, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for target in self.targets:
            if target.module in seen:
                raise DeltaError(
                    f"Module {target.module!r} is a delta target twice", "A module has one delta"
                )
            seen.add(target.module)

    @property
    def rank(self) -> int:
        """The largest rank of any target; 0 without targets."""
        return max((target.rank for target in self.targets), default=0)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all delta tensors by name, in target order, without the leading delta-batch axis."""
        return {name: shape for target in self.targets for name, shape in target.tensors().items()}

    def to_manifest(self) -> dict[str, Any]:
        """The ``deltas`` section of a bundle's manifest."""
        targets = []
        for target in self.targets:
            entry: dict[str, Any] = {
                "module": target.module,
                "kind": target.kind,
                "in": target.in_features,
                "out": target.out_features,
                "rank": target.rank,
            }
            if target.kind == "conv":
                entry["kernel"] = list(target.kernel)
            if target.experts is not None:
                entry["experts"] = target.experts
            targets.append(entry)
        return {"rank": self.rank, "gate": "gate", "axis": "delta_batch", "targets": targets}

    @classmethod
    def from_generator(
        cls, config: GeneratorTargets, targets: str | Path | Mapping[str, str] | None, module: nn.Module
    ) -> DeltaSpec:
        """The targets of a parameter generator in the base ``module``, in the generator's order, layer by
        layer.

        ``targets`` is as for `generator_paths`. A convolution fits if the generator's input size is that of
        its flattened kernel, ``in * kh * kw``; A is then to be viewed as ``[r, in, kh, kw]``. A grouped entry
        makes one target for each of its weights, ``<entry>.<weight>``.

        Raises:
            CheckpointError: names do not map one to one, or a module is missing or has other dimensions.
            UnsupportedError: a module takes no deltas.
        """
        from hywu_export.deltas.modules import find

        paths = generator_paths(config, targets)
        chosen = []
        for key, (sizes, experts) in _generator_sizes(config).items():
            target = find(module, paths[key], config.rank)
            kh, kw = target.kernel
            wanted = (sizes.in_features, sizes.out_features, experts)
            if (target.in_features * kh * kw, target.out_features, target.experts) != wanted:
                made = f"the generator makes deltas for {sizes.in_features} -> {sizes.out_features}"
                made += "" if experts is None else f" of {experts} experts"
                raise mismatch(target, f"{made} under the name {key!r}")
            chosen.append(target)
        return cls(tuple(chosen))

    @classmethod
    def from_patterns(cls, module: nn.Module, patterns: Sequence[str], max_rank: int) -> DeltaSpec:
        """Every Linear, ungrouped Conv2d and `ExpertLinear` of ``module`` that ``patterns`` match, in the
        model's order.

        A pattern is a module path, or the end of one from a dot on as in PEFT (``to_q``, ``attn1.to_q``), or
        either with the wildcards of `fnmatch`, where ``*`` also spans dots (``*.attn?.to_*``). Matched
        modules that take no deltas, such as the containers that ``*`` matches, are skipped if others remain;
        one whose very path is the pattern is not.

        Raises:
            CheckpointError: a pattern matches no module; the message has the nearest names.
            UnsupportedError: a pattern is the path of a module that takes no deltas, or matches no others.
        """
        from hywu_export.deltas.modules import refusal, target_of

        modules = {path: found for path, found in module.named_modules() if path}
        able = [path for path, found in modules.items() if refusal(found) is None]
        chosen: set[str] = set()
        for pattern in patterns:
            matched = [path for path in modules if _matches(path, pattern)]
            if not matched:
                raise CheckpointError(
                    f"The pattern {pattern!r} matches no module of the base model",
                    "Expected a module's path, the end of one, or wildcards",
                    nearest(pattern, able),
                )
            usable = [path for path in matched if path in able]
            # What takes no deltas is chosen too where skipping it would leave the pattern without effect: an
            # error below.
            chosen.update(usable or matched[:1], [pattern] if pattern in modules else [])
        return cls(
            tuple(target_of(path, found, max_rank) for path, found in modules.items() if path in chosen)
        )

    @classmethod
    def from_peft(cls, path: str | Path, module: nn.Module) -> DeltaSpec:
        """The modules of ``module`` that the LoRA at ``path`` changes, each with its rank, in order.

        Raises:
            CheckpointError: the adapter is damaged or was not made for ``module``.
            UnsupportedError, DeltaError: as for `hywu_export.deltas.lorafile.read_lora`.
        """
        from hywu_export.deltas.catalogue import Catalogue
        from hywu_export.deltas.lorafile import read_lora

        catalogue = Catalogue.from_modules({"denoiser": module}, "denoiser")
        return catalogue.spec([catalogue.resolve(read_lora(path))])

    def part(self, component: str) -> DeltaSpec:
        """The targets in ``component``, another one than the denoiser, under their paths there."""
        prefix = f"{component}."
        return DeltaSpec(
            tuple(
                replace(target, module=target.module.removeprefix(prefix))
                for target in self.targets
                if target.module.startswith(prefix)
            )
        )

    def union(self, other: DeltaSpec) -> DeltaSpec:
        """The targets of both, each with its larger rank.

        Raises:
            DeltaError: a module has other dimensions in ``other``.
        """
        targets = {target.module: target for target in self.targets}
        for target in other.targets:
            mine = targets.setdefault(target.module, target)
            if replace(mine, rank=target.rank) != target:
                raise DeltaError(
                    f"Module {target.module!r} is both {dimensions(mine)} and {dimensions(target)}",
                    "Expected one base model",
                )
            targets[target.module] = replace(mine, rank=max(mine.rank, target.rank))
        return DeltaSpec(tuple(targets.values()))

    def without(self, *components: str) -> DeltaSpec:
        """The targets that are in none of ``components``: the denoiser's, if these are all others."""
        return DeltaSpec(
            tuple(t for t in self.targets if not t.module.startswith(tuple(f"{c}." for c in components)))
        )

    @classmethod
    def from_manifest(cls, section: Mapping[str, Any]) -> DeltaSpec:
        """The inverse of `to_manifest`, for a section that the manifest's reader has validated."""
        return cls(
            tuple(
                DeltaTarget(
                    entry["module"],
                    entry["kind"],
                    entry["in"],
                    entry["out"],
                    entry["rank"],
                    tuple(entry.get("kernel", (1, 1))),
                    entry.get("experts"),
                )
                for entry in section["targets"]
            )
        )


def generator_paths(
    config: GeneratorTargets, targets: str | Path | Mapping[str, str] | None = None
) -> dict[str, str]:
    """Generator name (``<prefix><layer>.<entry>``) to module path of the base, in the generator's order.

    ``targets`` is that mapping, or the path of a ``targets.json`` that holds it as one flat object; None
    means that generator and base use the same names.

    Raises:
        CheckpointError: a name is unknown or not mapped, two names map to one module, or the file is damaged.
        UnsupportedError: the generator makes something of an unknown kind.
    """
    names = list(_generator_sizes(config))
    if targets is None:
        return {name: name for name in names}
    source = "The mapping of targets" if isinstance(targets, Mapping) else str(targets)
    if not isinstance(targets, Mapping):
        from hywu_export.bundle.sources import read_json_object

        targets = read_json_object(targets)
    paths: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, path in targets.items():
        if not isinstance(path, str):
            raise CheckpointError(f"{source} maps {name!r} to {path!r}", "Expected the path of a module")
        if name not in names:
            raise CheckpointError(
                f"{source} maps {name!r}, which the generator does not make",
                "Expected the generator's own names",
                nearest(name, names),
            )
        if path in owners:
            raise CheckpointError(
                f"{source} maps both {owners[path]!r} and {name!r} to {path!r}", "A module takes one delta"
            )
        owners[path] = name
        paths[name] = path
    for name in names:
        if name not in paths:
            raise CheckpointError(
                f"{source} does not map {name!r}",
                "Every name that the generator makes has a module",
                "Add it",
            )
    return {name: paths[name] for name in names}


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _generator_sizes(config: GeneratorTargets) -> dict[str, tuple[_Sizes, int | None]]:
    """Sizes and number of experts (None without) of everything that a generator makes, by name."""
    entries: dict[str, tuple[_Sizes, int | None]] = {}
    for entry, target in config.pg_mapping.items():
        if isinstance(target, _Group):
            for weight, sizes in target.weights.items():
                entries[f"{entry}.{weight}"] = sizes, target.num_experts
        elif isinstance(target, _Sizes):
            entries[entry] = target, None
        else:
            raise UnsupportedError(
                f"The generator's mapping has the entry {entry!r} of another kind",
                "A plain target, or a group of experts",
                "Use a version that knows it",
            )
    layers = range(config.num_base_model_layers)
    return {f"{config.prefix}{layer}.{entry}": sizes for layer in layers for entry, sizes in entries.items()}


def mismatch(actual: DeltaTarget, wanted: str) -> CheckpointError:
    """The error for a module of the base that has other dimensions than ``wanted`` says."""
    return CheckpointError(
        f"Module {actual.module!r} of the base model is {dimensions(actual)}, but {wanted}",
        "Expected equal dimensions",
        "Check that the deltas were made for this base model",
    )


def dimensions(target: DeltaTarget) -> str:
    size = f"{target.in_features} -> {target.out_features}"
    if target.kind == "conv":
        return f"a {target.kernel[0]}x{target.kernel[1]} convolution {size}"
    if target.kind == "experts":
        return f"a layer {size} of {target.experts} experts"
    return f"a linear layer {size}"


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence with the names that ``name`` may have meant."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return (
        f"The nearest names are {', '.join(map(repr, close))}"
        if close
        else "There are no names to choose from"
    )
