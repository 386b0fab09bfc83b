"""The data of a calibration: checked, drawn, and recorded where a killed job finds it again."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hywu_calibration.options import CalibrationOptions
from hywu_calibration.samples import Sample, draw_samples, find_photographs, read_prompts
from hywu_runtime import Deltas
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import DeltaError, InputError, UnsupportedError
from hywu_runtime.manifest import is_guided
from hywu_runtime.schedule import Schedule

EDITS = 8
"""Edits of calibration photographs in which a variant's pictures are compared with those of FP32."""
_STATE = 1  # version of what is kept between runs
_log = logging.getLogger(__name__)


class CalibrationData:
    """What a bundle is calibrated with.

    Attributes:
        photos: those that can be read, and those that are skipped.
        samples: the edits to observe.
        edits: those of them that pictures are compared in.
        deltas: sets that are used in turn, in place of generated ones.
        strength: of the deltas while ranges are observed.
        strengths: at which pictures are compared: on and off, or off alone where there are no deltas.
        evaluations: how many an edit has.

    Raises:
        InputError, UnsupportedError, DeltaError: there is nothing to calibrate with, or it cannot be used.
    """

    def __init__(self, bundle: Bundle, options: CalibrationOptions):
        self._bundle, self._options = bundle, options
        manifest = bundle.manifest
        if manifest.results.image is None:
            raise UnsupportedError(
                "This bundle makes no images: it holds no image editor",
                "Calibration edits photographs, and compares pictures",
                "Calibrate a bundle that was exported with --base",
            )
        images, prompts = self._given()
        self.photos = find_photographs(images, manifest.image)
        for file, reason in self.photos.skipped:
            _log.warning("%s is skipped: %s", file.name, reason)
        self.prompts = read_prompts(prompts)
        self.deltas = self._load_deltas()
        generates = bool(manifest.results.deltas)
        if manifest.deltas is not None and not generates and not self.deltas:
            _log.warning("This bundle has no generator: without --deltas it is calibrated with deltas off")
        self.strength = options.strength if generates or self.deltas else 0.0
        self.strengths = (1.0, 0.0) if generates or self.deltas else (0.0,)
        self.evaluations = self._count_evaluations()
        self.samples = self._draw()
        usual = [s for s in self.samples if s.size is None and s.guided == is_guided(manifest.guidance)]
        self.edits = (usual or self.samples)[:EDITS]

    def _given(self) -> tuple[Path, Path]:
        """The folder of photographs and the file of prompts."""
        images, prompts = self._options.images, self._options.prompts
        if images is not None and prompts is not None:
            return images, prompts
        missing = [name for name, value in (("--images", images), ("--prompts", prompts)) if value is None]
        offer = self._photographs_at_hand()
        hint = f"; photographs for this bundle are in {offer}" if offer is not None and images is None else ""
        raise InputError(
            f"There is nothing to calibrate with: {' and '.join(missing)} missing",
            "Expected photographs and instructions like those that will come; ranges from random data would "
            "clip real values, and no quality could be reported",
            f"Give --images DIR and --prompts FILE (one instruction a line){hint}",
        )

    def _photographs_at_hand(self) -> Path | None:
        """A folder of photographs beside the bundle or, for the demo's bundle, those of the checkout."""
        beside = self._bundle.root.absolute().parent / "photos"
        demo = Path("demo") / "photos"
        sources = self._bundle.manifest.sources
        is_demo = {"base", "generator"} <= set(sources) and (demo.parent / "generator").is_dir()
        for folder in (beside, *([demo] if is_demo else [])):
            if folder.is_dir() and any(folder.glob("*.jpg")):
                return folder
        return None

    def _load_deltas(self) -> list[Deltas]:
        spec = self._bundle.manifest.deltas
        sets = [Deltas.load(file) for file in self._options.deltas]
        if sets and spec is None:
            raise DeltaError(
                "This bundle takes no deltas", "It was exported without targets", "Leave --deltas out"
            )
        for one in sets:
            assert spec is not None
            one.pad(spec).check(spec, 1)
        return sets

    def _count_evaluations(self) -> int:
        section = self._bundle.manifest.schedules
        if section is not None:
            return len(Schedule(self._bundle.file(section.file), section).rows(None, self._options.steps))
        if self._options.steps is not None:
            raise InputError("This bundle has no schedule", "Its edits have one step", "Leave --steps out")
        return 1

    def _draw(self) -> list[Sample]:
        manifest, options = self._bundle.manifest, self._options
        default = is_guided(manifest.guidance)
        known = {call.guided for call in manifest.program}
        both = any(scale.decides for scale in manifest.guidance) and {True, False} <= known
        return draw_samples(
            self.photos.paths, self.prompts, options.samples, options.seed, evaluations=self.evaluations,
            steps=options.steps, guidance=manifest.guidance, policy=manifest.image,
            forms=(default, not default) if both else (default,),
        )  # fmt: skip

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The folder of recordings. It goes when the job is done, unless a cache was asked for."""
        root = self._options.cache
        if root is None:
            bundle = self._bundle.root.absolute()
            root = bundle.parent / f".{bundle.name}.calibration"
        folder = root / self._fingerprint()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"Recordings cannot be kept in {root}: {error.strerror or error}",
                "Expected a folder that can be written, with room for them",
                "Give another one with --cache",
            ) from None
        yield folder
        if self._options.cache is None:
            shutil.rmtree(root, ignore_errors=True)

    def _fingerprint(self) -> str:
        """Of everything that recordings depend on."""
        manifest = self._bundle.manifest
        digests = {photo: hashlib.sha256(photo.read_bytes()).hexdigest() for photo in self.photos.paths}
        own = {p: f.sha256 for p, f in manifest.files.items() if not p.startswith(("variants/", "engines/"))}
        content = {
            "state": _STATE,
            "files": own,
            "sources": {
                n: {p: f.header_sha256 for p, f in s.files.items()} for n, s in manifest.sources.items()
            },
            "samples": [
                (digests[s.photo], s.prompt, s.seed, s.size, s.steps, s.guidance, s.evaluations)
                for s in self.samples
            ],
            "strength": self.strength,
            "deltas": [hashlib.sha256(file.read_bytes()).hexdigest() for file in self._options.deltas],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
