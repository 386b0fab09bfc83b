"""Any torch module through the bundle and the runtime, against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

import hywu_export
from examples import any_module as example
from hywu_export import Generator, Layout, Pair
from hywu_export.deltas import inject
from hywu_export.tracing import fake_module
from hywu_runtime import Deltas, Editor, Manifest
from hywu_runtime.errors import DeltaError, HywuError, InputError, UnsupportedError


@pytest.fixture(scope="session")
def language_bundle(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The example's bundle; making it runs the example."""

    def make(folder: Path) -> None:
        assert example.main(folder) < 1e-5

    return once("any-module", make)


def random_deltas(spec: Any, count: int, seed: int) -> Deltas:
    rng = np.random.default_rng(seed)
    return Deltas({n: 0.3 * rng.standard_normal((count, *s)) for n, s in spec.tensors.items()})


@torch.no_grad()
def test_deltas_and_strengths_of_each_sample(language_bundle: Path) -> None:
    model = example.language_model()
    with Editor.load(language_bundle) as editor:
        spec = editor.bundle.manifest.deltas
        assert spec is not None
        assert editor.limits().outputs == ("logits",)
        sets = [random_deltas(spec, 1, seed) for seed in range(3)]
        ids = np.random.default_rng(0).integers(0, 256, (3, 9))
        strengths = [1.0, 0.0, -0.5]
        logits = editor.run({"input_ids": ids}, deltas=sets, delta_strength=strengths)["logits"]
        shared = editor.run({"input_ids": ids}, deltas=sets[0])["logits"]
    from hywu_export.deltas import DeltaSpec
    from hywu_runtime.codec import encode

    with inject(model, DeltaSpec.from_manifest(encode(spec))) as injection:
        for i, strength in enumerate(strengths):
            injection.set({n: torch.from_numpy(a) for n, a in sets[i].items()}, torch.tensor([strength]))
            expected = model(torch.from_numpy(ids[i : i + 1])).logits.numpy()
            np.testing.assert_allclose(logits[i : i + 1], expected, atol=2e-5)
        assert np.array_equal(shared[0], logits[0])
        injection.clear()
        np.testing.assert_allclose(logits[1:2], model(torch.from_numpy(ids[1:2])).logits.numpy(), atol=2e-5)


def test_requests_that_do_not_fit(language_bundle: Path) -> None:
    ids, context = np.zeros((2, 5), np.int64), np.zeros((2, example.CONTEXT), np.float32)
    with Editor.load(language_bundle) as editor:
        for inputs, message in (
            ({"context": context}, "input_ids.*is missing"),
            ({"input_ids": ids}, "context.*is missing"),
            ({"input_ids": ids.astype(np.int32), "context": context}, "is int32"),
            ({"input_ids": ids, "context": context[:1]}, "context"),
            ({"input_ids": np.zeros((2, 129), np.int64), "context": context}, "sequence has size 129"),
            ({"input_ids": ids, "context": context, "x": context}, "'x' cannot be given"),
            ({"input_ids": np.zeros((9, 5), np.int64), "context": context}, "9"),
        ):
            with pytest.raises(InputError, match=message):
                editor.run(inputs)
        with pytest.raises(InputError, match=r"no output 'x'.*logits"):
            editor.run({"input_ids": ids, "context": context}, outputs=["x"])
        with pytest.raises(DeltaError):
            editor.run({"input_ids": ids}, deltas=Deltas({"a.lora_A": np.ones((1, 2, 3))}))
        with pytest.raises(DeltaError, match="not finite"):
            editor.run({"input_ids": ids, "context": np.full_like(context, np.inf)})
        with pytest.raises(UnsupportedError, match="makes no images"):
            editor.edit(np.zeros((8, 8, 3), np.uint8), "x")
        editor.warm_up()
        # After all of these it still works.
        assert editor.run({"input_ids": ids, "context": context})["logits"].shape == (2, 5, 256)


