"""The job behind ``hywu calibrate``: from a bundle, photographs and instructions to a variant."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_calibration.data import CalibrationData
from hywu_calibration.evaluation import Evaluation, Pixels, psnr
from hywu_calibration.html import Pictures, render
from hywu_calibration.int8 import (
    Candidates,
    Layers,
    Plan,
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
from hywu_calibration.records import Record, Recordings
from hywu_calibration.report import (
    Edit,
    FinalImage,
    LayerReport,
    Quality,
    Report,
    Samples,
    Size,
    Skipped,
    Target,
    Wide,
    versions,
)
from hywu_calibration.sensitivity import half_sqnr, layer_sqnr, weight_sqnr
from hywu_calibration.wide import wide_nodes
from hywu_calibration.work import Progress, Work
from hywu_export.bundle.sessions import ModelBackend
from hywu_export.bundle.variants import component_sizes, load_graph, write_variant
from hywu_export.passes import check
from hywu_export.passes.half import Half, emulate, structure, to_half
from hywu_export.passes.layers import find_layers
from hywu_export.passes.quantize import quantize
from hywu_export.passes.weights8 import quantize_weights
from hywu_export.passes.winograd import is_winograd
from hywu_runtime.backends import create_backend
from hywu_runtime.backends.onnxruntime import INTEGER_PRODUCTS
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import DeltaError, InputError, UnsupportedError
from hywu_runtime.files import write_atomically

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
Extremes = Mapping[str, Mapping[str, float]]  # by graph and value
_log = logging.getLogger(__name__)
SEARCHES = 6
"""Rounds of the search for wide layers that are reckoned with."""
SQNR_RECORDS = 24
"""Runs of a graph, spread over all samples, in which the layers' SQNR is measured."""
_EMULATED = (
    "ONNX Runtime's CPU leaves out roundings between FP16 nodes and has no BF16 products: pictures and SQNR "
    "are those of FP32 graphs in which the result of every narrow node is rounded."
)


def calibrate(bundle: str | Path, options: CalibrationOptions, progress: Progress | None = None) -> Report:
    """Adds a variant to a bundle, or replaces the one of that name.

    The bundle is untouched until the variant is complete. A job that was killed goes on where it was when
    it is run again, and ends with the same bytes.

    Raises:
        InputError: an option, the photographs or the prompts cannot be used, or samples are too few.
        BundleError: the bundle is damaged, makes values that are not finite, or cannot be written.
        UnsupportedError: the bundle makes no images, or was exported for CPUs.
        DeltaError: deltas do not fit.
    """
    options.check()
    opened = Bundle.open(bundle, sources=options.sources)
    data = CalibrationData(opened, options)
    with data.folder() as folder:
        return _Job(opened, options, data, folder, progress).run()


