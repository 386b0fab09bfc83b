"""What a torch module offers to deltas."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hywu_export.deltas.spec import DeltaSpec, DeltaTarget
from hywu_runtime.errors import CheckpointError, UnsupportedError


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that names what ``name`` may have meant."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return (
        f"The nearest names are {', '.join(map(repr, close))}"
        if close
        else "There are no names to choose from"
    )


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot take deltas, or None if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "is the output projection inside a MultiheadAttention, which never calls it as a module"
    if isinstance(module, nn.Linear):
        return None
    if isinstance(module, nn.Conv2d):
        return None if module.groups == 1 else f"is a grouped convolution ({module.groups} groups)"
    return f"is a {type(module).__name__}"


def target_of(path: str, module: nn.Module, rank: int) -> DeltaTarget:
    """The target that ``module`` at ``path`` makes with ``rank``.

    Raises `UnsupportedError`, naming the module, if it cannot take deltas.
    """
    reason = refusal(module)
    if reason is not None:
        raise UnsupportedError(
            f"Module {path!r} {reason}",
            "Deltas act on Linear and on Conv2d with one group",
            "Leave it out of the targets",
        )
    if isinstance(module, nn.Conv2d):
        kernel = cast(tuple[int, int], tuple(module.kernel_size))
        return DeltaTarget(path, "conv", module.in_channels, module.out_channels, rank, kernel)
    assert isinstance(module, nn.Linear)
    return DeltaTarget(path, "linear", module.in_features, module.out_features, rank)


def resolve(root: nn.Module, spec: DeltaSpec) -> dict[str, nn.Module]:
    """The modules of ``spec`` in ``root`` by path, after checking that each is what its target says.

    Raises `CheckpointError` for a module that is missing, of other dimensions, or shared by two targets, and `UnsupportedError`
    for one that cannot take deltas.
    """
    paths = dict(root.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    owners: dict[int, str] = {}
    for target in spec.targets:
        module = paths.get(target.module)
        if module is None:
            able = (path for path, candidate in paths.items() if refusal(candidate) is None)
            raise CheckpointError(
                f"The base model has no module {target.module!r}", "", nearest(target.module, able)
            )
        actual = target_of(target.module, module, target.rank)
        if actual != target:
            raise CheckpointError(
                f"Module {target.module!r} of the base model is {_dimensions(actual)}",
                f"Its delta target is {_dimensions(target)}",
                "Check that generator or adapter belong to this base model",
            )
        if id(module) in owners:
            raise CheckpointError(
                f"Delta targets {owners[id(module)]!r} and {target.module!r} are one and the same module",
                "A module has one delta",
                "Drop one of the two",
            )
        owners[id(module)] = target.module
        found[target.module] = module
    return found


def _dimensions(target: DeltaTarget) -> str:
    size = f"{target.in_features} -> {target.out_features}"
    if target.kind == "conv":
        return f"a {target.kernel[0]}x{target.kernel[1]} convolution {size}"
    return f"a linear layer {size}"
