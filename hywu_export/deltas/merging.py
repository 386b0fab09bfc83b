"""Where deltas are merged into the weights: once per request, instead of a low-rank branch in every step.

Merging costs a request ``(2 r + MERGE_FLOPS) * in * out`` operations and ``4 * in * out`` bytes for every
set of deltas; the branch costs every token ``2 r (in + out)`` in every step. The constants are estimates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hywu_export.deltas.spec import DeltaSpec, DeltaTarget

Mode = Literal["low-rank", "merged", "auto"]
MODES: tuple[Mode, ...] = ("low-rank", "merged", "auto")

MERGE_FLOPS = 24
"""What reading a weight and writing a merged one takes for every number of it, in operations of a product."""
MOST_BYTES = 2**31
"""`auto` merges no more than this for one set of deltas, the most profitable targets first."""


def choose(spec: DeltaSpec, mode: Mode, steps: int, tokens: int) -> DeltaSpec:
    """``spec`` with ``merged`` set where ``mode`` says so, or where it pays for ``steps`` of ``tokens``.

    Only linear layers are merged: the weights of a convolution cannot differ from sample to sample, and
    merged experts would not fit into memory.
    """
    linear = [target for target in spec.targets if target.kind == "linear"]
    if mode == "merged":
        chosen = {target.module for target in linear}
    elif mode == "auto":
        chosen = _affordable([t for t in linear if _saving(t, steps, tokens) > 0], steps, tokens)
    else:
        chosen = set()
    return DeltaSpec(tuple(replace(t, merged=t.module in chosen) for t in spec.targets))


def merged_bytes(spec: DeltaSpec) -> int:
    """Memory of the merged weights for one set of deltas, in float32."""
    return sum(_bytes(target) for target in spec.targets if target.merged)


def _saving(target: DeltaTarget, steps: int, tokens: int) -> int:
    """Operations that merging saves a request."""
    inner, outer, rank = target.in_features, target.out_features, target.rank
    branch = steps * tokens * 2 * rank * (inner + outer)
    return branch - (2 * rank + MERGE_FLOPS) * inner * outer


def _affordable(targets: list[DeltaTarget], steps: int, tokens: int) -> set[str]:
    left, chosen = MOST_BYTES, set[str]()
    for target in sorted(targets, key=lambda t: -_saving(t, steps, tokens) / _bytes(t)):
        if _bytes(target) <= left:
            left -= _bytes(target)
            chosen.add(target.module)
    return chosen


def _bytes(target: DeltaTarget) -> int:
    return 4 * target.in_features * target.out_features