class Mixed(nn.Module):
    """A convolution, a table of numbers and a linear layer; a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.out = nn.Linear(4, 3)
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, picture: Tensor, level: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = torch.relu(self.conv(picture)) + level[:, None, None, None]
        return features.mean((2, 3)), {"y": self.out(features.mean((2, 3))) + self.offset}


class MakesMixed(nn.Module):
    """Deltas for `Mixed`: the convolution's A is flat, ranks differ, the tensors come in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 18 * 2 + 4 * 2 + 4 * 3 + 3 * 3)

    def forward(self, level: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
        flat = self.head(hint * level[:, None])
        a, b, c, d = flat.split([36, 8, 12, 9], 1)
        return a.reshape(-1, 18, 2), b.reshape(-1, 2, 4), c.reshape(-1, 3, 4), d.reshape(-1, 3, 3)


MIXED_LAYOUT = Layout([
    Pair("0", "1", "conv", a_axes="batch in rank", b_axes="batch rank out"),
    Pair("2", "3", "out", a_axes="batch rank in", b_axes="batch out rank", scale=0.5),
])  # fmt: skip
PICTURE, LEVEL, HINT = torch.zeros(2, 2, 8, 8), torch.ones(2), torch.ones(2, 5)


@torch.no_grad()
def test_a_checkpoint_that_stays_where_it_is(tmp_path: Path) -> None:
    """A convolution target, padded ranks, several outputs, a shared input, linked weights, none in memory."""
    torch.manual_seed(0)
    module, maker = Mixed(), MakesMixed()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "maker").mkdir()
    save_file(maker.state_dict(), tmp_path / "maker" / "model.safetensors")
    side = Dim("height", min=4, max=64)
    module.train()
    traced = hywu_export.trace(
        fake_module(Mixed), (PICTURE, LEVEL), targets=["conv", "out"], max_rank=4,
        dynamic_shapes={"picture": {0: "batch", 2: side, 3: "width"}, "level": ["batch"]},
        axes={"width": (4, 32), "batch": (1, 5)}, outputs={"0": "features", "1.y": "y"},
        input_names={"picture": "x"}, checkpoint=tmp_path / "model.safetensors",
        generator=Generator(
            fake_module(MakesMixed), {"hint": HINT, "level": LEVEL}, MIXED_LAYOUT,
            checkpoint=tmp_path / "maker",
        ),
    )  # fmt: skip
    manifest = traced.save(tmp_path / "bundle", link_weights=True)
    assert set(manifest.tensors) == {"x", "level", "hint", "gate"}
    assert manifest.axes["height"].max == 64
    assert [t.rank for t in traced.spec.targets] == [4, 4]
    assert not list((tmp_path / "bundle" / "weights").glob("model*"))
    module.eval()
    x, level, hint = torch.randn(3, 2, 10, 7), torch.rand(3), torch.randn(3, 5)
    sources = {"model": tmp_path, "generator": tmp_path / "maker"}
    with Editor.load(tmp_path / "bundle", sources=sources) as editor:
        got = editor.run({"x": x.numpy(), "level": level.numpy(), "hint": hint.numpy()})
        only = editor.run({"x": x.numpy(), "level": level.numpy(), "hint": hint.numpy()}, outputs=["y"])
    assert list(only) == ["y"]
    a, b, c, d = maker(level=level, hint=hint)
    for i in range(3):
        changed = Mixed()
        changed.load_state_dict(module.state_dict())
        changed.conv.weight += (b[i].T @ a[i].T).reshape(4, 2, 3, 3)
        changed.out.weight += 0.5 * d[i] @ c[i]
        features, rest = changed(x[i : i + 1], level[i : i + 1])
        np.testing.assert_allclose(got["features"][i : i + 1], features.numpy(), atol=1e-5)
        np.testing.assert_allclose(got["y"][i : i + 1], rest["y"].numpy(), atol=1e-5)
        assert np.array_equal(only["y"], got["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "Nothing takes deltas"),
        ({"targets": ["conf"]}, "conf.*nearest names are 'conv'"),
        ({"max_rank": 0}, "max_rank is 0"),
        ({"example_inputs": (PICTURE,) * 3}, "3 example inputs.*picture, level"),
        ({"example_inputs": (PICTURE, 1.0)}, "'level'.*is a float"),
        ({"example_inputs": ()}, "no example inputs"),
        ({"dynamic_shapes": {"pixels": ["batch"]}}, "'pixels'.*picture, level"),
        ({"dynamic_shapes": [["batch"]]}, "1 entries"),
        ({"dynamic_shapes": {"level": ["batch", "x"]}}, "'level' 2 axes"),
        ({"dynamic_shapes": {"level": {3: "x"}}}, "axis 3 of 'level'"),
        ({"dynamic_shapes": {"picture": {2: "height"}}}, "axis 'batch' first"),
        ({"dynamic_shapes": {"picture": {0: "batch", 2: "height"}}}, "'height' has no limits"),
        ({"dynamic_shapes": {"picture": {0: "batch", 2: Dim("height")}}}, "'height' has no limits"),
        ({"dynamic_shapes": {"picture": {0: "batch", 2: 9}}}, "gives 9"),
        ({"axes": {"width": (1, 2)}}, "limits for 'width'.*batch"),
        ({"outputs": ["z"]}, "returns no 'z'.*0, 1.y"),
        ({"outputs": {"0": "level"}}, "Two tensors.*'level'"),
        ({"input_names": {"level": "gate"}}, "Two tensors.*'gate'"),
        ({"input_names": {"x": "y"}}, "renames 'x'"),
        ({"module": Mixed().half()}, "is float16"),
    ],
)
def test_what_cannot_be_traced(change: dict[str, Any], message: str) -> None:
    arguments = {"module": Mixed(), "example_inputs": (PICTURE, LEVEL), "targets": ["conv"], **change}
    with pytest.raises(HywuError, match=message):
        hywu_export.trace(**arguments)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"layout": Layout([Pair("0", "2", "conf", a_axes="batch in rank")])}, {}, "'conf'"),
        ({"layout": Layout([Pair("0", "9", "conv", a_axes="batch in rank")])}, {}, "no tensor '9'"),
        ({}, {"max_rank": 2}, "rank 3"),
        ({}, {"targets": ["out"]}, "'conv' is made by the generator, but not a target"),
        ({"example_inputs": {"level": LEVEL}}, {}, "The generator cannot be run"),
        ({"input_names": {"hint": "level", "level": "x"}}, {}, "'level'.*input_names"),
    ],
)  # fmt: skip
def test_generators_that_do_not_fit(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    settings = {"module": MakesMixed(), "example_inputs": {"level": LEVEL, "hint": HINT}, **change}
    settings.setdefault("layout", MIXED_LAYOUT)
    with pytest.raises(HywuError, match=message):
        hywu_export.trace(Mixed(), (PICTURE, LEVEL), generator=Generator(**settings), **options)


class Counts(nn.Module):
    """The size of its output is that of no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.cat([x, x], 1))


def test_a_size_that_no_axis_has(tmp_path: Path) -> None:
    shapes = {"dynamic_shapes": [("batch", "n", None)], "axes": {"n": (1, 9)}}
    with pytest.raises(UnsupportedError, match=r"'output'.*has a size of 2\*"):
        hywu_export.trace(Counts(), (torch.ones(2, 4, 3),), ["lin"], **shapes)
    traced = hywu_export.trace(Counts(), (torch.ones(2, 4, 3),), ["lin"])
    with pytest.raises(InputError, match="in memory alone"):
        traced.save(tmp_path / "bundle", link_weights=True)
    assert not (tmp_path / "bundle").exists()
    manifest = traced.save(tmp_path / "bundle")
    assert manifest == Manifest.read(tmp_path / "bundle")
    assert manifest.results.outputs == ("output",)
    assert manifest.deltas is not None
    assert manifest.deltas.rank == 16
