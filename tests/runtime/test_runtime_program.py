"""The editor on a made-up family, against the same program in NumPy."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_bundle import DELTAS, distil, reference, rewrite, write_bundle

from hywu_runtime import Bundle, Deltas, Editor, Manifest
from hywu_runtime.backends import available_backends, create_backend
from hywu_runtime.backends.onnxruntime import OnnxRuntime, OrtBinding
from hywu_runtime.errors import (
    BundleError,
    CancelledError,
    DeltaError,
    DeviceError,
    EngineError,
    HywuError,
    InputError,
    UnsupportedError,
)
from hywu_runtime.noise import normal

HEIGHT, WIDTH = 16, 24
LATENT = (4, HEIGHT // 4, WIDTH // 4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "bundle"
    write_bundle(path)
    return path


@pytest.fixture(scope="module")
def editor(toy: Path) -> Editor:
    return Editor.load(toy, "ort-cpu", threads=1)


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def region(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(5).uniform(0, 1, (batch, 1, *LATENT[1:])).astype(np.float32)


def edit(editor: Editor, image: np.ndarray, prompt: str, **options: Any) -> np.ndarray:
    inputs = {"region": region()} | options.pop("inputs", {})
    options = {"size": (WIDTH, HEIGHT), "inputs": inputs, "output": "array"} | options
    result = editor.edit(image, prompt, **options)
    assert isinstance(result, np.ndarray)
    return result


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert a.std() > 5


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that run, in order."""
    runs: list[str] = []
    run = OrtBinding.run

    def counting(self: OrtBinding) -> None:
        runs.append(self._label.removesuffix(".onnx"))
        run(self)

    monkeypatch.setattr(OrtBinding, "run", counting)
    return runs


