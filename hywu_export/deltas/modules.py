"""What a torch module offers to deltas."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hywu_export.deltas.experts import ExpertLinear
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, dimensions, mismatch, nearest
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


def layers(root: nn.Module) -> dict[str, DeltaTarget]:
    """Every module of ``root`` that can take deltas, by path, with rank 1."""
    return {
        path: target_of(path, module, 1)
        for path, module in root.named_modules()
        if path and refusal(module) is None
    }


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` of ``root``, or None.

    CLIP text models have a level ``text_model`` in checkpoints and in the names of deltas; whether there is a
    module of that name depends on the version of transformers.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    return modules.get(path) or modules.get(path.removeprefix("text_model."))


def find(root: nn.Module, path: str, rank: int) -> DeltaTarget:
    """The target at ``path`` of ``root``.

    Raises:
        CheckpointError: there is no such module; the message has the nearest names.
        UnsupportedError: it takes no deltas.
    """
    module = submodule(root, path)
    if module is None:
        raise CheckpointError(
            f"The base model has no module {path!r}", "Expected a module's path", nearest(path, layers(root))
        )
    return target_of(path, module, rank)


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
        module = submodule(root, target.module)
        assert module is not None  # `find` has found it
        if id(module) in owners:
            raise CheckpointError(
                f"Delta targets {owners[id(module)]!r} and {target.module!r} are the same module",
                "A module takes one delta",
                "Drop one of the two",
            )
        owners[id(module)] = target.module
        found[target.module] = module
    return found
