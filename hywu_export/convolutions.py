"""Convolutions of a traced graph as Winograd products, for the sizes that a plan says are usual."""

from __future__ import annotations

import logging
from dataclasses import replace
from math import ceil, isqrt
from typing import TYPE_CHECKING

from hywu_export.tracing.spec import all_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hywu_export.families.base import Plan
    from hywu_export.tracing import Axis, TracedGraph

log = logging.getLogger(__name__)


def accelerate(traced: TracedGraph, plan: Plan) -> TracedGraph:
    """The graph with 3x3 convolutions replaced where that pays on a CPU; see `passes.winograd`."""
    from hywu_export.passes.winograd import Span, winograd

    roots = {name: axis for name, axis in plan.axes.items() if axis.is_root}
    spans = {
        name: Span(ceil(axis.min / axis.multiple) * axis.multiple, axis.max, axis.multiple)
        for name, axis in roots.items()
    }
    least = all_sizes({name: span.least for name, span in spans.items()}, plan.axes)
    most = all_sizes({name: span.most for name, span in spans.items()}, plan.axes)
    model = traced.model.clone()
    count = winograd(model, all_sizes(_usual(roots, plan), plan.axes, one=True), least, most, spans)
    if not count:
        return traced
    log.info("%s: %d convolutions as Winograd products", traced.name, count)
    return replace(traced, model=model)


def _usual(roots: Mapping[str, Axis], plan: Plan) -> dict[str, int]:
    """One sample of the default working area, where the axes are a picture's; otherwise the largest size."""
    sizes = {name: axis.max // axis.multiple * axis.multiple for name, axis in roots.items()}
    sizes |= {name: roots[name].min for name in ("batch",) if name in roots}
    if plan.image is not None:
        side = isqrt(plan.image.default_area)
        for name in plan.tensors[plan.image.tensor].shape:
            if isinstance(name, str) and name in roots and name != "batch":
                multiple = roots[name].multiple
                sizes[name] = min(max(side // multiple * multiple, roots[name].min), sizes[name])
    return sizes