@pytest.mark.parametrize("guidance", [2.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_edit_equals_numpy(editor: Editor, steps: int, guidance: float) -> None:
    result = edit(editor, photo(), "hello", steps=steps, guidance=guidance, seed=9)
    expected, _ = reference(
        photo(), "hello", region()[0, 0], normal(LATENT, 9), steps=steps, guidance=guidance
    )
    assert_close(result, expected)


def test_stochastic_sampler_with_more_rows_than_steps(editor: Editor) -> None:
    noise = np.stack([normal(LATENT, 2**40 + 3, 0, k + 1) for k in range(7)])
    result = edit(editor, photo(), "a", steps=4, sampler="wild", seed=2**40 + 3)
    expected, _ = reference(
        photo(), "a", region()[0, 0], normal(LATENT, 2**40 + 3), steps=4, sampler="wild", step_noise=noise
    )
    assert_close(result, expected)
    assert len(editor.timings.steps) == 7
    given = edit(editor, photo(), "a", steps=4, sampler="wild", seed=2**40 + 3, noise=noise[:, None])
    np.testing.assert_array_equal(given, result)


@pytest.fixture(scope="module")
def midway(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    path = tmp_path_factory.mktemp("midway") / "bundle"
    toy_bundle.write_midway(path)
    return Editor.load(path, "ort-cpu", threads=1)


@pytest.mark.parametrize(
    ("sampler", "steps", "strength", "skipped"),
    [
        ("even", 5, None, 2),
        ("even", 5, 0.5, 2),
        ("even", 5, 1.0, 0),
        ("even", 1, None, 0),
        ("wild", 4, 0.5, 4),
    ],
)
def test_edits_that_start_midway(
    midway: Editor, sampler: str, steps: int, strength: float | None, skipped: int
) -> None:
    """The first rows are left out: 5 steps with 0.5 start at int(5 - 2.5); Wild makes two rows of a step."""
    result = edit(midway, photo(), "hello", steps=steps, sampler=sampler, strength=strength, seed=9)
    rows = (2 * steps - 1 if sampler == "wild" else steps) - skipped
    noise = np.stack([normal(LATENT, 9, 0, k + 1) for k in range(rows)])  # numbered by what runs
    expected, _ = reference(
        photo(), "hello", region()[0, 0], normal(LATENT, 9), steps=steps, sampler=sampler, start=skipped,
        step_noise=noise if sampler == "wild" else None,
    )  # fmt: skip
    assert_close(result, expected)
    assert len(midway.timings.steps) == rows
    given = {"sampler": sampler, "steps": steps, "strength": strength, "latents": normal(LATENT, 9)[None]}
    if sampler == "wild":
        given["noise"] = noise[:, None]
    np.testing.assert_array_equal(edit(midway, photo(), "hello", **given), result)


def test_what_a_strength_may_be(midway: Editor, editor: Editor) -> None:
    assert midway.limits().default_strength == 0.6
    assert editor.limits().default_strength is None
    for strength in (0, -0.5, 1.01, float("nan"), True, "0.5"):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            edit(midway, photo(), "x", strength=strength)
    with pytest.raises(InputError, match="No step is left of 5"):
        edit(midway, photo(), "x", steps=5, strength=1e-17)
    with pytest.raises(InputError, match="starts every edit from noise"):
        edit(editor, photo(), "x", strength=0.5)


def test_a_sampler_that_cannot_start_midway(tmp_path: Path) -> None:
    toy_bundle.write_midway(tmp_path / "bundle")
    rewrite(tmp_path / "bundle", lambda m: m["schedules"]["samplers"]["wild"].pop("order"))
    with Editor.load(tmp_path / "bundle", "ort-cpu", threads=1) as editor:
        with pytest.raises(InputError, match="or the sampler even"):
            edit(editor, photo(), "x", sampler="wild")
        edit(editor, photo(), "x", sampler="wild", strength=1.0)
        edit(editor, photo(), "x")


def test_a_scale_without_a_condition_is_given_to_the_graphs(tmp_path: Path, counted: list[str]) -> None:
    """`distilled` stands for the scale that the guided step reads; `text` decides alone."""
    write_bundle(tmp_path / "b")
    rewrite(tmp_path / "b", distil)
    with Editor.load(tmp_path / "b") as editor:
        assert editor.limits().guidance == {"text": 2.0, "distilled": 3.0}
        for guidance, form, scale in (
            ({}, "step", 3.0),
            ({"distilled": 1.5}, "step", 1.5),
            ({"text": 1.0, "distilled": 9.0}, "step_plain", 1.0),
        ):
            counted.clear()
            result = edit(editor, photo(), "hello", steps=2, guidance=guidance, seed=9)
            assert {"step", "step_plain"} & set(counted) == {form}
            noise = normal(LATENT, 9)
            expected, _ = reference(photo(), "hello", region()[0, 0], noise, steps=2, guidance=scale)
            assert_close(result, expected)


def test_guided_and_unguided_choose_their_calls(toy: Path, counted: list[str]) -> None:
    with Editor.load(toy) as editor:
        edit(editor, photo(), "x", guidance=1.0)
        assert counted.count("step_plain") == 3
        assert "step" not in counted
        assert counted.count("words") == 1  # the constant prompt is not needed
        counted.clear()
        edit(editor, photo(), "x", guidance=1.5)
        assert counted.count("step") == 3
        assert "step_plain" not in counted
        assert counted.count("words") == 2


def test_load_phase_runs_once_per_batch_size(toy: Path, counted: list[str]) -> None:
    with Editor.load(toy) as editor:
        edit(editor, photo(), "x")
        assert counted.count("words") == 2
        counted.clear()
        edit(editor, photo(1), "y")
        assert counted.count("words") == 1


def test_given_deltas_skip_the_generator(editor: Editor, counted: list[str]) -> None:
    rng = np.random.default_rng(3)
    tensors = {name: rng.standard_normal((1, *shape)) for name, shape in zip(DELTAS, [(3, 4), (4, 3)])}
    deltas = Deltas(tensors)
    result = edit(editor, photo(), "hello", deltas=deltas)
    assert "generate" not in counted
    assert "marks" not in counted
    expected, _ = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0), deltas=deltas)
    assert_close(result, expected)
    own = edit(editor, photo(), "hello")
    assert (own != result).any()


def test_generated_deltas_give_the_same_edit(editor: Editor, counted: list[str], tmp_path: Path) -> None:
    result = edit(editor, photo(), "hello")
    counted.clear()
    deltas = editor.generate(photo(), "hello")
    assert sorted(counted) == ["generate", "marks", "words"]
    _, expected = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0))
    for name in DELTAS:
        np.testing.assert_allclose(deltas[name], expected[name], atol=1e-6)
    deltas.save(tmp_path / "d.safetensors")
    again = Deltas.load(tmp_path / "d.safetensors")
    np.testing.assert_array_equal(
        edit(editor, photo(1), "hello", deltas=again), edit(editor, photo(1), "hello")
    )
    np.testing.assert_array_equal(edit(editor, photo(), "hello", deltas=deltas), result)


