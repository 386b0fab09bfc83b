"""Which modules of a base model take deltas, and the names and shapes of those deltas. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hywu_runtime.errors import DeltaError

Kind = Literal["linear", "conv"]


@dataclass(frozen=True)
class DeltaTarget:
    """One module that takes a delta of ``rank``: a linear layer or a two-dimensional convolution.

    ``module`` is its path in the base model. Features and kernel (height, width) are those of the base's weight.
    Raises `DeltaError` for sizes that cannot be.
    """

    module: str
    kind: Kind
    in_features: int
    out_features: int
    rank: int
    kernel: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "conv"):
            raise DeltaError(
                f"Delta target {self.module!r} has kind {self.kind!r}", "A target is 'linear' or 'conv'"
            )
        sizes = (self.in_features, self.out_features, self.rank, *self.kernel)
        if min(sizes) < 1 or (self.kind == "linear" and self.kernel != (1, 1)):
            raise DeltaError(
                f"Delta target {self.module!r} has in {self.in_features}, out {self.out_features}, rank {self.rank}, "
                f"kernel {self.kernel}",
                "Every size is at least 1, and only convolutions have a kernel",
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
        return {
            self.a_name: (self.rank, self.in_features, *kernel),
            self.b_name: (self.out_features, self.rank),
        }


@dataclass(frozen=True)
class DeltaSpec:
    """The targets of one base model, in a fixed order. Raises `DeltaError` if a module appears twice."""

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
        """Shapes of all delta tensors by canonical name, in target order, without the leading delta-batch axis."""
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
            targets.append(entry)
        return {"rank": self.rank, "gate": "gate", "axis": "delta_batch", "targets": targets}

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
                )
                for entry in section["targets"]
            )
        )
