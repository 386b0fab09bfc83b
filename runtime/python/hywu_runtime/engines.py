"""Which of a bundle's engines serves a request, and what `hywu build` would have to make.

The rules, which every runtime follows: an engine is usable if it was made for the backend and the variant, is
not stale, and its version and its GPU are those at hand; *newest* is the last in the manifest. A request is
served by the newest usable engine that has every graph it needs and covers its sizes.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hywu_runtime.codec import show
from hywu_runtime.errors import EngineError, InputError
from hywu_runtime.manifest import Engine, ImagePolicy, Manifest

BATCH = "batch"


@dataclass(frozen=True)
class Target:
    """What an engine must have been built for to run here.

    ``backend``: ``tensorrt`` or ``tensorrt-rtx``; ``version`` of its library; ``capability`` of the GPU, as
    ``8.6``, and its name.
    """

    backend: str
    version: str
    capability: str
    device: str


def obstacle(manifest: Manifest, key: str, target: Target) -> str | None:
    """Why an engine cannot run on ``target``, or None."""
    engine = manifest.engines[key]
    if engine.backend != target.backend:
        return f"it is for backend {engine.backend}"
    changed = manifest.stale(key)
    if changed is not None:
        return f"it is stale: {changed} is not what it was built from"
    if engine.version != target.version and not (
        engine.version_compatible and _follows(engine.version, target.version)
    ):
        return f"it was built by version {engine.version}, here is {target.version}"
    if target.capability not in engine.compute_capabilities and not (
        engine.hardware_compatible
        and _number(target.capability) >= min(map(_number, engine.compute_capabilities))
    ):
        built = ", ".join(engine.compute_capabilities)
        return f"it was built for compute capability {built}, {target.device} has {target.capability}"
    return None


def usable(
    root: Path, manifest: Manifest, target: Target, variant: str | None = None, key: str | None = None
) -> tuple[str, ...]:
    """The engines that run on ``target``, the newest first.

    Args:
        root: the bundle's directory, for the commands in messages.
        key: this engine and no other.
    Raises:
        InputError: there is no engine ``key``.
        EngineError: none is usable; the message says why, and what to build.
    """
    if key is not None:
        check_key(manifest, key)
        variant = manifest.engines[key].variant
    candidates = [key] if key is not None else list(manifest.engines)[::-1]
    candidates = [k for k in candidates if manifest.engines[k].variant == variant]
    obstacles = {k: obstacle(manifest, k, target) for k in candidates}
    found = tuple(k for k, problem in obstacles.items() if problem is None)
    if found:
        return found
    own = {k: problem for k, problem in obstacles.items() if manifest.engines[k].backend == target.backend}
    if key is not None:
        own = obstacles
    if not own:
        raise EngineError(
            f"The bundle has no {target.backend} engine {_of(variant)}",
            f"Expected one of version {target.version} for compute capability {target.capability}",
            f"Build it: {build_command(root, manifest, target, variant)}",
        )
    first = next(iter(own))
    described = "; ".join(f"engine {k}: {problem}" for k, problem in own.items())
    raise EngineError(
        f"No engine {_of(variant)} can be used: {described}",
        f"Expected one for {target.backend} {target.version} and compute capability {target.capability}",
        f"Build it: {build_command(root, manifest, target, variant, manifest.engines[first].shapes)}",
    )


def covering(
    root: Path,
    manifest: Manifest,
    keys: Sequence[str],
    axes: Mapping[str, int],
    graphs: Collection[str],
    target: Target,
) -> str:
    """The first of some usable engines that has all ``graphs`` and takes the sizes of ``axes``.

    Raises:
        InputError: a size is outside the shapes of them all.
        EngineError: none has all graphs.
    """
    whole = [key for key in keys if set(graphs) <= manifest.engines[key].graphs.keys()]
    for key in whole:
        if manifest.engines[key].covers(axes) is None:
            return key
    first = manifest.engines[keys[0]]
    if not whole:
        lacking = sorted(set(graphs) - first.graphs.keys())
        raise EngineError(
            f"Engine {keys[0]} has no graph {', '.join(lacking)}",
            "Expected every graph that the request needs",
            f"Build it: {build_command(root, manifest, target, first.variant, first.shapes)}",
        )
    engine = manifest.engines[whole[0]]
    axis = engine.covers(axes)
    assert axis is not None  # or it would have been taken
    low, _, high = engine.shapes[axis]
    others = f", and the {len(whole) - 1} other engines do not fit either" if len(whole) > 1 else ""
    raise InputError(
        f"Axis {axis} has size {axes[axis]}",
        f"Engine {whole[0]} takes {low} to {high}{others}",
        "Choose a size within it, or build one: "
        + build_command(root, manifest, target, engine.variant, widened(engine.shapes, axes)),
    )


def check_key(manifest: Manifest, key: str) -> None:
    """Raises InputError unless the bundle has an engine ``key``."""
    if key not in manifest.engines:
        have = ", ".join(manifest.engines) or "none"
        raise InputError(
            f"The bundle has no engine {show(key, 120)}",
            f"It has: {have}",
            "Choose one of these, or make one with `hywu build`",
        )


def widened(shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """``shapes`` with room for ``axes``."""
    return {
        name: (min(low, axes.get(name, low)), best, max(high, axes.get(name, high)))
        for name, (low, best, high) in shapes.items()
    }


def narrowed(manifest: Manifest, engine: Engine) -> ImagePolicy | None:
    """The policy for a photo's size, within what an engine takes: see *Engines* in docs/bundle.md."""
    policy = manifest.image
    if policy is None:
        return None
    ranges = [engine.shapes[name] for name in sides(manifest) if name in engine.shapes]
    low = max([policy.min, *(sizes[0] for sizes in ranges)])
    high = min([policy.max, *(sizes[2] for sizes in ranges)])
    return replace(policy, min=low, max=high) if low <= high else policy