def test_smaller_rank_is_padded(editor: Editor) -> None:
    small = Deltas({DELTAS[0]: np.ones((1, 1, 4), np.float32), DELTAS[1]: np.ones((1, 4, 1), np.float32)})
    result = edit(editor, photo(), "hello", deltas=small)
    expected, _ = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0), deltas=small)
    assert_close(result, expected)


def test_a_b_a_leaves_no_trace(editor: Editor) -> None:
    first = edit(editor, photo(), "hello", seed=1)
    other = edit(editor, photo(1), "something else", seed=2, delta_strength=0.3)
    np.testing.assert_array_equal(edit(editor, photo(), "hello", seed=1), first)
    assert (first != other).any()


def test_gate_zero_is_the_base(editor: Editor) -> None:
    off = edit(editor, photo(), "hello", delta_strength=0)
    zeros = Deltas({DELTAS[0]: np.zeros((1, 3, 4)), DELTAS[1]: np.zeros((1, 4, 3))})
    np.testing.assert_array_equal(off, edit(editor, photo(), "hello", deltas=zeros))
    half = edit(editor, photo(), "hello", delta_strength=0.5)
    expected, _ = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0), gate=0.5)
    assert_close(half, expected)
    assert (off != half).any()


def test_batch_does_not_mix_samples(editor: Editor) -> None:
    prompts, seeds, strengths = ["hello", "warm", "cold é"], [4, 5, 6], [1.0, 0.0, 0.7]
    requests = [(photo(i), prompt) for i, prompt in enumerate(prompts)]
    batch = editor.edit_batch(
        requests,
        seed=seeds,
        delta_strength=strengths,
        guidance=[2.0, 3.0, 1.5],
        size=(WIDTH, HEIGHT),
        inputs={"region": np.repeat(region(), 3, 0)},
        output="array",
    )
    for i, (image, prompt) in enumerate(requests):
        alone = edit(
            editor, image, prompt, seed=seeds[i], delta_strength=strengths[i], guidance=[2.0, 3.0, 1.5][i]
        )
        assert_close(np.asarray(batch[i]), alone)
    one_seed = editor.edit_batch(
        requests, seed=8, size=(WIDTH, HEIGHT), inputs={"region": np.repeat(region(), 3, 0)}, output="array"
    )
    expected, _ = reference(photo(2), "cold é", region()[0, 0], normal(LATENT, 8, 2))
    assert_close(np.asarray(one_seed[2]), expected)


def test_batch_with_deltas_for_each_and_for_all(editor: Editor) -> None:
    sets = [editor.generate(photo(), prompt) for prompt in ("red", "blue")]
    requests = [(photo(), "go"), (photo(), "go")]
    options: dict[str, Any] = {
        "seed": [1, 1],
        "size": (WIDTH, HEIGHT),
        "inputs": {"region": np.repeat(region(), 2, 0)},
        "output": "array",
    }
    each = editor.edit_batch(requests, deltas=sets, **options)
    stacked = editor.edit_batch(requests, deltas=Deltas.stack(sets), **options)
    shared = editor.edit_batch(requests, deltas=sets[1], **options)
    for i in range(2):
        np.testing.assert_array_equal(each[i], stacked[i])
        assert_close(np.asarray(each[i]), edit(editor, photo(), "go", seed=1, deltas=sets[i]))
    assert (np.asarray(each[0]) != np.asarray(each[1])).any()
    np.testing.assert_array_equal(shared[0], shared[1])
    np.testing.assert_array_equal(shared[1], each[1])


def test_latents_and_intermediate_results_can_be_given(editor: Editor, counted: list[str]) -> None:
    result = edit(editor, photo(), "hello", seed=77)
    given = edit(editor, photo(), "hello", seed=1, latents=normal(LATENT, 77)[None])
    np.testing.assert_array_equal(given, result)
    counted.clear()
    source = np.zeros((1, *LATENT), np.float32)
    edit(editor, photo(), "hello", inputs={"source": source})
    assert "encode" not in counted
    # One output of a call is given, the other is not: the call runs, and the given one wins.
    ours = edit(editor, photo(), "hello", inputs={"cache.initial": np.ones((1, 4), np.float32)})
    assert (ours != edit(editor, photo(), "hello")).any()
    deltas = editor.generate(
        inputs={"prompt.words": np.ones((2, 4), np.float32), "prompt.marks": np.ones((2, 4), np.float32)}
    )
    assert deltas.batch == 2


