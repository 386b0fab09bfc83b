"""The job behind ``hywu calibrate``: from a bundle, photographs and instructions to a variant."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from hywu_calibration.data import CalibrationData
from hywu_calibration.evaluation import Evaluation, Pixels, psnr
from hywu_calibration.int8 import (
    Candidates,
    Layers,
    Plan,
    Wide,
    candidates,
    constant_layers,
    fewest_wide,
    ranking,
    smoothing_factors,
    taps,
    without,
)
from hywu_calibration.int8 import plan as make_plan
from hywu_calibration.observe import Observed, blame, chunks, extremes, observe
from hywu_calibration.options import CalibrationOptions
from hywu_calibration.records import Recordings
from hywu_calibration.sensitivity import layer_sqnr
from hywu_calibration.sessions import ModelBackend
from hywu_calibration.work import Progress, Work
from hywu_export.bundle.variants import load_graph, write_variant
from hywu_export.passes.half import to_half
from hywu_export.passes.layers import find_layers
from hywu_export.passes.quantize import quantize
from hywu_runtime.backends import create_backend
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import DeltaError
from hywu_runtime.files import write_atomically

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
_log = logging.getLogger(__name__)
SEARCHES = 6
"""Rounds of the search for wide layers that are reckoned with."""
SQNR_RECORDS = 24
"""Runs of a graph, spread over all samples, in which the layers' SQNR is measured."""


def calibrate(bundle: str | Path, options: CalibrationOptions, progress: Progress | None = None) -> Report:
    """Adds a variant to a bundle, or replaces the one of that name.

    The bundle is untouched until the variant is complete. A job that was killed goes on where it was when it is run
    again, and ends with the same bytes.

    Raises:
        InputError: an option, the photographs or the prompts cannot be used.
        BundleError: the bundle is damaged, makes values that are not finite, or cannot be written.
        UnsupportedError: the bundle makes no images.
        DeltaError: deltas do not fit.
    """
    options.check()
    opened = Bundle.open(bundle, sources=options.sources)
    data = CalibrationData(opened, options)
    with data.folder() as folder:
        return _Job(opened, options, data, folder, progress).run()


@dataclass
class _Result:
    """The graphs of a variant, and what the report says about them."""

    models: dict[str, ir.Model]
    sqnr: dict[str, dict[str, float]] = field(default_factory=dict)  # by graph and layer
    wide: list[Wide] = field(default_factory=list)


