"""What a family says about a graph: its tensors, and the axes that stay free. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hywu_runtime.codec import encode
from hywu_runtime.errors import UnsupportedError
from hywu_runtime.manifest import Axis as Written
from hywu_runtime.manifest import Term

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

TILE = "hywu.tile"
DTYPES = ("uint8", "int32", "int64", "float16", "float32")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A dimension is a size, or the name of an axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnsupportedError(
                f"Tensor {self.name!r} has dtype {self.dtype!r}",
                f"A graph's inputs and outputs are {', '.join(DTYPES)}",
                "Cast inside the graph",
            )

    def to_dict(self) -> dict[str, object]:
        """The tensor as the manifest writes it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Inferred(TensorSpec):
    """An output whose dtype and shape are those that tracing finds."""

    dtype: str = "float32"
    shape: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Transform:
    """What is stored in a parameter's place.

    Attributes:
        name: of the form, unlike that of others.
        shape: of the parameter.
        apply: from float32 of that shape to float32 of the initializer's.
    """

    name: str
    shape: tuple[int, ...]
    apply: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Axis:
    """A free dimension, as in the manifest.

    Either a root axis, with its limits (``multiple`` divides every size), or, with ``of``, an axis that is
    exactly ``1/divide`` of another, or a ``sum`` of products of root axes. ``one_or`` names the axis whose
    size this one takes unless it is 1.
    """

    min: int = 1
    max: int = 1
    multiple: int = 1
    of: str | None = None
    divide: int = 1
    one_or: str | None = None
    sum: tuple[Term, ...] = ()

    @property
    def is_root(self) -> bool:
        """Whether its size follows from no other axis."""
        return self.of is None and self.one_or is None and not self.sum

    def size(self, sizes: Mapping[str, int]) -> int | None:
        """The size of an axis that follows from others, or None where one of these is not in ``sizes``."""
        return Written(of=self.of, divide=self.divide, sum=self.sum).size(sizes)

    def to_dict(self) -> dict[str, object]:
        """The axis as the manifest writes it."""
        if self.sum:
            return {"sum": encode(self.sum)}
        if self.of is not None:
            return {"of": self.of, "divide": self.divide}
        entry: dict[str, object] = {"min": self.min, "max": self.max}
        if self.multiple != 1:
            entry["multiple"] = self.multiple
        if self.one_or is not None:
            entry["one_or"] = self.one_or
        return entry


@dataclass(frozen=True)
class GraphSpec:
    """A graph to trace.

    ``module.forward`` takes the inputs positionally, in the order of ``inputs``, and returns a tuple in the
    order of ``outputs``. Parameters become initializers under their names in ``module``, which are
    ``<component>.<name in the component's checkpoint>``. ``example_sizes`` overrides the size that tracing
    uses for an axis. ``tile`` is the largest side, in pixels, of the tiles that the module cuts a picture
    into; the graph has it as the metadata property `TILE`. ``integers`` says from where to where (exclusive)
    integers of an input make sense, for random ones; otherwise they are 0 and 1.
    """

    name: str
    module: nn.Module
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    example_sizes: Mapping[str, int] = field(default_factory=dict)
    tile: int | None = None
    integers: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def all_sizes(roots: Mapping[str, int], axes: Mapping[str, Axis], one: bool = False) -> dict[str, int]:
    """The sizes of all ``axes``, given those of the root axes; axes that may be 1 instead are, if ``one``."""
    found = dict(roots)
    for name, axis in axes.items():
        if axis.one_or is not None:
            found[name] = 1 if one else roots[axis.one_or]
    waiting = {name: axis for name, axis in axes.items() if axis.of is not None or axis.sum}
    while waiting:  # in any order, but without circles: tracing has resolved them
        known = {name: size for name, axis in waiting.items() if (size := axis.size(found)) is not None}
        found |= known
        waiting = {name: axis for name, axis in waiting.items() if name not in known}
    return found


def resolve_axis(name: str, axes: Mapping[str, Axis]) -> tuple[str, int]:
    """The root of an axis and the divisor that leads to it: ``size(name) == size(root) / divisor``.

    Raises:
        UnsupportedError: the axis is not declared, or its definition is circular or not exact.
    """
    root, divisor, seen = name, 1, [name]
    while True:
        axis = axes.get(root)
        if axis is None:
            raise UnsupportedError(
                f"Axis {root!r} is not declared",
                f"The declared axes are {', '.join(sorted(axes)) or 'none'}",
                "Declare it, or correct the name in the tensor's shape",
            )
        if axis.of is None:
            break
        divisor *= axis.divide
        root = axis.of
        if root in seen:
            raise UnsupportedError(
                f"Axis {name!r} is defined by itself ({' → '.join([*seen, root])})",
                "A chain of axes ends in one with limits",
                "Give one of them min and max instead of 'of'",
            )
        seen.append(root)
    if axis.multiple % divisor:
        raise UnsupportedError(
            f"Axis {name!r} is 1/{divisor} of {root!r}, whose sizes are multiples of {axis.multiple}",
            f"The multiple of {root!r} must be divisible by {divisor}",
            f"Declare {root!r} with a multiple of {divisor}",
        )
    return root, divisor