def test_low_memory_is_equal(toy: Path, editor: Editor, counted: list[str]) -> None:
    with Editor.load(toy, low_memory=True) as small:
        loads = []
        load = OnnxRuntime.load

        def watched(self: OnnxRuntime, *args: Any) -> Any:
            loads.append(len(small._executor._sessions))
            return load(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnnxRuntime, "load", watched)
            for seed in (1, 2):
                one = edit(small, photo(), "hello", seed=seed)
                np.testing.assert_array_equal(one, edit(editor, photo(), "hello", seed=seed))
        assert loads[:7] == [0] * 7  # no session is loaded while another is held
        assert not small._executor._sessions


def test_nothing_of_a_request_is_kept(editor: Editor) -> None:
    edit(editor, photo(), "hello", seed=3)
    assert editor._executor._buffers
    for slot, tensor in editor._executor._buffers.items():
        assert not tensor.read().any(), slot


def test_buffers_keep_their_addresses(editor: Editor) -> None:
    edit(editor, photo(), "hello")
    before = {slot: tensor.value.data_ptr() for slot, tensor in editor._executor._buffers.items()}  # type: ignore[attr-defined]
    edit(editor, photo(1), "other", seed=2, steps=5)
    after = {slot: tensor.value.data_ptr() for slot, tensor in editor._executor._buffers.items()}  # type: ignore[attr-defined]
    assert before == after


def test_generator_outputs_are_the_step_inputs(editor: Editor) -> None:
    edit(editor, photo(), "hello")
    bindings = editor._executor._bindings
    program = editor.bundle.manifest.program
    made = next(b for (i, _), b in bindings.items() if program[i].graph == "generate")._held[1]  # type: ignore[attr-defined]
    steps = [b._held[0] for (i, _), b in bindings.items() if program[i].graph == "step"]  # type: ignore[attr-defined]
    assert len(steps) == 3
    assert all(step["a"] is made["a"] and step["b"] is made["b"] for step in steps)


def test_cancellation_and_progress(editor: Editor) -> None:
    seen: list[tuple[int, int]] = []
    event = threading.Event()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            event.set()

    with pytest.raises(CancelledError):
        edit(editor, photo(), "hello", steps=5, progress=progress, cancel=event)
    assert seen == [(1, 5), (2, 5)]
    with pytest.raises(CancelledError):
        edit(editor, photo(), "hello", cancel=lambda: True)
    expected, _ = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0))
    assert_close(edit(editor, photo(), "hello", cancel=lambda: False), expected)


def test_threads_share_an_editor_or_have_their_own(toy: Path, editor: Editor) -> None:
    expected = [edit(editor, photo(i), f"p{i}", seed=i) for i in range(4)]
    own = Editor.load(toy, threads=1)
    results: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = edit(own if i % 2 else editor, photo(i), f"p{i}", seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(results[i], expected[i])


def test_no_graph_keeps_a_core_after_it_ran(toy: Path) -> None:
    """Threads of ONNX Runtime that wait in a loop would take it from the next graph."""
    editor = Editor.load(toy, threads=3)
    edit(editor, photo(), "hello")
    spent = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - spent < 0.02  # 0.1 s for each thread that waits in a loop


def test_pil_output_sizes_and_limits(editor: Editor) -> None:
    picture = editor.edit(photo(), "x", size="24x16", inputs={"region": region()})
    assert isinstance(picture, Image.Image)
    assert picture.size == (24, 16)
    limits = editor.limits()
    assert limits.batch == (1, 4)
    assert limits.steps == {"even": (1, 2, 3, 4, 5), "wild": (2, 3, 4)}
    assert (limits.rank, limits.edits, limits.generates) == (3, True, True)


def test_warm_up(toy: Path, counted: list[str]) -> None:
    with Editor.load(toy) as editor:
        editor.warm_up()
        assert set(editor._executor._sessions) == {
            "words",
            "marks",
            "encode",
            "generate",
            "prepare",
            "step",
            "final",
        }
        assert not counted  # the region comes from a caller


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "1 to 5"),
        ({"steps": -3}, "1 to 5"),
        ({"steps": 10**30}, "1 to 5"),
        ({"steps": True}, "1 to 5"),
        ({"steps": 5, "sampler": "wild"}, "2 to 4"),
        ({"sampler": "none"}, "even, wild"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"guidance": float("nan")}, "finite"),
        ({"guidance": 1e300}, "finite"),
        ({"guidance": 10**400}, "finite"),
        ({"delta_strength": float("inf")}, "finite"),
        ({"delta_strength": "1"}, "finite"),
        ({"image_guidance": 1.5}, "no guidance scale"),
        ({"guidance": {"other": 1.0}}, "no guidance scale"),
        ({"guidance": [1.0, 2.0]}, "2 entries"),
        ({"output": "jpeg"}, "pil or array"),
        ({"inputs": {"latents": np.zeros(1)}}, "cannot be given"),
        ({"inputs": {"mix.lora_A": np.zeros(1)}}, "cannot be given"),
        ({"inputs": {"nothing": np.zeros(1)}}, "cannot be given"),
        ({"inputs": {"region": np.zeros((1, 1, 4, 6))}}, "float64"),
        ({"inputs": {"region": np.zeros((1, 1, 4, 5), np.float32)}}, "region"),
        ({"inputs": {"region": np.zeros((2, 1, 4, 6), np.float32)}}, "region"),
        ({"latents": np.zeros((1, 4, 9, 9), np.float32)}, "noise.initial"),
        ({"latents": np.full((1, *LATENT), np.nan)}, "finite"),
        ({"noise": np.zeros((2, 1, *LATENT), np.float32)}, "evaluations"),
        ({"negative_prompt": ["a", "b"]}, "2 entries"),
    ],
)
def test_bad_arguments(editor: Editor, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        edit(editor, photo(), "hello", **options)
    assert caught.value.expected
    assert caught.value.remedy
    expected, _ = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0))
    assert_close(edit(editor, photo(), "hello"), expected)


