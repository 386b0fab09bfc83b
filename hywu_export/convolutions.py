"""Convolutions of a traced graph as Winograd products, for the sizes that a plan says are usual."""

from __future__ import annotations

import logging
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hywu_export.families.base import Plan
    from hywu_export.tracing import TracedGraph

log = logging.getLogger(__name__)


def accelerate(traced: TracedGraph, plan: Plan) -> TracedGraph:
    """The graph with 3x3 convolutions replaced where that pays on a CPU; see `passes.winograd`."""
    from hywu_export.passes.winograd import transform, winograd
    from hywu_export.tracing import Transform

    model = traced.model.clone()
    replaced = winograd(model, plan.axes, _usual(plan))
    if not replaced:
        return traced
    log.info("%s: %d convolutions as Winograd products", traced.name, len(replaced))
    parameters = traced.model.graph.initializers
    initializers = {n: p for n, p in traced.initializers.items() if n in model.graph.initializers}
    transforms = dict(traced.transforms)
    for name, weight in replaced.items():
        shape = parameters[weight].shape
        assert shape is not None
        initializers[name] = traced.initializers[weight]
        transforms[name] = Transform("winograd", tuple(shape.numpy()), transform)
    return replace(traced, model=model, initializers=initializers, transforms=transforms)


def _usual(plan: Plan) -> dict[str, int]:
    """The root axes for one picture of the default working area; other axes are at their largest."""
    roots = {name: axis for name, axis in plan.axes.items() if axis.is_root}
    sizes = {name: axis.max // axis.multiple * axis.multiple for name, axis in roots.items()}
    if plan.image is not None:
        side = isqrt(plan.image.default_area)
        for name in plan.tensors[plan.image.tensor].shape:
            if isinstance(name, str) and name in roots:
                wanted = 1 if name == "batch" else side // roots[name].multiple * roots[name].multiple
                sizes[name] = min(max(wanted, roots[name].min), sizes[name])
    return sizes
