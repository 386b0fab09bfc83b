"""How hypernetworks lay out the deltas that they generate, brought to the one layout of a bundle.

That one is A ``[D, r, in]`` (convolution ``[D, r, in, kh, kw]``) and B ``[D, out, r]`` for every module, any
scale in B. A :class:`Pair` says how a generator's tensors differ from it, by naming their axes in order; for
example a stack over layers with A as ``x @ A`` reads it::

    Layout([
        Pair("q.A", "q.B", "model.layers.{layer}.self_attn.q_proj",
             a_axes="batch layer in rank", b_axes="batch layer rank out", scale=alpha / r),
    ])

The same functions take NumPy arrays (files) and torch tensors (graphs, where every operation here is a
Transpose, Gather, Concat, Pad, Reshape or Mul). Numbers are moved, never changed, but for the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, nearest
from hywu_runtime.errors import DeltaError

Array = Any  # a NumPy array or a torch tensor

A_AXES = ("batch", "rank", "in", "kh", "kw")
B_AXES = ("batch", "out", "rank")
GROUPS = ("layer", "slice")
"""Axes along which a tensor holds the matrices of several modules, or of the slices of a fused one."""


@dataclass(frozen=True)
class Pair:
    """Tensors of a generator that hold A and B, and the modules that these belong to.

    Axes are ``batch``, ``layer``, ``slice``, ``rank``, ``in`` and ``out``, and ``kh kw`` after the ``in`` of
    a convolution (whose kernel may also be flat within ``in``). One that is not named has size 1: without
    ``batch`` there is one delta for all samples, without ``layer`` all layers have the same.

    Attributes:
        a, b: names of the generator's tensors, see :func:`flatten`. Several names are the slices of a fused
            projection (q, k, v of one qkv layer), as is an axis ``slice``: each has its own B, and its own
            A, or all share one A.
        modules: path of the module; ``{layer}`` stands for the layer's number. Several paths: the generator
            makes one delta for them as if they were fused; they share A, and B's rows are theirs in order.
        a_axes, b_axes: the tensors' axes in order.
        scale: a number, or the name of a tensor, that B is multiplied with (alpha / r).
        scale_axes: axes of that tensor, of ``batch``, ``layer`` and ``slice``.
        layers: numbers of the layers, in the order of the axis; None counts from 0.
        groups: of a fused projection whose rows are interleaved (grouped-query attention stores, group by
            group, the group's queries, its key and its value).
        rows: rows of B for each of several ``modules``; None takes them from the base model.

    Raises:
        DeltaError: axes that cannot be.
    """

    a: str | Sequence[str]
    b: str | Sequence[str]
    modules: str | Sequence[str]
    a_axes: str = "batch rank in"
    b_axes: str = "batch out rank"
    scale: float | str = 1.0
    scale_axes: str = ""
    layers: Sequence[int] | None = None
    groups: int = 1
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for what, axes, own in (("A", self.a_axes, A_AXES), ("B", self.b_axes, B_AXES)):
            _check_axes(what, axes, own, required=own[1:3])
        _check_axes("the scale", self.scale_axes, ("batch",), required=())
        if self.groups < 1:
            raise DeltaError(f"The layout has {self.groups} groups", "Expected 1 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the generator that the pair reads."""
        scale = (self.scale,) if isinstance(self.scale, str) else ()
        return (*_several(self.a), *_several(self.b), *scale)


@dataclass(frozen=True)
class Layout:
    """All pairs of a generator."""

    pairs: Sequence[Pair] = field(default_factory=tuple)

    def deltas(
        self,
        outputs: Mapping[str, Array],
        spec: DeltaSpec | None = None,
        out_features: Mapping[str, int] | None = None,
    ) -> dict[str, Array]:
        """The generator's tensors as ``<module>.lora_A`` and ``<module>.lora_B`` of the bundle, float32.

        With ``spec``, in its order, with ranks padded by zeros to those of its targets. ``out_features`` says
        how many rows of a fused B a module has, where no ``spec`` does.

        Raises:
            DeltaError: a tensor is missing or has other axes; two pairs make one module's delta; a module has
                no target, a target no delta, or sizes or ranks do not fit.
        """
        rows = dict(out_features or {})
        if spec is not None:
            rows |= {target.module: target.out_features for target in spec.targets}
        made: dict[str, tuple[Array, Array]] = {}
        for pair in self.pairs:
            for module, delta in _matrices(pair, outputs, rows).items():
                if module in made:
                    raise DeltaError(
                        f"The layout makes the delta of {module!r} twice", "A module has one delta"
                    )
                made[module] = delta
        return _named(made) if spec is None else _fit(made, spec)


def flatten(outputs: Any, single: str = "output") -> dict[str, Any]:
    """Tensors in nested mappings and sequences by dotted names.

    ``{"q": {"A": t}}`` is ``q.A``, ``[(a, b)]`` is ``0.0`` and ``0.1``; a tensor alone is ``single``. None is
    left out.
    """
    if isinstance(outputs, Mapping):
        entries = [(str(key), value) for key, value in outputs.items()]
    elif isinstance(outputs, (list, tuple)):
        entries = [(str(index), value) for index, value in enumerate(outputs)]
    else:
        return {} if outputs is None else {single: outputs}
    return {
        name: tensor for key, value in entries for name, tensor in _below(key, flatten(value, "")).items()
    }


def fuse(parts: Sequence[tuple[Array, Array]], groups: int = 1) -> tuple[Array, Array]:
    """The delta of a fused projection whose slices have deltas of their own: A stacked, B block-diagonal.

    Its rank is the sum of theirs. A_i is ``[D, r_i, in]``, B_i ``[D, out_i, r_i]``; with ``groups`` the rows
    of the slices are interleaved as in :class:`Pair`.
    """
    ranks = [a.shape[1] for a, _ in parts]
    wide = [
        _pad(b, 2, sum(ranks[:i]), sum(ranks[i + 1 :])) if len(parts) > 1 else b
        for i, (_, b) in enumerate(parts)
    ]
    return _concat([a for a, _ in parts], 1), stack_rows(wide, groups)


def stack_rows(parts: Sequence[Array], groups: int = 1) -> Array:
    """Rows ``[D, out_i, r]`` of fused slices as ``[D, Σ out_i, r]``; ``groups``: see `Pair`."""
    if groups == 1:
        return _concat(parts, 1)
    for part in parts:
        _divisible(part.shape[1], groups)
    grouped = [part.reshape(-1, groups, part.shape[1] // groups, part.shape[2]) for part in parts]
    rows = sum(part.shape[1] for part in parts)
    return _concat(grouped, 2).reshape(-1, rows, parts[0].shape[2])


def split_rows(b: Array, rows: Sequence[int], groups: int = 1) -> list[Array]:
    """The inverse of :func:`stack_rows`: ``rows`` says how many each slice has."""
    if sum(rows) != b.shape[1]:
        raise DeltaError(
            f"A fused B has {b.shape[1]} rows", f"Expected {' + '.join(map(str, rows))} for its modules"
        )
    for count in rows:
        _divisible(count, groups)
    grouped = b.reshape(-1, groups, b.shape[1] // groups, b.shape[2])
    parts, start = [], 0
    for count in rows:
        end = start + count // groups
        parts.append(grouped[:, :, start:end].reshape(-1, count, b.shape[2]))
        start = end
    return parts


def _matrices(
    pair: Pair, outputs: Mapping[str, Array], known: Mapping[str, int]
) -> dict[str, tuple[Array, Array]]:
    """Module path → A ``[D, r, in, …]``, B ``[D, out, r]``, scaled."""
    a = [_arranged(_get(outputs, name), pair.a_axes, A_AXES, f"A ({name})") for name in _several(pair.a)]
    b = [_arranged(_get(outputs, name), pair.b_axes, B_AXES, f"B ({name})") for name in _several(pair.b)]
    if isinstance(pair.scale, str):
        scale = _arranged(_get(outputs, pair.scale), pair.scale_axes, ("batch",), f"the scale ({pair.scale})")
        b = [tensor * scale[..., None, None] for tensor in b]
    elif pair.scale != 1.0:
        b = [tensor * pair.scale for tensor in b]
    layers = _layers(pair, [*a, *b])
    made: dict[str, tuple[Array, Array]] = {}
    for position, layer in enumerate(layers):
        paths = [path.replace("{layer}", str(layer)) for path in _several(pair.modules)]
        slices_a = [s for tensor in a for s in _slices(tensor, position)]
        slices_b = [s for tensor in b for s in _slices(tensor, position)]
        if len(slices_a) == 1:
            one_a, one_b = (
                slices_a[0],
                stack_rows(slices_b, pair.groups) if len(slices_b) > 1 else slices_b[0],
            )
        elif len(slices_a) == len(slices_b):
            one_a, one_b = fuse(list(zip(slices_a, slices_b)), pair.groups)
        else:
            raise DeltaError(
                f"The layout of {paths[0]!r} has {len(slices_a)} slices of A and {len(slices_b)} of B",
                "Expected as many, or one A for all",
            )
        parts = [one_b]
        if len(paths) > 1:
            parts = split_rows(one_b, _rows(pair, paths, known), pair.groups)
        for path, part in zip(paths, parts):
            if path in made:
                raise DeltaError(
                    f"The layout makes the delta of {path!r} twice",
                    "A module has one delta",
                    "Put {layer} into the module's path",
                )
            made[path] = (one_a, part)
    return made


def _arranged(tensor: Array, axes: str, own: Sequence[str], what: str) -> Array:
    """``[layer, slice, *own]``; an axis that is not there is of size 1, or left out if it is a kernel's."""
    names = axes.split()
    if tensor.ndim != len(names):
        raise DeltaError(
            f"{what[0].upper()}{what[1:]} of the generator has shape {[str(size) for size in tensor.shape]}",
            f"Expected the {len(names)} axes {axes!r}",
            "Correct the layout",
        )
    order = [name for name in (*GROUPS, *own) if name in names]
    tensor = _permute(tensor, [names.index(name) for name in order])
    wanted = [name for name in (*GROUPS, *own) if name in names or name not in ("kh", "kw")]
    return tensor[tuple(slice(None) if name in names else None for name in wanted)]


def _layers(pair: Pair, tensors: Sequence[Array]) -> Sequence[int]:
    counts = {int(tensor.shape[0]) for tensor in tensors}
    count = max(counts)
    if counts - {1, count}:
        raise DeltaError(
            f"Tensors of {pair.names} have {sorted(counts)} layers", "Expected one number of layers for all"
        )
    if pair.layers is None:
        return range(count)
    if count not in (1, len(pair.layers)):
        raise DeltaError(
            f"Tensors of {pair.names} have {count} layers", f"The layout names {len(pair.layers)}"
        )
    return pair.layers


def _slices(tensor: Array, position: int) -> list[Array]:
    """The slices ``[D, …]`` of one layer of an arranged tensor."""
    layer = tensor[position if tensor.shape[0] > 1 else 0]
    return [layer[i] for i in range(int(layer.shape[0]))]


def _rows(pair: Pair, paths: Sequence[str], known: Mapping[str, int]) -> Sequence[int]:
    if pair.rows is not None:
        if len(pair.rows) != len(paths):
            raise DeltaError(f"The layout has rows for {len(pair.rows)} modules", f"It names {len(paths)}")
        return pair.rows
    for path in paths:
        if path not in known:
            raise DeltaError(
                f"How many rows of the fused B belong to {path!r} is not known",
                "Expected the module among the targets, or `rows` in the layout",
                nearest(path, known),
            )
    return [known[path] for path in paths]


def _fit(made: Mapping[str, tuple[Array, Array]], spec: DeltaSpec) -> dict[str, Array]:
    modules = [target.module for target in spec.targets]
    for module in made:
        if module not in modules:
            raise DeltaError(
                f"The generator makes a delta for {module!r}, which takes none",
                "Expected modules that are targets",
                nearest(module, modules),
            )
    fitted: dict[str, tuple[Array, Array]] = {}
    for target in spec.targets:
        if target.module not in made:
            raise DeltaError(
                f"The generator makes no delta for the target {target.module!r}",
                "Expected one for every target",
                "Leave it out of the targets, or add it to the layout",
            )
        fitted[target.module] = _fitted(target, *made[target.module])
    return _named(fitted)


def _fitted(target: DeltaTarget, a: Array, b: Array) -> tuple[Array, Array]:
    shape = target.tensors()[target.a_name]
    rank = int(a.shape[1])
    flat = int(np.prod(shape[1:]))
    if int(np.prod([int(size) for size in a.shape[2:]])) != flat or int(b.shape[1]) != target.out_features:
        raise DeltaError(
            f"The generator makes A {_sizes(a)} and B {_sizes(b)} for {target.module!r}",
            f"Expected A [r, {', '.join(map(str, shape[1:]))}] and B [{target.out_features}, r]",
            "Check the axes of the layout, and that the generator is for this base",
        )
    if int(b.shape[2]) != rank or rank > target.rank:
        raise DeltaError(
            f"The generator makes a delta of rank {rank} (A) and {b.shape[2]} (B) for {target.module!r}",
            f"Expected one rank of at most {target.rank}",
            "Check the axes of the layout, or raise the rank",
        )
    if rank < target.rank:
        a, b = _pad(a, 1, 0, target.rank - rank), _pad(b, 2, 0, target.rank - rank)
    return a.reshape(-1, *shape), b


def _named(made: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
    return {
        f"{module}.{suffix}": _float32(tensor)
        for module, pair in made.items()
        for suffix, tensor in zip(("lora_A", "lora_B"), pair)
    }


def _check_axes(what: str, axes: str, own: Sequence[str], required: Sequence[str]) -> None:
    names = axes.split()
    unknown = [name for name in names if name not in (*GROUPS, *own)]
    if unknown or len(set(names)) != len(names) or not set(required) <= set(names):
        raise DeltaError(
            f"The axes of {what} are {axes!r}",
            f"Expected {' and '.join(required) or 'any'} of {', '.join((*GROUPS, *own))}, each once",
            "Correct the layout",
        )
    if {"kh", "kw"} & set(names) and [n for n in names if n in ("in", "kh", "kw")] != ["in", "kh", "kw"]:
        raise DeltaError(f"The axes of {what} are {axes!r}", "Expected kh and kw, in this order, after in")


def _get(outputs: Mapping[str, Array], name: str) -> Array:
    if name not in outputs:
        raise DeltaError(
            f"The generator gives no tensor {name!r}",
            "Expected what the layout names",
            nearest(name, outputs),
        )
    return outputs[name]


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _below(key: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key}.{name}" if name else key: value for name, value in entries.items()}


def _sizes(tensor: Array) -> list[str]:
    return [str(size) for size in tensor.shape[1:]]


def _divisible(rows: int, groups: int) -> None:
    if rows % groups:
        raise DeltaError(f"A slice has {rows} rows", f"Expected a multiple of the {groups} groups")


def _permute(tensor: Array, order: Sequence[int]) -> Array:
    return tensor.transpose(order) if isinstance(tensor, np.ndarray) else tensor.permute(*order)


def _concat(parts: Sequence[Array], axis: int) -> Array:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(list(parts), axis)


def _pad(tensor: Array, axis: int, before: int, after: int) -> Array:
    """``tensor`` with zeros before and after it along ``axis``."""
    if isinstance(tensor, np.ndarray):
        return np.pad(tensor, [(before, after) if i == axis else (0, 0) for i in range(tensor.ndim)])
    import torch.nn.functional as F

    return F.pad(tensor, [0, 0] * (tensor.ndim - 1 - axis) + [before, after])


def _float32(tensor: Array) -> Array:
    return tensor.astype(np.float32) if isinstance(tensor, np.ndarray) else tensor.float()