@pytest.mark.parametrize("prompt", [None, b"bytes", 5, "\ud800", "a" * 2_000_000, ["x"]])
def test_bad_prompts(editor: Editor, prompt: Any) -> None:
    with pytest.raises(InputError):
        edit(editor, photo(), prompt)


def test_odd_prompts_and_missing_inputs(editor: Editor) -> None:
    for prompt in ("", "\0", "a\0b", "é" * 5000, "\n\t", "🦊日本語"):
        assert edit(editor, photo(), prompt).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(InputError, match="region"):
        editor.edit(photo(), "x")
    for requests in ([], [(photo(), "a")] * 5, "abc", [photo()], None):
        with pytest.raises(InputError):
            editor.edit_batch(requests)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="photo"):
        editor.edit(None, "x", inputs={"region": region()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.pop(DELTAS[0]), "lack"),
        (lambda d: d.update({"other.lora_A": d[DELTAS[0]]}), "extra"),
        (lambda d: d.update({DELTAS[0]: np.ones((1, 3, 5), np.float32)}), "shape"),
        (lambda d: d.update({DELTAS[0]: np.full((1, 3, 4), np.nan, np.float32)}), "finite"),
        (lambda d: d.update({DELTAS[0]: np.ones((2, 3, 4), np.float32)}), "samples"),
        (lambda d: d.update({k: np.repeat(v, 3, 0) for k, v in d.items()}), "3 samples"),
        (
            lambda d: d.update(
                {DELTAS[0]: np.ones((1, 9, 4), np.float32), DELTAS[1]: np.ones((1, 4, 9), np.float32)}
            ),
            "shape",
        ),
    ],
)
def test_deltas_that_do_not_fit(editor: Editor, change: Any, match: str) -> None:
    tensors = {DELTAS[0]: np.ones((1, 3, 4), np.float32), DELTAS[1]: np.ones((1, 4, 3), np.float32)}
    change(tensors)
    with pytest.raises(DeltaError, match=match):
        edit(editor, photo(), "hello", deltas=Deltas(tensors))


def test_deltas_of_another_type_or_number(editor: Editor) -> None:
    with pytest.raises(DeltaError):
        edit(editor, photo(), "hello", deltas={"a": 1})
    with pytest.raises(DeltaError):
        edit(editor, photo(), "hello", deltas=[])


def test_generator_that_is_not_finite(toy: Path) -> None:
    with Editor.load(toy) as editor:
        bad = np.full((1, 4), np.inf, np.float32)
        with pytest.raises(DeltaError, match=r"mix\.lora_A"):
            edit(editor, photo(), "hello", inputs={"prompt.words": bad})
        with pytest.raises(DeltaError, match=r"mix\.lora_A"):
            editor.generate(inputs={"prompt.words": bad, "prompt.marks": bad})


