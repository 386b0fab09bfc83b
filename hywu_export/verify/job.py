"""The job behind `hywu verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hywu_export.verify.measures import Check, NotRun, Report
from hywu_export.verify.pictures import Wish, wishes
from hywu_export.verify.subjects import Comparison, EngineSubject, VariantSubject, recording
from hywu_runtime.bundle import Bundle
from hywu_runtime.engines import BATCH, check_key
from hywu_runtime.errors import DeviceError, EngineError, InputError, UnsupportedError
from hywu_runtime.manifest import Manifest

if TYPE_CHECKING:
    from hywu_export.verify.original import Original

EMULATED_NOTE = "variants ran on the CPU in FP32 graphs, with each FP16 and BF16 result rounded as on a GPU"
Progress = Callable[[str, int, int], None]


def verify(
    bundle: str | Path,
    base: str | Path | None = None,
    generator: str | Path | None = None,
    progress: Progress | None = None,
    *,
    variants: Sequence[str] | None = None,
    engines: Sequence[str] | None = None,
    photo: str | Path | None = None,
    prompt: str | None = None,
    sources: Mapping[str, str | Path] | None = None,
) -> Report:
    """Compares a bundle's graphs with the checkpoints, and its variants and engines with its graphs.

    Args:
        base, generator: the checkpoints; without them that comparison is left out.
        variants, engines: by name and key; None is all that there are.
        photo, prompt: of the whole edits; None is an example.
        sources: where checkpoints with linked weights are, if they are not ``base`` and ``generator``.
    Raises:
        InputError: a checkpoint that the bundle was made from is not given while another one is, or one that
            it was not made from; there is no such variant or engine, or nothing to compare.
        BundleError, CheckpointError, UnsupportedError: something cannot be opened.
    """
    manifest = Manifest.read(bundle)
    given = {"base": base, "generator": generator}
    folders = {name: Path(folder) for name, folder in given.items() if folder is not None}
    ours = _known(manifest, variants, engines)
    if manifest.results.outputs and not any(ours):
        raise UnsupportedError(
            "This bundle was made from a module in memory",
            "The code of a family is what graphs are compared with",
            "Compare what `Editor.run` gives with the module, as docs/any-module.md does",
        )
    if (folders and set(folders) != set(manifest.sources)) or not (folders or any(ours)):
        there = "" if folders else ", and has no variants or engines to compare with it"
        raise InputError(
            f"The checkpoints given are {', '.join(folders) or 'none'}",
            f"The bundle was made from {', '.join(manifest.sources) or 'none'}{there}",
            "Give " + " ".join(f"--{name} DIR" for name in manifest.sources),
        )
    places = {**folders, **(sources or {})} if manifest.linked else None
    opened = Bundle.open(bundle, sources=places)
    tell = progress or (lambda what, done, total: None)
    checks: list[Check] = []
    not_run: list[NotRun] = []
    if folders:
        checks += _against_torch(opened, folders, tell)
    else:
        not_run.append(NotRun("torch", "no checkpoints were given (--base DIR, --generator DIR)"))
    found, passed = _against_own(opened, *ours, photo, prompt, tell)
    return Report((*checks, *found), (*not_run, *passed), (EMULATED_NOTE,) if ours[0] else ())


def _known(
    manifest: Manifest, variants: Sequence[str] | None, engines: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    for name in variants or ():
        if name not in manifest.variants:
            have = ", ".join(sorted(manifest.variants)) or "none"
            raise InputError(
                f"The bundle has no variant {name!r}",
                f"It has: {have}",
                "Choose one of these, or make it with `hywu calibrate`",
            )
    for key in engines or ():
        check_key(manifest, key)
    own = manifest.variants if variants is None and engines is None else variants or ()
    return list(own), list(manifest.engines if variants is None and engines is None else engines or ())


def _against_torch(bundle: Bundle, folders: Mapping[str, Path], tell: Progress) -> list[Check]:
    from hywu_export.verify.original import Original, check_edit, check_graph

    original: Original = Original(bundle, folders.get("base"), folders.get("generator"))
    total = len(original.plan.graphs) + 1
    checks = []
    for done, graph in enumerate(original.plan.graphs):
        tell(f"torch: {graph.name}", done, total)
        checks.append(check_graph(bundle, graph, original))
    shapes_agree = all(check.failure != "shape" for check in checks)  # else there is no running the program
    if shapes_agree and original.family is not None and bundle.manifest.results.image is not None:
        tell("torch: whole edit", total - 1, total)
        checks.append(check_edit(bundle, original.family))
    tell("torch: done", total, total)
    return checks


def _against_own(
    bundle: Bundle,
    variants: Sequence[str],
    engines: Sequence[str],
    photo: str | Path | None,
    prompt: str | None,
    tell: Progress,
) -> tuple[list[Check], list[NotRun]]:
    comparisons, not_run = [], []
    for name in variants:
        subject = VariantSubject(bundle, name)
        comparisons.append(Comparison(subject, _promises(bundle, name)))
    for key in engines:
        try:
            engine = EngineSubject(bundle, key)
        except (DeviceError, EngineError) as error:
            not_run.append(NotRun(f"engine {key}", error.wrong))
            continue
        variant = bundle.manifest.engines[key].variant
        comparisons.append(Comparison(engine, _promises(bundle, variant) if variant is not None else {}))
    sizes: dict[tuple[tuple[str, int], ...], list[Comparison]] = {}
    for comparison in comparisons:
        sizes.setdefault(tuple(sorted(comparison.subject.axes().items())), []).append(comparison)
    for axes, group in sizes.items():
        asked = wishes(bundle, photo, prompt, dict(axes))
        if not asked:
            _compare_generation(bundle, dict(axes), group)
        total = len(asked) * (1 + len(group))
        for i, wish in enumerate(asked):
            done = i * (1 + len(group))
            tell(f"graphs: {wish.name}", done, total)
            expected = _record(bundle, wish, group)
            for j, comparison in enumerate(group):
                tell(f"{comparison.subject.part}: {wish.name}", done + 1 + j, total)
                comparison.see_edit(wish, expected)
        tell("done", max(total, 1), max(total, 1))
    checks = []
    for comparison in comparisons:
        found, unseen = comparison.results()
        checks += found
        not_run += unseen
    return checks, not_run


def _record(bundle: Bundle, wish: Wish, group: Sequence[Comparison]) -> Any:
    """An edit by the bundle's own graphs; all that they do is shown to the comparisons."""
    with recording(bundle, _show(bundle, group)) as editor:
        return wish.edit(editor)