class _Job:
    def __init__(
        self,
        bundle: Bundle,
        options: CalibrationOptions,
        data: CalibrationData,
        folder: Path,
        progress: Progress | None,
    ):
        self.bundle, self.options, self.data, self.folder = bundle, options, data, folder
        self.backend = create_backend("ort-cpu")
        self.recordings = Recordings(folder, data.samples)
        self.evaluation = Evaluation(bundle, data.edits, data.deltas, folder)
        self.models: dict[str, ir.Model] = {g: load_graph(bundle, g) for g in bundle.manifest.graphs}
        self.work = Work(self._shares(), progress)
        self.references: dict[float, list[Pixels]] = {}
        self.counts: Mapping[str, int] = {}

    def _shares(self) -> dict[str, float]:
        """The stages, in evaluations of the denoiser."""
        data = self.data
        observed = sum(len(sample.evaluations) for sample in data.samples)
        edits = len(data.edits) * data.evaluations
        shares = {
            "edits": len(data.samples) * data.evaluations,
            "edits in FP32": edits * len(data.strengths),
            "extremes": 1.5 * observed,
        }
        if self.options.precision == "int8":
            passes = 1 if self.options.smooth is None else 2
            shares |= {"ranges": 2 * passes * observed, "SQNR": 2.5 * min(observed, SQNR_RECORDS)}
            shares["search"] = 5 * edits
        return shares | {"final edits": 2 * edits * len(data.strengths)}

    def run(self) -> Report:
        self._record()
        for strength in self.data.strengths:
            part = self.data.strengths.index(strength)
            stage = self.work.stage("edits in FP32", part, len(self.data.strengths))
            self.references[strength] = self.evaluation.references(self.backend, strength, stage)
        extremes, sizes = self._extremes()
        result = self._int8(extremes, sizes)
        pictures = {}
        for part, strength in enumerate(self.data.strengths):
            stage = self.work.stage("final edits", part, len(self.data.strengths))
            pictures[strength] = self.evaluation.edit(ModelBackend(self.bundle, result.models), strength, stage)
        self.work.done()
        raise NotImplementedError

    def _record(self) -> None:
        try:
            self.recordings.make(
                self.bundle, self.backend, strength=self.data.strength, deltas=self.data.deltas,
                progress=self.work.stage("edits"),
            )  # fmt: skip
        except DeltaError:
            for record in self.recordings.failed:
                blame(self.models[record.graph], record)
            raise
        self.counts = self.recordings.counts()

    def _extremes(self) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
        """By graph and value: the largest absolute value, and the size of what layers read."""
        found: dict[str, dict[str, float]] = {}
        sizes: dict[str, dict[str, int]] = {}
        for part, (graph, model) in enumerate(self.models.items()):
            stage = self.work.stage("extremes", part, len(self.models))
            file = self.folder / f"extremes-{part:03d}.json"
            if file.exists():
                found[graph], sizes[graph] = json.loads(file.read_text())
                continue
            wanted = [layer.data.name or "" for layer in find_layers(model)]
            found[graph], sizes[graph] = extremes(
                model, self.recordings.of(graph), self.counts[graph], wanted, stage
            )
            content = json.dumps([found[graph], sizes[graph]]).encode()
            write_atomically(file, lambda stream, content=content: stream.write(content))
        return found, sizes

    # INT8

    def _int8(self, extremes: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]]) -> _Result:
        options = self.options
        found = candidates(self.models, convolutions=options.form == "tensorrt")
        observed = self._observe(found.layers, sizes, None)
        constant = constant_layers(found.layers, observed)
        smoothing: dict[str, dict[str, Array]] = {}
        if options.smooth is not None:
            smoothing = smoothing_factors(found.layers, observed, options.smooth)
            smoothed = self._observe(found.layers, sizes, smoothing)
            observed = {graph: {**observed[graph], **smoothed[graph]} for graph in observed}
        plan = make_plan(found.layers, observed, options.method, options.percentile, smoothing, constant)
        sqnr: dict[str, dict[str, float]] = {}
        for part, graph in enumerate(plan):
            records = self.recordings.of(graph, SQNR_RECORDS)
            count = min(self.counts[graph], SQNR_RECORDS)
            stage = self.work.stage("SQNR", part, len(plan))
            sqnr[graph] = layer_sqnr(self.models[graph], plan[graph], records, count, stage)
        order = ranking(sqnr)
        budget = max(0, int(options.max_wide * len(found.names)) - len({wide.name for wide in constant}))
        return self._search(found, plan, order, min(budget, len(order)), sqnr, [*found.excluded, *constant], extremes)

    def _observe(
        self, layers: Layers, sizes: Mapping[str, Mapping[str, int]], smoothing: Mapping[str, Mapping[str, Array]] | None
    ) -> dict[str, dict[str, Observed]]:
        """Histograms by graph and activation; with ``smoothing``, of the smoothed ones."""
        passes = 1 if self.options.smooth is None else 2
        result: dict[str, dict[str, Observed]] = {}
        for part, (graph, some) in enumerate(layers.items()):
            result[graph] = {}
            divisors = None if smoothing is None else smoothing[graph]
            groups = chunks(taps(some, divisors), sizes[graph])
            number = part if smoothing is None else part + len(layers)
            suffix = "" if smoothing is None else f"-smooth-{self.options.smooth:g}"
            for i, group in enumerate(groups):
                stage = self.work.stage("ranges", number * len(groups) + i, passes * len(layers) * len(groups))
                state = self.folder / f"ranges-{part:03d}-{i:03d}{suffix}.safetensors"
                result[graph] |= observe(
                    self.models[graph], self.recordings.of(graph), group, self.counts[graph], state, stage
                )
        return result

    def _search(
        self,
        found: Candidates,
        plan: Plan,
        order: Sequence[tuple[str, float]],
        budget: int,
        sqnr: dict[str, dict[str, float]],
        excluded: list[Wide],
        extremes: Mapping[str, Mapping[str, float]],
    ) -> _Result:
        """Keeps as few of the worst layers wide as the pictures allow."""
        strength = self.data.strengths[0]
        least: dict[int, float] = {}

        def good(wide: int) -> bool:
            models = self._quantized(without(plan, [name for name, _ in order[:wide]]), None)
            stage = self.work.stage("search", len(least), SEARCHES)
            pictures = self.evaluation.edit(ModelBackend(self.bundle, models), strength, stage)
            least[wide] = min(map(psnr, pictures, self.references[strength]))
            return least[wide] >= self.options.min_psnr

        count, reached = fewest_wide(budget, good)
        if not reached:
            _log.warning(
                "--min-psnr %g is not reached with %d wide layers, all that --max-wide %g allows: the worst edit has %.1f dB",
                self.options.min_psnr, count, self.options.max_wide, least[count],
            )  # fmt: skip
        dropped = dict(order[:count])
        wide = list(excluded)
        for graph, layers in found.layers.items():
            for layer in layers:
                if layer.name in dropped and layer.name in plan[graph]:
                    reason = f"SQNR {dropped[layer.name]:.1f} dB, among the {count} lowest"
                    wide.append(Wide(graph, layer.name, layer.op, reason))
        return _Result(self._quantized(without(plan, dropped), extremes), sqnr, wide)

    def _quantized(self, plan: Plan, extremes: Mapping[str, Mapping[str, float]] | None) -> dict[str, ir.Model]:
        """The graphs with some layers in INT8; the rest is FP32 without ``extremes``, or as the form asks."""
        models = {}
        for graph, layers in plan.items():
            models[graph] = quantize(self.models[graph].clone(), layers, unsigned=self.options.form == "ort-cpu")
            if extremes is not None and self.options.form == "tensorrt":
                to_half(models[graph], "fp16", wide_nodes(models[graph], extremes[graph]))
        return models
