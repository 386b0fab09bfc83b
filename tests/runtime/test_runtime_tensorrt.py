"""TensorRT in the runtime, up to the driver's door: see fake_tensorrt."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import CAPABILITY, VERSIONS, Machine, add_engine
from test_runtime_program import HEIGHT, WIDTH, edit, photo, region
from toy_bundle import DELTAS, rewrite, write_bundle

from hywu_export.bundle import BundleAddition
from hywu_runtime import Deltas, Editor, Manifest
from hywu_runtime.backends import available_backends, create_backend
from hywu_runtime.engines import Target, build_command, obstacle
from hywu_runtime.errors import (
    BundleError,
    CancelledError,
    DeltaError,
    DeviceError,
    EngineError,
    HywuError,
    InputError,
)

BACKENDS = ["tensorrt", "tensorrt-rtx"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def plain_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "bundle"
    write_bundle(path)
    return path


@pytest.fixture
def toy(plain_toy: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(plain_toy, tmp_path / "bundle"))


@pytest.fixture
def cpu(plain_toy: Path) -> Iterator[Editor]:
    with Editor.load(plain_toy, "ort-cpu", threads=1) as editor:
        yield editor


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_cpu_to_the_bit_with_one_capture(
    toy: Path, machine: Machine, cpu: Editor, backend: str
) -> None:
    add_engine(toy, backend=backend)
    with Editor.load(toy, backend) as editor:
        wishes: list[dict[str, Any]] = [
            {"steps": 3},
            {"steps": 1, "seed": 4},
            {"steps": 5, "delta_strength": 0.3},
            {"steps": 4, "sampler": "wild", "seed": 2**40},
            {"steps": 2, "guidance": 3.0, "progress": lambda done, total: None},
        ]
        for i, options in enumerate(wishes):
            np.testing.assert_array_equal(
                edit(editor, photo(i), f"word {i}", **options), edit(cpu, photo(i), f"word {i}", **options)
            )
            assert len(editor.timings.steps) == len(cpu.timings.steps)
            assert editor.timings.graphs.keys() == cpu.timings.graphs.keys()
        assert machine.cuda.captures == 1
        assert machine.cuda.launches == 3 + 1 + 5 + 7 + 2 - 1  # the first step warms up
        # Deltas given from outside, and the unguided form: other plans, hence other buffers.
        deltas = editor.generate(photo(), "hello", inputs={"region": region()}, size=(WIDTH, HEIGHT))
        expected = cpu.generate(photo(), "hello", inputs={"region": region()}, size=(WIDTH, HEIGHT))
        for name in DELTAS:
            np.testing.assert_array_equal(deltas[name], expected[name])
        for options in ({"deltas": deltas}, {"guidance": 1.0}, {"steps": 1}):
            np.testing.assert_array_equal(
                edit(editor, photo(), "hello", **options), edit(cpu, photo(), "hello", **options)
            )


def test_batches_sizes_and_own_deltas(toy: Path, machine: Machine, cpu: Editor) -> None:
    add_engine(toy)
    pairs = [(photo(i), f"word {i}") for i in range(3)]
    with Editor.load(toy, "tensorrt") as editor:
        for options in ({"size": (WIDTH, HEIGHT)}, {"size": (16, 32)}, {"size": (WIDTH, HEIGHT)}):
            width, height = options["size"]
            inputs = {"region": np.ones((3, 1, height // 4, width // 4), np.float32)}
            got = editor.edit_batch(pairs, inputs=inputs, output="array", **options)
            expected = cpu.edit_batch(pairs, inputs=inputs, output="array", **options)
            np.testing.assert_array_equal(np.stack(got), np.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_never_change(toy: Path, machine: Machine, backend: str) -> None:
    add_engine(toy, backend=backend)
    library = machine.libraries[backend]
    with Editor.load(toy, backend) as editor:
        edit(editor, photo(), "a")
        contexts = len(library.contexts)
        before = [dict(context.addresses) for context in library.contexts]
        blocks = set(machine.cuda.blocks)
        for i in range(3):
            edit(editor, photo(i), "b" * i, seed=i)
        assert [context.addresses for context in library.contexts] == before
        assert len(library.contexts) == contexts
        assert set(machine.cuda.blocks) == blocks
        assert all(address % 256 == 0 for addresses in before for address in addresses.values())
        by_graph = {Path(context.engine.plan["onnx"]).stem: context.addresses for context in library.contexts}
        assert by_graph["generate"]["a"] == by_graph["step"]["a"]
        assert by_graph["generate"]["b"] == by_graph["step"]["b"]
        assert len({context.scratch for context in library.contexts}) == 1
    library.contexts.clear()
    del editor
    assert not machine.cuda.blocks
    assert not machine.cuda.pinned


@pytest.mark.parametrize("wishes", [{"steps": 3}, {"steps": 2, "guidance": 1.0}])
def test_a_real_pipeline(bundle: Path, tmp_path: Path, machine: Machine, wishes: dict[str, Any]) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    add_engine(copy)
    with Editor.load(copy, "tensorrt") as engines, Editor.load(copy, "ort-cpu", threads=1) as cpu:
        for sampler in ("euler_a", "dpmpp_2m"):
            got, expected = (
                editor.edit(photo(), "make it sepia", sampler=sampler, size=64, output="array", **wishes)
                for editor in (engines, cpu)
            )
            np.testing.assert_array_equal(got, expected)
    assert machine.cuda.captures == 1


def test_generated_deltas_stay_on_the_device(toy: Path, machine: Machine) -> None:
    """Nothing of the size of a delta is copied either way; nothing is read but the picture and the states."""
    add_engine(toy)
    copies: list[tuple[int, int]] = []
    copy = machine.cuda.cudaMemcpyAsync

    def counting(target: int, source: int, size: int, kind: int, stream: int) -> Any:
        copies.append((kind, size))
        return copy(target, source, size, kind, stream)

    machine.cuda.cudaMemcpyAsync = counting  # type: ignore[method-assign]
    with Editor.load(toy, "tensorrt") as editor:
        edit(editor, photo(), "hello")
    latents, cache, picture = 4 * 4 * (HEIGHT // 4) * (WIDTH // 4), 4 * 4, HEIGHT * WIDTH * 3
    assert sorted(size for kind, size in copies if kind == 2) == sorted([latents, cache, picture])


def test_nothing_of_a_request_is_kept(toy: Path, machine: Machine) -> None:
    add_engine(toy)
    with Editor.load(toy, "tensorrt") as editor:
        edit(editor, photo(), "hello")
        editor.backend.wait()
        assert machine.cuda.queue == []
        for tensor in editor._executor._buffers.values():
            assert not tensor.read().any()
        assert not any(memory.any() for memory in machine.cuda.pinned.values())
        assert editor.backend.allocate((2, 3), "float32").read().tolist() == [[0] * 3] * 2


def test_initial_state_of_zeros(plain_toy: Path, toy: Path, machine: Machine) -> None:
    def change(value: Any) -> None:
        value["state"][1]["initial"] = {"zeros": ["batch", 4]}

    rewrite(toy, change)
    with Editor.load(toy, "ort-cpu", threads=1) as editor:
        expected = [edit(editor, photo(i), "hello") for i in range(2)]
    add_engine(toy)
    with Editor.load(toy, "tensorrt") as editor:
        for i in range(2):
            np.testing.assert_array_equal(edit(editor, photo(i), "hello"), expected[i])


def test_low_memory_and_warm_up(toy: Path, machine: Machine, cpu: Editor) -> None:
    shapes = {"batch": (2, 2, 4), "delta_batch": (1, 2, 4), "height": (8, 16, 32), "width": (8, 24, 32)}
    add_engine(toy, shapes=shapes)
    with Editor.load(toy, "tensorrt", low_memory=True) as editor:
        pairs = [(photo(i), "hello") for i in range(2)]
        inputs = {"region": region(2)}
        for _ in range(2):
            got = editor.edit_batch(pairs, inputs=inputs, size=(WIDTH, HEIGHT), output="array")
            expected = cpu.edit_batch(pairs, inputs=inputs, size=(WIDTH, HEIGHT), output="array")
            np.testing.assert_array_equal(np.stack(got), np.stack(expected))
        editor.warm_up()
    with Editor.load(toy, "tensorrt") as editor:
        editor.warm_up()
        assert len(editor._executor._sessions) >= 5
        assert editor._warm_up_size() == (24, 16)


def test_cancelled_and_used_again(toy: Path, machine: Machine, cpu: Editor) -> None:
    add_engine(toy)
    with Editor.load(toy, "tensorrt") as editor:
        seen: list[int] = []
        hooks = {"progress": lambda done, _: seen.append(done), "cancel": lambda: len(seen) > 1}
        with pytest.raises(CancelledError):
            edit(editor, photo(), "hello", steps=5, **hooks)
        assert seen == [1, 2]
        np.testing.assert_array_equal(edit(editor, photo(), "hello"), edit(cpu, photo(), "hello"))


def test_large_arrays_need_no_pinned_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hywu_runtime.backends.cuda.PINNED", 8)
    tensor = create_backend("tensorrt").allocate((4,), "float32")
    array = np.arange(4, dtype=np.float32)
    tensor.write(array[::-1])
    array[:] = 9
    assert tensor.read().tolist() == [3, 2, 1, 0]
    assert not machine.cuda.pinned
    with pytest.raises(ValueError, match="written to"):
        tensor.write(np.zeros(3, np.float32))


def test_what_cannot_be_captured_is_queued(
    toy: Path, machine: Machine, cpu: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    add_engine(toy, backend="tensorrt-rtx")
    machine.libraries["tensorrt-rtx"].capturable = False
    with Editor.load(toy, "tensorrt-rtx") as editor:
        np.testing.assert_array_equal(edit(editor, photo(), "hello"), edit(cpu, photo(), "hello"))
    assert machine.cuda.captures == 0
    assert "not captured" in caplog.text
    machine.libraries["tensorrt-rtx"].capturable = True
    machine.cuda.failing["cudaGraphInstantiate"] = 900
    with Editor.load(toy, "tensorrt-rtx") as editor:
        np.testing.assert_array_equal(edit(editor, photo(), "hello"), edit(cpu, photo(), "hello"))


def test_runtime_cache(toy: Path, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    add_engine(toy, backend="tensorrt-rtx")
    file = toy / "engines/key/runtime.cache"
    with Editor.load(toy, "tensorrt-rtx") as editor:
        edit(editor, photo(), "hello")
        stored = file.read_bytes()
        assert b"step" in stored
        written = file.stat().st_mtime_ns
        edit(editor, photo(1), "hello")
        assert file.stat().st_mtime_ns == written
    assert set(machine.libraries["tensorrt-rtx"].strategies) == {"eager"}
    with Editor.load(toy, "tensorrt-rtx") as editor:  # what is there is read, and not written again
        edit(editor, photo(), "hello")
    assert file.stat().st_mtime_ns == written
    file.write_bytes(b"rubbish")
    with Editor.load(toy, "tensorrt-rtx") as editor:
        edit(editor, photo(), "hello")
    assert file.read_bytes() == stored
    file.unlink()
    file.mkdir()  # cannot be read, cannot be written
    with Editor.load(toy, "tensorrt-rtx") as editor:
        edit(editor, photo(), "hello")
    assert "cannot be written" in caplog.text
    assert Editor.load(toy, "ort-cpu", verify=True)


def test_values_that_are_not_finite(toy: Path, machine: Machine) -> None:
    """Deltas are not looked at on the device; what they do to the latents is."""
    import onnx

    model = onnx.load(toy / "generate.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("to_a"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0, 0] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, toy / "generate.onnx")
    rewrite(toy, lambda value: None)
    add_engine(toy)
    with Editor.load(toy, "tensorrt") as editor, pytest.raises(DeltaError, match="not finite"):
        edit(editor, photo(), "hello")


# --- what goes wrong


def message(call: Any, kind: type[HywuError]) -> str:
    """The message of an error of exactly this kind; it has all three parts."""
    with pytest.raises(HywuError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    assert error.wrong
    assert error.expected
    assert error.remedy
    return str(error)


def test_without_a_gpu_or_a_library(machine: Machine, toy: Path) -> None:
    add_engine(toy)
    machine.cuda.failing["cudaGetDeviceCount"] = 35
    text = message(lambda: Editor.load(toy, "tensorrt"), DeviceError)
    for part in ("TensorRT 10.3.0", "CUDA runtime 13.5", "CUDA error 35", "Use --backend ort-cpu"):
        assert part in text
    machine.cuda.cudaDriverGetVersion = lambda: (0, 0)  # type: ignore[method-assign]
    assert "no NVIDIA driver is installed" in message(lambda: create_backend("tensorrt"), DeviceError)
    assert "no NVIDIA driver is installed" in str(available_backends()["tensorrt-rtx"])
    machine.without("tensorrt")
    assert "pip install 'hywu-export[tensorrt,cuda]'" in message(
        lambda: create_backend("tensorrt"), DeviceError
    )
    machine.without("cuda.bindings.runtime")
    machine.without("cuda.cudart")
    assert "cuda-python cannot be imported" in message(lambda: create_backend("tensorrt-rtx"), DeviceError)


def test_the_older_name_of_cuda_python(machine: Machine, toy: Path) -> None:
    machine.without("cuda.bindings.runtime")
    machine.patch.setitem(sys.modules, "cuda.cudart", machine.cuda)
    assert create_backend("tensorrt").name == "tensorrt"


def test_gpu_numbers_and_gpus_that_rtx_leaves_out(machine: Machine) -> None:
    assert "there is no GPU 3" in message(lambda: create_backend("tensorrt", device=3), DeviceError)
    machine.cuda.capability = "9.0"
    assert available_backends()["tensorrt"] is None
    text = message(lambda: create_backend("tensorrt-rtx"), DeviceError)
    assert "compute capability 9.0, on which it does not run" in text


def test_memory(machine: Machine, toy: Path) -> None:
    add_engine(toy)
    backend = create_backend("tensorrt")
    machine.cuda.failing["cudaMalloc"] = 2
    text = message(lambda: backend.allocate((10,), "float32"), DeviceError)
    assert "no memory for a tensor float32 [10]" in text
    assert "low_memory=True" in text
    with Editor.load(toy, "tensorrt") as editor:
        message(lambda: edit(editor, photo(), "hello"), DeviceError)
        machine.cuda.failing.clear()
        edit(editor, photo(), "hello")
    machine.cuda.misaligned = True
    assert "multiple of 256" in message(lambda: backend.allocate((10,), "float32"), DeviceError)


def test_error_while_it_runs(machine: Machine, toy: Path) -> None:
    add_engine(toy)
    with Editor.load(toy, "tensorrt") as editor:
        edit(editor, photo(), "hello")
        machine.cuda.broken = 700
        assert "illegal memory access" in message(lambda: edit(editor, photo(), "hello"), EngineError)


def test_wrong_address(machine: Machine, toy: Path) -> None:
    add_engine(toy)
    backend = create_backend("tensorrt")
    session = backend.load(toy / "engines/key/words.plan", {})
    ids, hidden = backend.allocate((1, 8), "int64"), backend.allocate((1, 4), "float32")
    session.bind({"ids": ids}, {"hidden": hidden}).run()
    backend.wait()

    class Elsewhere:
        shape, dtype = (1, 4), np.dtype("float32")

        def __init__(self, address: Any):
            self.address = address

    for address in (hidden.address + 4, 256, None):  # type: ignore[attr-defined]
        outside: Any = {"hidden": Elsewhere(address)}
        text = message(lambda o=outside: session.bind({"ids": ids}, o), EngineError)
        assert "does not take address" in text
    wrong = [
        ({"ids": ids}, {"hidden": backend.allocate((1, 5), "float32")}),
        ({"ids": ids}, {"hidden": backend.allocate((1, 4), "float16")}),
        ({"ids": ids}, {}),
        ({"ids": ids, "more": ids}, {"hidden": hidden}),
        ({"ids": ids}, {"hidden": backend.allocate((2, 4), "float32")}),
    ]
    for inputs, outputs in wrong:
        assert "The manifest says" in message(lambda i=inputs, o=outputs: session.bind(i, o), EngineError)  # type: ignore[misc]
    add_engine(toy, plan={"profile": {"ids": [[1, 8], [1, 8], [1, 8]]}})
    session = backend.load(toy / "engines/key/words.plan", {})
    two = backend.allocate((2, 8), "int64")
    wide = backend.allocate((2, 4), "float32")
    text = message(lambda: session.bind({"ids": two}, {"hidden": wide}), InputError)
    assert "built for [1, 8] to [1, 8]" in text
    add_engine(toy, plan={"host": ["ids"]})
    session = backend.load(toy / "engines/key/words.plan", {})
    assert "in host memory" in message(lambda: session.bind({"ids": ids}, {"hidden": hidden}), EngineError)


def damage_truncated(toy: Path) -> None:
    file = toy / "engines/key/words.plan"
    file.write_bytes(file.read_bytes()[:20])


def damage_rubbish(toy: Path) -> None:
    add_engine(toy)
    with BundleAddition(toy, "engines/key") as addition:
        engine = Manifest.read(toy).engines["key"]
        for graph in engine.graphs:
            addition.write(f"{graph}.plan", [b"" if graph == "words" else b"{"])
        addition.commit(lambda m: replace(m, engines={"key": engine}))


@pytest.mark.parametrize("damage", [damage_truncated, damage_rubbish])
def test_damaged_plan(machine: Machine, toy: Path, cpu: Editor, damage: Any) -> None:
    """It is refused with the command that makes it anew, and the rest of the bundle works."""
    add_engine(toy)
    damage(toy)
    with Editor.load(toy, "tensorrt") as editor:
        text = message(lambda: edit(editor, photo(), "hello"), EngineError)
    assert f"hywu build {toy} --backend tensorrt --shapes 8x8:8x8:64x64 --batch 1:1:4 --rebuild" in text
    with Editor.load(toy, "ort-cpu", threads=1) as editor:
        np.testing.assert_array_equal(edit(editor, photo(), "hello"), edit(cpu, photo(), "hello"))
    if damage is damage_truncated:
        message(lambda: Editor.load(toy, "ort-cpu", verify=True), BundleError)


@pytest.mark.parametrize(
    ("plan", "words"),
    [({"version": "10.4.0"}, "not compatible"), ({"capability": "7.5"}, "incompatible device")],
)
def test_plan_that_is_not_what_the_manifest_says(machine: Machine, toy: Path, plan: Any, words: str) -> None:
    add_engine(toy, plan=plan)
    with Editor.load(toy, "tensorrt") as editor:
        assert words in message(lambda: edit(editor, photo(), "hello"), EngineError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "10.4.0"}, "built by version 10.4.0, here is 10.3.0"),
        ({"version": "11.0", "version_compatible": True}, "built by version 11.0"),
        ({"compute_capabilities": ("8.6", "12.0")}, "for compute capability 8.6, 12.0, Made-up GPU has 8.9"),
        ({"compute_capabilities": ("12.0",), "hardware_compatible": True}, "for compute capability 12.0"),
        ({"sources": {"step.onnx": "0" * 64}}, "it is stale: step.onnx"),
    ],
)
def test_engines_that_do_not_suit(
    machine: Machine, toy: Path, changes: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    add_engine(toy, **changes)
    for options in ({"backend": "tensorrt"}, {"engine": "key"}):
        text = message(lambda o=options: Editor.load(toy, **o), EngineError)  # type: ignore[misc]
        assert words in text
        assert f"hywu build {toy} --backend tensorrt --shapes 8x8:8x8:64x64 --batch 1:1:4" in text
    with Editor.load(toy) as editor:  # auto goes on, and says so
        assert editor.backend.name == "ort-cpu"
    assert words in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "10.2.1", "version_compatible": True},
        {"compute_capabilities": ("8.0",), "hardware_compatible": True},
        {"compute_capabilities": ("7.5", CAPABILITY)},
    ],
)
def test_engines_that_suit(machine: Machine, toy: Path, changes: Any) -> None:
    add_engine(toy, **changes)
    with Editor.load(toy) as editor:
        assert editor.backend.name == "tensorrt"
        edit(editor, photo(), "hello")


def test_no_engine_at_all(machine: Machine, toy: Path) -> None:
    text = message(lambda: Editor.load(toy, "tensorrt-rtx"), EngineError)
    assert "no tensorrt-rtx engine of the bundle's own graphs" in text
    assert f"hywu build {toy} --backend tensorrt-rtx --compute-capability 89" in text
    assert "The bundle has no engine" in message(lambda: Editor.load(toy, engine="nothing"), InputError)
    with Editor.load(toy) as editor:
        assert editor.backend.name == "ort-cpu"


def test_request_outside_the_shapes(machine: Machine, toy: Path) -> None:
    shapes = {"batch": (1, 1, 2), "delta_batch": (1, 1, 2), "height": (8, 8, 16), "width": (8, 8, 24)}
    add_engine(toy, shapes=shapes)
    with Editor.load(toy, "tensorrt") as editor:
        inputs = {"region": np.ones((1, 1, 8, 6), np.float32)}
        text = message(lambda: edit(editor, photo(), "x", size=(24, 32), inputs=inputs), InputError)
        assert "Axis height has size 32. Engine key takes 8 to 16." in text
        assert f"hywu build {toy} --backend tensorrt --shapes 8x8:8x8:24x32 --batch 1:1:2" in text
        limits = editor.limits()
        assert limits.batch == (1, 2)
        assert limits.size is not None
        assert (limits.size.min, limits.size.max) == (8, 16)
        # Without a size, a photo is brought to one that the engine takes.
        big = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
        picture = editor.edit(big, "x", inputs={"region": np.ones((1, 1, 4, 4), np.float32)}, output="array")
        assert isinstance(picture, np.ndarray)
        assert picture.shape == (16, 16, 3)
        pairs = [(photo(), "x")] * 3
        assert "takes 1 to 2" in message(lambda: editor.edit_batch(pairs), InputError)


def test_the_newest_engine_that_covers(machine: Machine, toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    add_engine(toy, "old")
    small = {"batch": (1, 1, 1), "delta_batch": (1, 1, 1), "height": (8, 16, 16), "width": (8, 24, 24)}
    add_engine(toy, "new", shapes=small)
    add_engine(toy, "part", graphs=("words", "step"))
    with Editor.load(toy) as editor:
        assert editor.engines == ("part", "new", "old")
        assert "backend tensorrt chosen on Made-up GPU, engine part" in caplog.text
        edit(editor, photo(), "x")
        assert editor._executor._engine == "new"
        edit(editor, photo(), "x", size=(16, 32), inputs={"region": np.ones((1, 1, 8, 4), np.float32)})
        assert editor._executor._engine == "old"
        assert editor.limits().batch == (1, 4)
    with Editor.load(toy, engine="part") as editor:
        text = message(lambda: edit(editor, photo(), "x"), EngineError)
        assert "Engine part has no graph" in text
        assert "--backend tensorrt" in text


def test_variants(machine: Machine, toy: Path) -> None:
    with BundleAddition(toy, "variants/fp16") as addition:
        addition.write("final.onnx", [(toy / "final.onnx").read_bytes()])
        from hywu_runtime.manifest import Variant

        variant = Variant("fp16", {"final": "variants/fp16/final.onnx"})
        addition.commit(lambda m: replace(m, variants={"fp16": variant}))
    add_engine(toy, variant="fp16", backend="tensorrt-rtx")
    assert "--variant fp16" not in message(lambda: Editor.load(toy, "tensorrt-rtx"), EngineError)
    text = message(lambda: Editor.load(toy, "tensorrt", variant="fp16"), EngineError)
    assert "--backend tensorrt --variant fp16" in text
    with Editor.load(toy, engine="key") as editor:
        assert (editor.variant, editor.backend.name) == ("fp16", "tensorrt-rtx")
        edit(editor, photo(), "x")
    with Editor.load(toy, variant="fp16") as editor:
        assert editor.backend.name == "tensorrt-rtx"
    assert "not int8" in message(lambda: Editor.load(toy, engine="key", variant="int8"), InputError)
    assert "not ort-cpu" in message(lambda: Editor.load(toy, "ort-cpu", engine="key"), InputError)


def test_build_command(toy: Path) -> None:
    manifest = Manifest.read(toy)
    target = Target("tensorrt-rtx", "1", "12.0", "GPU")
    shapes = {
        "batch": (1, 1, 4),
        "delta_batch": (1, 1, 1),
        "height": (8, 8, 16),
        "width": (8, 16, 24),
        "other": (1, 2, 3),
    }
    assert build_command(Path("my bundle"), manifest, target, "int8", shapes) == (
        "hywu build 'my bundle' --backend tensorrt-rtx --compute-capability 120 --variant int8 "
        "--shapes 8x8:16x8:24x16 --batch 1:1:4 --delta-batch 1:1:1 --axis other=1:2:3"
    )


def test_obstacle_of_another_backend(toy: Path) -> None:
    manifest = add_engine(toy)
    target = Target("tensorrt-rtx", VERSIONS["tensorrt-rtx"], CAPABILITY, "GPU")
    assert obstacle(manifest, "key", target) == "it is for backend tensorrt"


def test_deltas_of_a_list(machine: Machine, toy: Path, cpu: Editor) -> None:
    add_engine(toy)
    rng = np.random.default_rng(3)
    sets = [
        Deltas({name: rng.standard_normal((1, *shape)) for name, shape in zip(DELTAS, [(3, 4), (4, 3)])})
        for _ in range(2)
    ]
    pairs, inputs = [(photo(i), "hello") for i in range(2)], {"region": region(2)}
    with Editor.load(toy, "tensorrt") as editor:
        got, expected = (
            e.edit_batch(pairs, deltas=sets, inputs=inputs, size=(WIDTH, HEIGHT), output="array")
            for e in (editor, cpu)
        )
    np.testing.assert_array_equal(np.stack(got), np.stack(expected))


# --- the real libraries


@pytest.mark.rtx
def test_real_tensorrt_rtx_without_a_driver(toy: Path, tmp_path: Path) -> None:
    """Its own Runtime refuses a plan, with our error: no driver, or no plan."""
    trt = pytest.importorskip("tensorrt_rtx")
    from hywu_runtime.backends import tensorrt

    backend = object.__new__(tensorrt.TensorRt)  # without the driver that its constructor asks for
    backend.name, backend.label, backend._trt = "tensorrt-rtx", "TensorRT-RTX", trt
    backend.target = Target("tensorrt-rtx", trt.__version__, "8.9", "GPU")
    backend.log = tensorrt._make_log(trt)
    backend._runtime = trt.Runtime(backend.log)
    good = tmp_path / "good.plan"
    good.write_bytes(_tiny_plan(trt))
    if not _has_driver():
        text = message(lambda: backend.load(good, {}), DeviceError)
        assert "CUDA driver version is insufficient" in text
        assert "ort-cpu" in text
    bad = tmp_path / "bad.plan"
    bad.write_bytes(b"no plan" * 100)
    message(lambda: backend.load(bad, {}), DeviceError if not _has_driver() else EngineError)
    bad.write_bytes(b"")
    assert "cannot be loaded" in message(lambda: backend.load(bad, {}), EngineError)


@pytest.mark.rtx
@pytest.mark.parametrize("name", ["engine", "context", "config", "cache"])
def test_real_names_exist(name: str) -> None:
    """Every attribute that the stand-ins have and the runtime uses is one of the real library."""
    trt = pytest.importorskip("tensorrt_rtx")
    kind, names = {
        "engine": (
            trt.ICudaEngine,
            "get_tensor_name get_tensor_mode get_tensor_location get_tensor_shape get_tensor_dtype "
            "num_io_tensors get_tensor_profile_shape create_runtime_config create_execution_context",
        ),
        "context": (
            trt.IExecutionContext,
            "set_input_shape set_tensor_address get_tensor_address get_tensor_shape infer_shapes "
            "execute_async_v3 update_device_memory_size_for_shapes set_device_memory is_stream_capturable",
        ),
        "config": (
            trt.IRuntimeConfig,
            "set_execution_context_allocation_strategy create_runtime_cache set_runtime_cache "
            "dynamic_shapes_kernel_specialization_strategy",
        ),
        "cache": (trt.IRuntimeCache, "serialize deserialize"),
    }[name]
    assert [attribute for attribute in names.split() if not hasattr(kind, attribute)] == []
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert trt.TensorIOMode.INPUT.name == "INPUT"
    assert trt.TensorLocation.DEVICE.name == "DEVICE"
    assert {"UINT8", "INT32", "INT64", "HALF", "FLOAT"} <= set(trt.DataType.__members__)


def test_real_cuda_python() -> None:
    """The functions that the stand-in has are those of cuda-python; here they say that there is no driver."""
    cuda = pytest.importorskip("cuda.bindings.runtime")
    from fake_tensorrt import Cuda

    for name in dir(Cuda):
        if name.startswith("cuda"):
            assert hasattr(cuda, name), name
    if _has_driver():
        return
    event, graph, executable = cuda.cudaEvent_t(0), cuda.cudaGraph_t(0), cuda.cudaGraphExec_t(0)
    kinds, modes, attributes = cuda.cudaMemcpyKind, cuda.cudaStreamCaptureMode, cuda.cudaDeviceAttr
    stream = 7000  # as an integer, which is how handles are passed
    for call in (
        lambda: cuda.cudaMemcpyAsync(256, 512, 4, kinds.cudaMemcpyHostToDevice, stream),
        lambda: cuda.cudaMemcpyAsync(256, 512, 4, kinds.cudaMemcpyDeviceToHost, stream),
        lambda: cuda.cudaMemcpyAsync(256, 512, 4, kinds.cudaMemcpyDeviceToDevice, stream),
        lambda: cuda.cudaMemsetAsync(256, 0, 4, stream),
        lambda: cuda.cudaStreamSynchronize(stream),
        lambda: cuda.cudaStreamBeginCapture(stream, modes.cudaStreamCaptureModeThreadLocal),
        lambda: cuda.cudaStreamEndCapture(stream),
        lambda: cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking),
        lambda: cuda.cudaGraphInstantiate(graph, 0),
        lambda: cuda.cudaGraphLaunch(executable, stream),
        lambda: cuda.cudaGraphDestroy(graph),
        lambda: cuda.cudaGraphExecDestroy(executable),
        lambda: cuda.cudaEventCreate(),
        lambda: cuda.cudaEventRecord(event, stream),
        lambda: cuda.cudaEventElapsedTime(event, event),
        lambda: cuda.cudaMalloc(1),
        lambda: cuda.cudaMallocHost(1),
        lambda: cuda.cudaFree(256),
        lambda: cuda.cudaFreeHost(4096),
        lambda: cuda.cudaSetDevice(0),
        lambda: cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, 0),
        lambda: cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMinor, 0),
        lambda: cuda.cudaGetDeviceProperties(0),
    ):
        code, *_ = call()  # no TypeError: it takes our arguments
        assert int(code) == 35
    assert "CUDA error" in message(lambda: create_backend("tensorrt-rtx"), DeviceError)


def _has_driver() -> bool:
    from hywu_runtime.backends import cuda

    try:
        cuda.find_gpu()
    except (DeviceError, ImportError):
        return False
    return True


def _tiny_plan(trt: Any) -> bytes:
    """y = x + x, built for SM89 without a GPU."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network()
    x = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return bytes(builder.build_serialized_network(network, config))
