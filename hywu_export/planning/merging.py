"""Deltas as low-rank branches against deltas merged into the weights.

With A ``[r, in]`` and B ``[out, r]``, the branch of a layer costs 2·r·(in + out) operations for each token in
each step. Merging, ``W' = W + s·B·A``, costs 2·r·in·out operations once for each set of deltas, reads W, A
and B and writes W'; the layer then costs what it costs without deltas, but every sample with its own
deltas reads its own W'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hywu_export.planning.costs import Limits, Node, time_of

if TYPE_CHECKING:
    from hywu_export.engines.branches import Branch
    from hywu_runtime.manifest import DeltaTarget


@dataclass(frozen=True)
class Merging:
    """The comparison for one step.

    Attributes:
        targets, rank: of the deltas that the graph reads; the largest rank.
        branch_flops, branch_bytes, branch_seconds: of all delta branches in one step.
        share_flops, share_seconds: of the step.
        merge_flops, merge_bytes, merge_seconds: of making W' once for every set of deltas.
        merged_memory: bytes of all W'.
        merged_step: seconds of a step with W'; `step` with branches.
        tokens: of one sample, in the layer that has the most.
        crossover_steps: steps from which merging would be faster; None: never.
        crossover_token_steps: steps · `tokens` from which it would save arithmetic, whatever the device.
    """

    targets: int
    rank: int
    sets: int
    branch_flops: int
    branch_bytes: int
    branch_seconds: float
    share_flops: float
    share_seconds: float
    merge_flops: int
    merge_bytes: int
    merge_seconds: float
    merged_memory: int
    step: float
    merged_step: float
    tokens: int
    crossover_steps: int | None
    crossover_token_steps: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    nodes: Sequence[Node], branches: Sequence[Branch], targets: Mapping[str, DeltaTarget], rank: int | None,
    sets: int, batch: int, limits: Limits,
) -> Merging:  # fmt: skip
    """Compares both ways for the graphs of one stage.

    Args:
        nodes: of the graphs, all.
        branches: what `engines.branches.find_branches` finds in them, one at least.
        targets: by module.
        rank: instead of the targets' own.
        sets: of deltas: 1, or one for each of the ``batch`` samples.
    """
    by_name = {node.name: node for node in nodes}
    own = {name for branch in branches for name in (*branch.down, *branch.up)}
    branch_nodes = [by_name[name] for name in sorted(own)]
    wide = next((n.precision for n in branch_nodes if n.precision != "int8"), "float16")
    item = 4 if wide == "float32" else 2
    merges, numbers = [], 0
    bases: dict[str, int] = {}
    for branch in branches:
        target = targets[branch.module]
        r = rank or target.rank
        weight = math.prod(
            (target.in_features, target.out_features, target.experts or 1, *(target.kernel or ()))
        )
        factors = sum(map(math.prod, target.shapes(r).values()))
        reads, writes = sets * (weight + factors) * item, sets * weight * item
        merges.append(Node(branch.module, "Merge", 2 * r * weight * sets, wide, reads, writes, 0))
        numbers += weight
        if branch.base is not None:
            bases[branch.base] = weight
    merged = [_merged(node, bases, sets, item, wide) for node in nodes if node.name not in own]
    step, after = time_of(nodes, limits), time_of(merged, limits)
    branch_time, merge_time = time_of(branch_nodes, limits), time_of(merges, limits)
    gain = step.seconds - after.seconds
    branch_flops = sum(node.flops for node in branch_nodes)
    merge_flops = sum(node.flops for node in merges)
    tokens = max(node.rows for node in branch_nodes) // max(batch, 1)
    whole = sum(node.flops for node in nodes)
    return Merging(
        len(branches), rank or max(targets[b.module].rank for b in branches), sets,
        branch_flops, sum(node.bytes for node in branch_nodes), branch_time.seconds,
        branch_flops / whole if whole else 0.0, branch_time.seconds / step.seconds if step.seconds else 0.0,
        merge_flops, sum(node.bytes for node in merges), merge_time.seconds, numbers * sets * item,
        step.seconds, after.seconds, tokens,
        math.ceil(merge_time.seconds / gain) if gain > 0 else None,
        math.ceil(merge_flops * tokens / branch_flops) if branch_flops else None,
    )  # fmt: skip


def _merged(node: Node, bases: Mapping[str, int], sets: int, item: int, wide: str) -> Node:
    """A layer that reads one W' for each set of deltas, in floating point: W' is not quantized."""
    if node.name not in bases:
        return node
    weights = bases[node.name] * sets * item
    precision = wide if node.precision == "int8" else node.precision
    return replace(node, precision=precision, reads=node.reads - node.weights + weights)
