"""What a torch module offers to deltas."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hywu_export.deltas.experts import ExpertLinear
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, nearest
from hywu_runtime.errors import CheckpointError, UnsupportedError


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot take deltas, as the rest of a sentence, or None if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "belongs to a MultiheadAttention, which uses its weight but never calls it"
    if isinstance(module, (nn.Linear, ExpertLinear)):
        return None
    if isinstance(module, nn.Conv2d):
        return None if module.groups == 1 else f"is a convolution with {module.groups} groups"
    return f"is a {type(module).__name__}"


def target_of(path: str, module: nn.Module, rank: int) -> DeltaTarget:
    """The target that ``module`` at ``path`` makes with ``rank``.

    Raises:
        UnsupportedError: the module takes no deltas.
    """
    reason = refusal(module)
    if reason is None and isinstance(module, nn.Conv2d):
        kh, kw = module.kernel_size
        return DeltaTarget(path, "conv", module.in_channels, module.out_channels, rank, (kh, kw))
    if reason is None and isinstance(module, nn.Linear):
        return DeltaTarget(path, "linear", module.in_features, module.out_features, rank)
    if reason is None and isinstance(module, ExpertLinear):
        return DeltaTarget(
            path, "experts", module.in_features, module.out_features, rank, experts=module.experts
        )
    raise UnsupportedError(
        f"Module {path!r} {reason}",
        "Deltas act on Linear, on Conv2d without groups, and on ExpertLinear",
        "Leave it out of the targets",
    )


def find(root: nn.Module, path: str, rank: int) -> DeltaTarget:
    """The target at ``path`` of ``root``.

    Raises:
        CheckpointError: there is no such module; the message has the nearest names.
        UnsupportedError: it takes no deltas.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    if path not in modules:
        able = (name for name, module in modules.items() if refusal(module) is None)
        raise CheckpointError(
            f"The base model has no module {path!r}", "Expected a module's path", nearest(path, able)
        )
    return target_of(path, modules[path], rank)


def resolve(root: nn.Module, spec: DeltaSpec) -> dict[str, nn.Module]:
    """The modules of ``spec`` in ``root`` by path, after checking that each is what its target says.

    Raises:
        CheckpointError: a module is missing, of other dimensions, or the same as that of another target.
        UnsupportedError: it takes no deltas.
    """
    found: dict[str, nn.Module] = {}
    owners: dict[int, str] = {}
    for target in spec.targets:
        actual = find(root, target.module, target.rank)
        if actual != target:
            raise mismatch(actual, f"its delta target is {dimensions(target)}")
        module = root.get_submodule(target.module)
        if id(module) in owners:
            raise CheckpointError(
                f"Delta targets {owners[id(module)]!r} and {target.module!r} are the same module",
                "A module takes one delta",
                "Drop one of the two",
            )
        owners[id(module)] = target.module
        found[target.module] = module
    return found


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
