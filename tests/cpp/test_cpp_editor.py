"""The C++ runtime gives the bytes that the Python runtime gives, for the toy family and for the demo pair."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
import toy_bundle
from native import Library, NativeError

from hywu_runtime import Deltas, Editor
from hywu_runtime.errors import HywuError
from hywu_runtime.images import load_photo
from hywu_runtime.noise import normal

THREADS = 2


class Both:
    """One bundle in both runtimes; what is asked of both must give equal bytes."""

    def __init__(self, library: Library, path: Path, **options: Any):
        self.library = library
        self.python = Editor.load(path, "ort-cpu", threads=THREADS, **options)
        self.cpp = native.Editor.load(library, path, backend="ort-cpu", threads=THREADS, **options)

    def edit(self, requests: list[tuple[Any, str]], **options: Any) -> list[Any]:
        ours = dict(options)
        if "guidance" in ours:
            ours["guidance"] = dict(ours["guidance"])
        if "negative_prompt" in ours:
            ours["negative_prompt"] = list(ours["negative_prompt"])
        given = options.pop("deltas", None)
        if given is not None:
            ours["deltas"] = [native.Deltas.create(self.library, dict(d)) for d in given]
            options["deltas"] = given[0] if len(given) == 1 else list(given)
        for name, absent in (("steps", 0), ("size", (0, 0))):
            if options.get(name, absent) == absent:
                options.pop(name, None)
        expected = self.python.edit_batch(requests, output="array", **options)
        found = self.cpp.edit_batch(requests, **ours)
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            np.testing.assert_array_equal(a, b)
        return found

    def generate(self, photo: Any, prompt: str, **options: Any) -> Deltas:
        expected = self.python.generate(photo, prompt, **options)
        found = self.cpp.generate(photo, prompt, **options).tensors()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, expected[name])
        return expected

    def close(self) -> None:
        self.python.close()
        self.cpp.close()


@pytest.fixture(scope="module")
def both(library: Library, toy: Path) -> Iterator[Both]:
    both = Both(library, toy)
    yield both
    both.close()


def photo(seed: int = 0, height: int = 16, width: int = 24) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def region(batch: int, height: int = 16, width: int = 24, seed: int = 5) -> dict[str, Any]:
    numbers = np.random.default_rng(seed).uniform(0, 1, (batch, 1, height // 4, width // 4))
    return {"region": numbers.astype(np.float32)}


PROMPTS = ["hello", "", "a much longer instruction", "zwölf Bäume 🌳"]


def test_a_scale_without_a_condition(library: Library, tmp_path: Path) -> None:
    toy_bundle.write_bundle(tmp_path / "b")
    toy_bundle.rewrite(tmp_path / "b", toy_bundle.distil)
    both = Both(library, tmp_path / "b")
    pictures = []
    for guidance in ({}, {"distilled": 1.5}, {"distilled": 0.0}, {"text": 1.0, "distilled": 9.0}):
        options = {"guidance": guidance, "inputs": region(2), "steps": 2}
        pictures.append(both.edit([(photo(i), "hello") for i in range(2)], **options))
    assert len({np.stack(picture).tobytes() for picture in pictures}) == 4
    both.cpp.warm_up()
    both.close()


@pytest.mark.parametrize("scale", [2.0, 1.0])
@pytest.mark.parametrize("sampler", ["even", "wild"])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_batches_samplers_guidance(both: Both, batch: int, sampler: str, scale: float) -> None:
    requests = [(photo(i), PROMPTS[i]) for i in range(batch)]
    for steps in (2, 3, 4):
        pictures = both.edit(
            requests, sampler=sampler, steps=steps, guidance={"text": scale}, seed=2**63 + steps,
            inputs=region(batch),
        )  # fmt: skip
        assert pictures[0].std() > 1


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (40, 16), (16, 56)])
def test_sizes(both: Both, size: tuple[int, int]) -> None:
    width, height = size
    both.edit([(photo(1, height, width), "x")], size=size, inputs=region(1, height, width))
    both.edit([(photo(1, 33, 70), "x")], size=size, inputs=region(1, height, width))  # resampled


def test_the_default_size_keeps_the_aspect(both: Both) -> None:
    pixels = load_photo(photo(1, 90, 130), both.python.bundle.manifest.image)
    height, width = pixels.shape[:2]
    both.edit([(photo(1, 90, 130), "x"), (photo(2, 200, 61), "y")], inputs=region(2, height, width))


def test_edits_that_start_midway(library: Library, tmp_path: Path) -> None:
    toy_bundle.write_midway(tmp_path / "bundle")
    both = Both(library, tmp_path / "bundle")
    try:
        assert both.cpp.limits().default_strength == 0.6
        requests = [(photo(i), PROMPTS[i]) for i in range(2)]
        pictures = [
            both.edit(requests, sampler=sampler, steps=4, inputs=region(2), **strength)
            for sampler in ("even", "wild")
            for strength in ({}, {"strength": 1.0}, {"strength": 0.5}, {"strength": 1 / 3})
        ]
        # Each starts at step 1, 0, 2 and again int(4 - 4/3) = 2.
        assert len({picture[0].tobytes() for picture in pictures}) == 6
        refused: dict[str, Any] = {"steps": 4, "inputs": region(1), "strength": 1e-17}
        with pytest.raises(NativeError, match="No step is left of 4"):
            both.cpp.edit_batch([(photo(), "x")], **refused)
        with pytest.raises(NativeError, match="at most 1"):
            both.cpp.edit_batch([(photo(), "x")], **{**refused, "strength": 1.5})
    finally:
        both.close()


def test_strengths_seeds_scales_for_each_sample(both: Both) -> None:
    requests = [(photo(i), PROMPTS[i]) for i in range(3)]
    options: dict[str, Any] = {"inputs": region(3), "sampler": "wild"}
    each = both.edit(
        requests,
        delta_strength=[0.0, 0.5, 2.0],
        seed=[3, 2**64 - 1, 3],
        guidance={"text": [1.0, 3.0, 0.5]},
        **options,
    )
    off = both.edit(
        requests, delta_strength=0.0, seed=[3, 2**64 - 1, 3], guidance={"text": [1.0, 3.0, 0.5]}, **options
    )
    np.testing.assert_array_equal(each[0], off[0])
    alone = both.edit(
        [requests[2]], seed=[3], inputs={"region": options["inputs"]["region"][2:]}, sampler="wild"
    )
    apart = both.edit(
        [requests[2]], seed=3, inputs={"region": options["inputs"]["region"][2:]}, sampler="wild"
    )
    np.testing.assert_array_equal(alone[0], apart[0])


def test_given_deltas(both: Both, tmp_path: Path) -> None:
    made = [both.generate(photo(i), PROMPTS[i]) for i in range(3)]
    requests = [(photo(i), PROMPTS[i]) for i in range(3)]
    options: dict[str, Any] = {"inputs": region(3)}
    generated = both.edit(requests, **options)
    given = both.edit(requests, deltas=made, **options)
    for a, b in zip(generated, given):
        np.testing.assert_array_equal(a, b)
    both.edit(requests, deltas=[Deltas.stack(made)], **options)
    both.edit(requests, deltas=[made[1]], **options)
    low = Deltas({name: t[:, :1] if name.endswith("A") else t[..., :1] for name, t in made[0].items()})
    both.edit(requests, deltas=[low], **options)
    both.edit(requests, deltas=[low, made[1], low], **options)

    library = both.library
    ours, theirs = native.Deltas.create(library, dict(made[0])), made[0]
    ours.save(tmp_path / "cpp.safetensors")
    theirs.save(tmp_path / "python.safetensors")
    assert (tmp_path / "cpp.safetensors").read_bytes() == (tmp_path / "python.safetensors").read_bytes()
    again = native.Deltas.load(library, tmp_path / "python.safetensors")
    blend = native.Deltas.blend(library, [(again, 0.75), (ours, -1.5)]).tensors()
    expected = Deltas.blend([(theirs, 0.75), (theirs, -1.5)])
    for name, tensor in blend.items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_noise_latents_token_ids_and_intermediate_results(both: Both) -> None:
    ids, _ = toy_bundle.token_ids("hello", 8, 256)
    marks, mask = toy_bundle.token_ids("hello", 6, 257, left=True)
    inputs = region(1)
    text = both.edit([(photo(), "hello")], inputs=inputs)
    tokens = {"ids.words": ids[None], "ids.marks": marks[None], "ids.marks.mask": mask[None]}
    numbers = both.edit([(photo(), "ignored")], inputs={**inputs, **tokens})
    np.testing.assert_array_equal(text[0], numbers[0])

    latents = normal((4, 4, 6), 0)[None]
    noise = np.random.default_rng(1).standard_normal((7, 1, 4, 4, 6)).astype(np.float32)
    both.edit([(photo(), "hello")], sampler="wild", steps=4, noise=noise, latents=latents, inputs=inputs)
    both.edit([(photo(), "hello")], latents=latents.astype(np.float64), inputs=inputs)
    both.edit([(photo(), "hello")], latents=latents.astype(np.float16), inputs=inputs)
    words = np.random.default_rng(2).standard_normal((1, 4)).astype(np.float32)
    both.edit([(photo(), "hello")], inputs={**inputs, "prompt.words": words})
    both.generate(photo(), "hello", inputs={"prompt.words": words})
    for array in (np.stack([words[0]] * 3),):
        both.generate(None, "hello", inputs={"prompt.words": array, "prompt.marks": array})


def test_a_then_b_then_a(both: Both) -> None:
    inputs = region(1)
    first = both.edit([(photo(1), "a")], inputs=inputs)
    both.edit([(photo(2), "b")], inputs=region(1, seed=9), guidance={"text": 1.0})
    both.edit([(photo(2), "b")] * 2, inputs=region(2))
    np.testing.assert_array_equal(both.edit([(photo(1), "a")], inputs=inputs)[0], first[0])


def test_low_memory(library: Library, toy: Path, both: Both) -> None:
    low = Both(library, toy, low_memory=True)
    found = low.edit([(photo(), "hello")], inputs=region(1))
    np.testing.assert_array_equal(found[0], both.edit([(photo(), "hello")], inputs=region(1))[0])
    memory = low.cpp.memory()
    assert (memory.graphs, memory.shared) == (0, 0)
    low.close()


def test_variants(library: Library, toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(toy, path)
    (path / "variants" / "other").mkdir(parents=True)
    shutil.copy(path / "words.onnx", path / "variants/other/words.onnx")
    model = toy_bundle.model("final")
    level = next(i for i in model.graph.initializer if i.name == "level")
    level.CopyFrom(__import__("onnx").numpy_helper.from_array(np.float32(100), "level"))
    __import__("onnx").save(model, path / "variants/other/final.onnx")
    graphs = {"words": "variants/other/words.onnx", "final": "variants/other/final.onnx"}
    toy_bundle.rewrite(path, lambda m: m.update(variants={"other": {"precision": "fp16", "graphs": graphs}}))
    own, other = Both(library, path), Both(library, path, variant="other")
    a = own.edit([(photo(), "hello")], inputs=region(1))[0]
    b = other.edit([(photo(), "hello")], inputs=region(1))[0]
    assert b.max() <= 100 < a.max()
    with pytest.raises(NativeError, match="no variant 'third'") as caught:
        native.Editor.load(library, path, variant="third")
    assert caught.value.status == "INPUT"


def test_the_same_words_for_the_same_mistakes(both: Both, library: Library, toy: Path) -> None:
    """Both runtimes refuse with one text, where the mistake can be made in both."""
    good = {"inputs": region(1)}
    mistakes: list[dict[str, Any]] = [
        {"sampler": "none"}, {"steps": 9}, {"steps": -2},
        {"guidance": {"image": 1.0}}, {"guidance": {"text": float("nan")}},
        {"delta_strength": float("inf")}, {"size": (12, 16)}, {"inputs": {}},
        {"inputs": {"nothing": np.zeros(1, np.float32)}}, {"inputs": {"latents": np.zeros(1, np.float32)}},
        {"inputs": region(2)}, {"inputs": {"region": np.zeros((1, 1, 4), np.float32)}},
        {"latents": np.full((1, 4, 4, 6), np.nan, np.float32)},
        {"latents": np.zeros((1, 4, 4, 5), np.float32)},
        {"noise": np.zeros((1, 1, 4, 4, 6), np.float32)},
    ]  # fmt: skip
    for mistake in mistakes:
        options = {**good, **mistake}
        with pytest.raises(HywuError) as theirs:
            both.python.edit_batch([(photo(), "x")], output="array", **options)
        with pytest.raises(NativeError) as ours:
            both.cpp.edit_batch([(photo(), "x")], **options)
        assert ours.value.status == type(theirs.value).__name__.removesuffix("Error").upper()
        parts = (theirs.value.wrong, theirs.value.expected, theirs.value.remedy)
        if "size" in mistake:  # Python shows the argument, which may be of many types
            assert ours.value.parts[1:] == parts[1:]
        else:
            assert ours.value.parts == parts
    for arguments in ({"variant": "x"}, {"backend": "x"}, {"backend": "ort-cuda"}, {"threads": 5000}):
        with pytest.raises(HywuError) as theirs:
            Editor.load(toy, **arguments)
        with pytest.raises(NativeError) as ours:
            native.Editor.load(library, toy, **arguments)
        assert ours.value.parts[0].split(":")[0] == theirs.value.wrong.split(":")[0]
        assert ours.value.status == type(theirs.value).__name__.removesuffix("Error").upper()


def test_engines_that_cannot_be_taken(library: Library, toy: Path, tmp_path: Path) -> None:
    """Without a GPU a bundle with engines runs its graphs; what contradicts an engine has one text."""
    path = Path(shutil.copytree(toy, tmp_path / "bundle"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["engines/key/step.plan"] = {"size": 7, "sha256": "0" * 64}  # which is not there
    manifest["engines"] = {
        "key": {
            "backend": "tensorrt",
            "version": "10.3.0",
            "compute_capabilities": ["8.9"],
            "shapes": {"batch": [1, 1, 1]},
            "graphs": {"step": "engines/key/step.plan"},
            "sources": {"step.onnx": manifest["files"]["step.onnx"]["sha256"]},
        }
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert native.Bundle.open(library, path).engines() == ["key"]
    assert native.Bundle.open(library, toy).engines() == []
    plain = native.Editor.load(library, toy).edit(photo(), "x", inputs=region(1))
    if library.backends()["tensorrt"] is not None:
        editor = native.Editor.load(library, path)
        assert editor.limits().batch_max == 4  # the bundle's own
        np.testing.assert_array_equal(editor.edit(photo(), "x", inputs=region(1)), plain)
    for arguments in (
        {"engine": "other"},
        {"engine": ""},
        {"engine": "key", "backend": "ort-cpu"},
        {"engine": "key", "backend": "tensorrt-rtx"},
        {"engine": "key", "variant": "half"},
    ):
        with pytest.raises(HywuError) as theirs:
            Editor.load(path, **arguments)
        with pytest.raises(NativeError) as ours:
            native.Editor.load(library, path, **arguments)
        assert ours.value.status == "INPUT"
        assert ours.value.parts == (theirs.value.wrong, theirs.value.expected, theirs.value.remedy)


def test_cancelling_from_another_thread(both: Both, library: Library) -> None:
    cancel = native.Handle(library, "cancel")
    library.check("cancel_create", cancel.out())
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        if done == 2:
            thread = threading.Thread(target=library.lib.hywu_cancel_request, args=(cancel.pointer,))
            thread.start()
            thread.join()

    options: dict[str, Any] = {"inputs": region(1), "steps": 5}
    expected = both.cpp.edit(photo(), "x", **options)
    with pytest.raises(NativeError, match=r"^The request was cancelled\.$"):
        both.cpp.edit(photo(), "x", progress=progress, cancel=cancel, **options)
    assert steps == [1, 2]
    np.testing.assert_array_equal(both.cpp.edit(photo(), "x", **options), expected)


def test_editors_of_one_bundle_share_their_graphs(library: Library, toy: Path) -> None:
    bundle = native.Bundle.open(library, toy)
    editors = [bundle.editor(threads=1) for _ in range(3)]
    pictures = [editor.edit(photo(), "x", inputs=region(1)) for editor in editors]
    np.testing.assert_array_equal(pictures[0], pictures[2])
    assert editors[0].memory().shared == editors[0].memory().graphs == 7
    other = bundle.editor(threads=2)
    other.edit(photo(), "x", inputs=region(1))
    assert other.memory().shared == 14


@pytest.mark.slow
def test_linked_weights(library: Library, pair: Any, tmp_path: Path) -> None:
    from hywu_export import ExportOptions, export

    path = tmp_path / "linked"
    export(path, pair.base, pair.generator, ExportOptions(link_weights=True, max_steps=12))
    sources = {name: {"base": pair.base, "generator": pair.generator}[name] for name in linked_sources(path)}
    with pytest.raises(NativeError, match="linked to source") as caught:
        native.Editor.load(library, path)
    assert caught.value.status == "BUNDLE"
    both = Both(library, path, sources=sources)
    both.edit([(photo(1, 64, 64), "make it sepia")], steps=3)


def linked_sources(path: Path) -> set[str]:
    from hywu_runtime import Manifest

    linked = Manifest.read(path).linked
    return {tensor.source for tensors in linked.values() for tensor in tensors.values()}


@pytest.mark.slow
def test_every_instruction_of_the_demo(library: Library, demo_bundle: Path) -> None:
    from demo import run as demo
    from demo.recipe import operations

    both = Both(library, demo_bundle)
    source = load_photo(demo.HERE / "photos" / "coffee.jpg", both.python.bundle.manifest.image, (64, 64))
    edits = [both.edit([(source, operation.phrasings[0])], seed=7)[0] for operation in operations.OPERATIONS]
    assert len({edit.tobytes() for edit in edits}) == len(operations.OPERATIONS)
    phrasings = [operation.phrasings[-1] for operation in operations.OPERATIONS[:3]]
    photos = [
        load_photo(p, both.python.bundle.manifest.image, (64, 96))
        for p in sorted((demo.HERE / "photos").glob("*.jpg"))[:3]
    ]
    batch = both.edit(list(zip(photos, phrasings)), guidance={"text": 4.0, "image": 1.5}, steps=3)
    both.edit(
        list(zip(photos, phrasings)),
        guidance={"text": 4.0, "image": 1.5},
        steps=3,
        negative_prompt=["ugly"] * 3,
    )
    off = both.edit(
        list(zip(photos, phrasings)), guidance={"text": 4.0, "image": 1.5}, steps=3, delta_strength=0.0
    )
    assert np.abs(batch[0].astype(int) - off[0]).mean() > 1
    both.close()


def test_the_bundle_in_the_tree_is_the_toy(toy: Path) -> None:
    """C++ tests read runtime/tests/data/toy; `toy_bundle.write_bundle` makes it."""
    kept = Path(__file__).parents[2] / "runtime" / "tests" / "data" / "toy"
    made = {p.relative_to(toy).as_posix(): p.read_bytes() for p in toy.rglob("*") if p.is_file()}
    assert {p.relative_to(kept).as_posix(): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == made