@dataclass
class _Result:
    """The graphs of a variant, how they are measured, and what the report says about them."""

    models: dict[str, ir.Model]
    layers: list[LayerReport]
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
        if options.form == "tensorrt":
            _refuse_winograd(self.models)
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
            shares["ranges"] = 2 * passes * observed
        shares["SQNR"] = 2.5 * min(observed, SQNR_RECORDS)
        shares["search"] = (5 if self.options.precision == "int8" else 1) * edits
        return shares | {"final edits": 2 * edits * len(data.strengths)}

    def run(self) -> Report:
        self._record()
        for part, strength in enumerate(self.data.strengths):
            stage = self.work.stage("edits in FP32", part, len(self.data.strengths))
            self.references[strength] = self.evaluation.references(self.backend, strength, stage)
        extremes, sizes = self._extremes()
        if self.options.precision == "int8":
            result = self._int8(extremes, sizes)
        elif self.options.precision == "int8-weights":
            result = self._int8_weights(extremes)
        else:
            result = self._half(extremes)
        if self.options.form == "tensorrt":  # unsigned activations are for ONNX Runtime alone
            for graph, model in result.models.items():
                check(model, set(self.bundle.manifest.axes), name=graph)
        quality, pictures = self._final(result)
        report = self._report(result, quality)
        extra = {
            "report.json": [report.dumps().encode()],
            "report.html": [render(report, pictures).encode()],
        }
        write_variant(
            self.bundle.root,
            self.options.variant,
            self.options.precision,
            result.models,
            extra,
            "report.json",
            suffix=INTEGER_PRODUCTS if self._unsigned else ".onnx",
        )
        self.work.done()
        return report

    def _record(self) -> None:
        try:
            self.recordings.make(
                self.bundle, strength=self.data.strength, deltas=self.data.deltas,
                progress=self.work.stage("edits"),
            )  # fmt: skip
        except DeltaError:
            for record in self.recordings.failed:
                blame(self.models[record.graph], record)
            raise
        self.counts = self.recordings.counts()
        self._leave_out([graph for graph in self.models if not self.counts[graph]])

    def _leave_out(self, unseen: Sequence[str]) -> None:
        """Graphs that no edit with given deltas runs, the generator's, stay as they are."""
        forms = {call.graph for call in self.bundle.manifest.program if call.guided is not None}
        missed = next((graph for graph in unseen if graph in forms), None)
        if missed is not None:
            raise InputError(
                f"None of the samples ran graph {missed!r}: {len(self.data.samples)} samples",
                "Expected every graph to be observed; guidance differs in every fourth sample",
                "Give --samples 4 or more",
            )
        for graph in unseen:
            _log.info("Graph %s stays as it is: no sample runs it", graph)
            del self.models[graph]

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
            write_atomically(file, lambda stream, content=content: stream.write(content))  # type: ignore[misc]
        return found, sizes

    def _narrow(
        self, model: ir.Model, graph: str, extremes: Extremes, more: Sequence[str] = ()
    ) -> list[Wide]:
        """Lets a model compute in the variant's half precision, in place; what stays wide, and why."""
        dtype: Half = "bf16" if self.options.precision == "bf16" else "fp16"
        reasons = structure(model, dtype)
        measured = wide_nodes(model, extremes[graph]) if dtype == "fp16" else {}
        operators = {node.name or "": node.op_type for node in model.graph}
        to_half(model, dtype, {*measured, *more})
        reasons = {**dict.fromkeys(more, "its SQNR is among the lowest"), **measured, **reasons}
        return [Wide(graph, name, operators[name], reason) for name, reason in reasons.items()]

    # FP16 and BF16

    def _half(self, extremes: Extremes) -> _Result:
        """Half precision; the worst layers go back to FP32 until the pictures are as good as asked."""
        half = self.options.precision
        assert half in ("fp16", "bf16")
        nodes = {g: {x.name: x.node.name or "" for x in find_layers(m)} for g, m in self.models.items()}
        sqnr: dict[str, dict[str, float]] = {}
        for part, (graph, model) in enumerate(self.models.items()):
            stage = self.work.stage("SQNR", part, len(self.models))
            records, count = self._some(graph)
            sqnr[graph] = half_sqnr(model, nodes[graph], half, records, count, stage)
        order = ranking(sqnr)
        budget = int(self.options.max_wide * len(order))

        def made(count: int) -> tuple[dict[str, ir.Model], list[Wide]]:
            worst = {name for name, _ in order[:count]}
            models, wide = {}, []
            for graph, model in self.models.items():
                models[graph] = model.clone()
                more = [node for name, node in nodes[graph].items() if name in worst]
                wide += self._narrow(models[graph], graph, extremes, more)
            return models, wide

        count = self._search(
            lambda wide: {g: emulate(m) for g, m in made(wide)[0].items()}, min(budget, len(order))
        )
        models, wide = made(count)
        kept = {(x.graph, x.name) for x in wide}
        layers = [
            LayerReport(
                g, x.name, x.op, sqnr[g].get(x.name), "fp32" if (g, nodes[g][x.name]) in kept else half
            )
            for g, model in self.models.items()
            for x in find_layers(model)
        ]
        return _Result(models, layers, wide)

    # INT8 weights

    def _int8_weights(self, extremes: Extremes) -> _Result:
        """Weights in INT8, products in FP16; the worst layers keep FP16 weights until pictures are good."""
        found = candidates(self.models)
        sqnr: dict[str, dict[str, float]] = {}
        for part, (graph, some) in enumerate(found.layers.items()):
            stage = self.work.stage("SQNR", part, len(found.layers))
            records, count = self._some(graph)
            names = [layer.name for layer in some]
            sqnr[graph] = weight_sqnr(self.models[graph], names, records, count, stage)
        order = ranking(sqnr)
        budget = int(self.options.max_wide * len(order))

        def made(count: int) -> dict[str, ir.Model]:
            worst = {name for name, _ in order[:count]}
            models = {graph: self.models[graph].clone() for graph in found.layers}
            for model in models.values():
                quantize_weights(model, worst)
            return models

        count = self._search(made, min(budget, len(order)))
        models = made(count)
        for graph, model in models.items():
            self._narrow(model, graph, extremes)
        dropped = dict(order[:count])
        return _Result(
            models, self._layer_reports(found, sqnr, dropped), [*found.excluded, *_worst(found, dropped)]
        )

    # INT8

    def _int8(self, extremes: Extremes, sizes: Mapping[str, Mapping[str, int]]) -> _Result:
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
            records, count = self._some(graph)
            stage = self.work.stage("SQNR", part, len(plan))
            sqnr[graph] = layer_sqnr(self.models[graph], plan[graph], records, count, stage, self._unsigned)
        order = ranking(sqnr)
        budget = max(0, int(options.max_wide * len(found.names)) - len({wide.name for wide in constant}))

        def made(count: int) -> dict[str, ir.Model]:
            names = [name for name, _ in order[:count]]
            return self._quantized(without(plan, names))

        count = self._search(made, min(budget, len(order)))
        dropped = dict(order[:count])
        models = made(count)
        if options.form == "tensorrt":
            for graph, model in models.items():
                self._narrow(model, graph, extremes)
        wide = [*found.excluded, *constant, *_worst(found, dropped)]
        return _Result(
            models, self._layer_reports(found, sqnr, {*dropped, *(w.name for w in constant)}), wide
        )

    @property
    def _unsigned(self) -> bool:
        return self.options.form == "ort-cpu"

    def _observe(
        self,
        layers: Layers,
        sizes: Mapping[str, Mapping[str, int]],
        smoothing: Mapping[str, Mapping[str, Array]] | None,
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
                place, places = number * len(groups) + i, passes * len(layers) * len(groups)
                stage = self.work.stage("ranges", place, places)
                state = self.folder / f"ranges-{part:03d}-{i:03d}{suffix}.safetensors"
                result[graph] |= observe(
                    self.models[graph], self.recordings.of(graph), group, self.counts[graph], state, stage
                )
        return result

    def _quantized(self, plan: Plan) -> dict[str, ir.Model]:
        """The graphs with some layers in INT8, the rest in FP32."""
        return {
            graph: quantize(self.models[graph].clone(), layers, unsigned=self._unsigned)
            for graph, layers in plan.items()
        }

    def _layer_reports(
        self, found: Candidates, sqnr: Mapping[str, Mapping[str, float]], wide: Collection[str]
    ) -> list[LayerReport]:
        """Every layer that INT8 is for, with the precision that it got."""
        narrow = self.options.precision
        other = "fp32" if self.options.form == "ort-cpu" else "fp16"
        return [
            LayerReport(
                graph,
                x.name,
                x.op,
                sqnr[graph].get(x.name),
                other if x.name in wide else narrow,  # type: ignore[arg-type]
            )
            for graph, some in found.layers.items()
            for x in some
        ]

    # What all have in common

    def _some(self, graph: str) -> tuple[Iterator[Record], int]:
        """Some of a graph's records, and their number."""
        return self.recordings.of(graph, SQNR_RECORDS), min(self.counts[graph], SQNR_RECORDS)

    def _search(self, made: Callable[[int], Mapping[str, ir.Model]], budget: int) -> int:
        """How many of the worst layers must stay wide for the pictures to be as good as asked."""
        strength = self.data.strengths[0]
        least: dict[int, float] = {}

        def good(wide: int) -> bool:
            stage = self.work.stage("search", min(len(least), SEARCHES - 1), SEARCHES)
            pictures = self.evaluation.edit(ModelBackend(self.bundle, made(wide)), strength, stage)
            least[wide] = min(map(psnr, pictures, self.references[strength]))
            return least[wide] >= self.options.min_psnr

        count, reached = fewest_wide(budget, good)
        if not reached:
            _log.warning(
                "--min-psnr %g is not reached with %d wide layers, all that --max-wide %g allows: "
                "the worst edit has %.1f dB",
                self.options.min_psnr, count, self.options.max_wide, least[count],
            )  # fmt: skip
        return count

    def _final(self, result: _Result) -> tuple[FinalImage, list[Pictures]]:
        """The edits by the variant's graphs: quality by strength, and pictures with deltas on."""
        qualities: dict[float, Quality] = {}
        shown: list[Pictures] = []
        narrow = self.options.form == "tensorrt"
        models = {g: emulate(m) if narrow else m for g, m in result.models.items()}
        for part, strength in enumerate(self.data.strengths):
            stage = self.work.stage("final edits", part, len(self.data.strengths))
            pictures = self.evaluation.edit(ModelBackend(self.bundle, models), strength, stage)
            edits = []
            for sample, reference, picture in zip(self.data.edits, self.references[strength], pictures):
                difference = np.abs(reference.astype(np.int16) - picture.astype(np.int16))
                height, width = reference.shape[:2]
                edits.append(
                    Edit(
                        sample.photo.name, sample.prompt, (width, height), sample.guided,
                        psnr(picture, reference), int(difference.max(initial=0)),
                    )
                )  # fmt: skip
                if part == 0:
                    shown.append(Pictures(edits[-1], reference, picture))
            qualities[strength] = Quality.of(edits)
        measured = "emulation" if narrow else "runtime"
        return FinalImage(qualities.get(1.0), qualities[0.0], measured), shown  # type: ignore[arg-type]

    def _report(self, result: _Result, quality: FinalImage) -> Report:
        options, data = self.options, self.data
        before, after = component_sizes(self.models), component_sizes(result.models)
        components = {name: (before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}
        method = None
        if options.precision == "int8":
            method = options.method + (f" {options.percentile:g}" if options.method == "percentile" else "")
        notes = [_EMULATED] if quality.measured == "emulation" else []
        if data.strength != 1.0 and data.strengths[0] == 1.0:
            notes.append(f"Ranges were observed with deltas of strength {data.strength:g}.")
        return Report(
            variant=options.variant,
            precision=options.precision,
            final_image=quality,
            layers=tuple(result.layers),
            wide=tuple(result.wide),
            size=Size(sum(before.values()), sum(after.values()), components),
            samples=Samples(
                len(data.samples), len(data.photos.paths), len(data.prompts), data.evaluations,
                tuple(Skipped(file.name, reason) for file, reason in data.photos.skipped),
            ),
            seed=options.seed,
            versions=versions(),
            method=method,
            smooth=options.smooth,
            target=Target(options.min_psnr, options.max_wide),
            notes=tuple(notes),
        )  # fmt: skip


def _refuse_winograd(models: Mapping[str, ir.Model]) -> None:
    """Winograd's transforms lose too many digits in half precision, and hide convolutions from INT8."""
    name = next((name for name, model in models.items() if is_winograd(model)), None)
    if name is not None:
        raise UnsupportedError(
            f"Graph {name!r} was exported for CPUs: its convolutions are Winograd products",
            "Narrow variants are made from convolutions; on a CPU, INT8 is: --variant int8 --backend ort-cpu",
            "Export the bundle again without --winograd, or give --backend ort-cpu",
        )


def _worst(found: Candidates, dropped: Mapping[str, float]) -> list[Wide]:
    """The layers that a search has kept wide, with their SQNR."""
    return [
        Wide(
            graph, layer.name, layer.op, f"SQNR {dropped[layer.name]:.1f} dB, among the {len(dropped)} lowest"
        )
        for graph, layers in found.layers.items()
        for layer in layers
        if layer.name in dropped
    ]