def sides(manifest: Manifest) -> tuple[str, ...]:
    """The axes of a photo: height and width, where they are axes."""
    shape = manifest.tensors[manifest.image.tensor].shape[1:3] if manifest.image is not None else ()
    return tuple(name for name in shape if isinstance(name, str))


def build_command(
    root: Path,
    manifest: Manifest,
    target: Target,
    variant: str | None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> str:
    """The `hywu build` that makes an engine for ``target``, ready for a shell."""
    words = ["hywu", "build", str(root), "--backend", target.backend]
    if target.backend == "tensorrt-rtx":  # TensorRT builds for the GPU that it runs on
        words += ["--compute-capability", target.capability.replace(".", "")]
    if variant is not None:
        words += ["--variant", variant]
    rest = dict(shapes or {})
    names = sides(manifest)
    if len(names) == 2 and all(name in rest for name in names):
        height, width = (rest[name] for name in names)
        rest = {name: sizes for name, sizes in rest.items() if name not in names}
        words += ["--shapes", ":".join(f"{w}x{h}" for w, h in zip(width, height))]
    delta_batch = manifest.deltas.axis if manifest.deltas is not None else None
    for name, sizes in rest.items():
        value = ":".join(map(str, sizes))
        if name == BATCH:
            words += ["--batch", value]
        elif name == delta_batch:
            if sizes != rest.get(BATCH):  # which is the default
                words += ["--delta-batch", value]
        else:
            words += ["--axis", f"{name}={value}"]
    return shlex.join(words)


def _of(variant: str | None) -> str:
    return "of the bundle's own graphs" if variant is None else f"of variant {variant}"


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in text.split("."))


def _follows(built: str, here: str) -> bool:
    """Whether a version-compatible engine of one version runs on another: the same major, not older."""
    return _number(built)[:1] == _number(here)[:1] and _number(here) >= _number(built)