def test_bundle_without_generator(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")

    def change(value: Any) -> None:
        value["program"] = [call for call in value["program"] if call["graph"] not in ("generate", "marks")]
        value["results"] = {"image": "edited"}

    rewrite(tmp_path / "b", change)
    with Editor.load(tmp_path / "b") as editor:
        with pytest.raises(DeltaError, match="no generator"):
            edit(editor, photo(), "hello")
        with pytest.raises(UnsupportedError):
            editor.generate(photo(), "hello")
        expected, made = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0))
        assert_close(edit(editor, photo(), "hello", deltas=Deltas(made)), expected)
        base, _ = reference(photo(), "hello", region()[0, 0], normal(LATENT, 0), gate=0)
        assert_close(edit(editor, photo(), "hello", delta_strength=0), base)
        editor.warm_up()


def test_bundle_that_is_a_generator_alone(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")

    def change(value: Any) -> None:
        value["program"] = [call for call in value["program"] if call["graph"] == "generate"]
        value["results"] = {"deltas": list(DELTAS)}
        value["state"], value["guidance"] = [], []
        for key in ("image", "schedules"):
            del value[key]
        condition = {"dtype": "float32", "shape": ["batch", 4], "source": "input"}
        value["tensors"] = {
            "prompt.words": condition,
            "prompt.marks": condition,
            "gate": value["tensors"]["gate"],
        }

    rewrite(tmp_path / "b", change)
    with Editor.load(tmp_path / "b") as editor:
        ones = np.ones((3, 4), np.float32)
        deltas = editor.generate(inputs={"prompt.words": ones, "prompt.marks": ones})
        assert deltas.batch == 3
        expected = toy_bundle.weights()["generate.to_a"].sum(0).reshape(3, 4)
        np.testing.assert_allclose(deltas[DELTAS[0]][1], expected, atol=1e-6)
        with pytest.raises(UnsupportedError):
            editor.edit(photo(), "x")
        with pytest.raises(InputError, match="prompt"):
            editor.generate(photo(), "x")
        editor.warm_up()


def test_initial_state_of_zeros(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")

    def change(value: Any) -> None:
        value["state"][1]["initial"] = {"zeros": ["batch", 4]}

    rewrite(tmp_path / "b", change)
    with Editor.load(tmp_path / "b") as editor:
        zeros = edit(editor, photo(), "hello", steps=4)
        np.testing.assert_array_equal(edit(editor, photo(), "hello", steps=4), zeros)
    write_bundle(tmp_path / "c")
    with Editor.load(tmp_path / "c") as editor:
        given = edit(
            editor, photo(), "hello", steps=4, inputs={"cache.initial": np.zeros((1, 4), np.float32)}
        )
    np.testing.assert_array_equal(given, zeros)


def test_variant(tmp_path: Path, editor: Editor) -> None:
    write_bundle(tmp_path / "b")
    (tmp_path / "b/variants/same").mkdir(parents=True)
    (tmp_path / "b/variants/same/step.onnx").write_bytes((tmp_path / "b/step.onnx").read_bytes())
    rewrite(
        tmp_path / "b",
        lambda value: value.update(
            variants={"same": {"precision": "fp16", "graphs": {"step": "variants/same/step.onnx"}}}
        ),
    )
    with Editor.load(tmp_path / "b", variant="same") as other:
        np.testing.assert_array_equal(edit(other, photo(), "x"), edit(editor, photo(), "x"))
    with pytest.raises(InputError, match="same"):
        Editor.load(tmp_path / "b", variant="int8")


def test_closed_editor(toy: Path) -> None:
    with Editor.load(toy) as editor:
        pass
    with pytest.raises(InputError, match="closed"):
        edit(editor, photo(), "x")


def test_backends() -> None:
    reasons = available_backends()
    assert list(reasons) == ["tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu"]
    assert reasons["ort-cpu"] is None
    for name, reason in reasons.items():
        if reason is None:
            assert create_backend(name).name == name
        else:
            with pytest.raises(DeviceError, match="ort-cpu"):
                create_backend(name)
    for arguments in (("cuda",), ("ort-cpu", -1), ("ort-cpu", None, 0), ("ort-cpu", None, True)):
        with pytest.raises(InputError):
            create_backend(*arguments)  # type: ignore[arg-type]


def test_graph_that_lies_about_its_shape(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    rewrite(
        tmp_path / "b",
        lambda value: value["graphs"]["words"]["outputs"][0].update(shape=["batch", 5]),
    )
    with pytest.raises(BundleError, match=r"prompt\.words"):  # the manifest is not consistent with itself
        Editor.load(tmp_path / "b")
    write_bundle(tmp_path / "c")

    def change(value: Any) -> None:
        value["tensors"]["ids.marks"]["shape"] = value["tensors"]["ids.marks.mask"]["shape"] = ["batch", 7]
        value["tokenizers"]["short"]["max_length"] = 7
        for v in value["graphs"]["marks"]["inputs"]:
            v["shape"] = ["batch", 7]

    rewrite(tmp_path / "c", change)
    with Editor.load(tmp_path / "c") as editor, pytest.raises(BundleError, match="marks"):
        edit(editor, photo(), "x")


def test_graph_that_fails_while_it_runs(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    rewrite(
        tmp_path / "b", lambda value: value["tokenizers"]["long"].update(pad_id=300)
    )  # past the table's end
    with Editor.load(tmp_path / "b") as editor:
        with pytest.raises(EngineError, match=r"words\.onnx failed"):
            edit(editor, photo(), "short")
        assert edit(editor, photo(), "long enough", guidance=1.0).shape == (HEIGHT, WIDTH, 3)


MANIFEST = toy_bundle.manifest_dict({})
NUMBERS = st.sampled_from([1, 2, 3, 4, 8, 77, 2**16, 2**31 - 1])
WORDS = st.sampled_from(
    [
        "batch",
        "delta_batch",
        "height",
        "latent_width",
        "latents",
        "latents.next",
        "cache",
        "prompt.words",
        "image",
        "gate",
        "load",
        "request",
        "step",
        "final",
        "float32",
        "int64",
        "initial",
        "even",
        "left",
        "mix.lora_A",
        "mix.lora_B",
        "words",
        "marks",
        "encode",
        "generate",
        "prepare",
        "step_plain",
    ]
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    return (
        [path]
        if children is None
        else [leaf for key, child in children for leaf in leaves(child, (*path, key))]
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(leaves(MANIFEST)), NUMBERS, WORDS), min_size=1, max_size=2))
def test_hostile_manifests_run_or_give_our_error(toy: Path, changes: list[tuple[Any, int, str]]) -> None:
    value = json.loads((toy / "manifest.json").read_text())
    for place, number, word in changes:
        holder = value
        for key in place[:-1]:
            holder = holder.get(key, {}) if isinstance(holder, dict) else holder[key]
        if isinstance(holder, dict) and place[-1] not in holder:
            continue  # a key with its default value is not in the file
        holder[place[-1]] = word if isinstance(holder[place[-1]], str) else number
    try:
        with Editor(
            Bundle(toy, Manifest.from_dict(value), {}), create_backend("ort-cpu", threads=1)
        ) as editor:
            result = edit(editor, photo(), "hello", size=None)
    except HywuError:
        return
    assert result.dtype == np.uint8


def test_every_damaged_file_gives_our_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_bundle(tmp_path / "b")
    for file in sorted((tmp_path / "b").rglob("*.*")):
        if not file.is_file():
            continue
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(HywuError):
            Editor.load(tmp_path / "b")
        for _ in range(6):
            flipped = bytearray(whole)
            flipped[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            if file.name != "manifest.json":
                with pytest.raises(BundleError, match="SHA-256"):
                    Editor.load(tmp_path / "b", verify=True)
            try:  # unverified, the damage may show or not, but nothing else than our errors
                with Editor.load(tmp_path / "b") as editor:
                    edit(editor, photo(), "x")
            except HywuError:
                pass
        file.write_bytes(whole)
    with Editor.load(tmp_path / "b", verify=True) as editor:
        edit(editor, photo(), "x")


def test_what_is_made_of_a_callers_tensor_is_not_kept(toy: Path) -> None:
    with Editor.load(toy) as fresh:
        expected = edit(fresh, photo(), "hello", steps=2)
    with Editor.load(toy) as editor:
        other = edit(
            editor, photo(), "hello", steps=2, inputs={"ids.base": np.full((1, 8), 3, np.int64)}
        )  # read by a load call
        assert not np.array_equal(other, expected)
        np.testing.assert_array_equal(edit(editor, photo(), "hello", steps=2), expected)