def _compare_generation(bundle: Bundle, axes: Mapping[str, int], group: Sequence[Comparison]) -> None:
    """For a bundle that makes deltas and no pictures."""
    from hywu_export.verify.inputs import SEED
    from hywu_runtime.program import resolve_shape

    manifest = bundle.manifest
    random = np.random.default_rng(SEED)
    sizes = {name: axes.get(name, axis.min or 1) for name, axis in manifest.axes.items() if not axis.derived}
    sizes |= {BATCH: axes.get(BATCH, 1)}
    sizes |= {name: axis.size(sizes) or 1 for name, axis in manifest.axes.items() if axis.derived}
    inputs = {
        name: np.asarray(random.standard_normal(resolve_shape(manifest, name, sizes)), tensor.dtype)
        for name, tensor in manifest.tensors.items()
        if tensor.source == "input"
    }
    with recording(bundle, _show(bundle, group)) as editor:
        editor.generate(inputs=inputs)


def _show(bundle: Bundle, group: Sequence[Comparison]) -> Callable[[Path, Any, Any], None]:
    names = {bundle.file(graph.file): name for name, graph in bundle.manifest.graphs.items()}

    def show(file: Path, inputs: Any, outputs: Any) -> None:
        graph = names[file]
        signature = bundle.manifest.graphs[graph]
        sizes = {
            dimension: size
            for value in (*signature.inputs, *signature.outputs)
            for dimension, size in zip(value.shape, {**inputs, **outputs}[value.name].shape)
            if isinstance(dimension, str)
        }
        for comparison in group:
            comparison.see_graph(graph, inputs, outputs, sizes)

    return show


def _promises(bundle: Bundle, variant: str) -> dict[str, float | None]:
    """The worst PSNR of edited pictures that a variant's report saw, by the name of the wish."""
    path = bundle.manifest.variants[variant].report
    if path is None:
        return {}
    try:
        image = json.loads(bundle.file(path).read_text(encoding="utf-8"))["final_image"]
        worst = {
            name: image[name]["least_psnr_db"] for name in ("deltas_on", "deltas_off") if image.get(name)
        }
        numbers = {name: float(value) for name, value in worst.items()}
    except (KeyError, TypeError, ValueError, OSError):
        return {}  # a report is for people and tools; without a promise the floors hold
    on, off = numbers.get("deltas_on", numbers.get("deltas_off")), numbers.get("deltas_off")
    return {"edit": on, "edit without deltas": off, "edit without guidance": on, "edit with guidance": on}
