from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from hywu_export.bundle import BundleWriter
from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.bundle.staging import writing
from hywu_export.engines import tensorrt as rtx
from hywu_export.tracing import TensorSpec
from hywu_export.tracing.tracer import TracedGraph
from hywu_runtime.errors import BundleError, CheckpointError, HywuError

X = TensorSpec("x", "float32", ("batch", 8))
Y = TensorSpec("y", "float32", ("batch", 4))
WEIGHT = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float16)
BIAS = np.arange(4, dtype=np.float16)


def graph(name: str = "step", activation: str = "Sigmoid", constant_rows: int = 1) -> TracedGraph:
    """y = activation(x @ net.w + net.b) + mean of a constant table; the parameters have no value."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(X.shape))
    parameters = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s))
        for n, s in (("net.w", (8, 4)), ("net.b", (4,)))
    ]
    table = ir.Value(
        name="constant/0", const_value=ir.tensor(np.ones((constant_rows, 4), np.float32), name="constant/0")
    )
    axes = ir.Value(name="constant/1", const_value=ir.tensor(np.zeros(1, np.int64), name="constant/1"))
    nodes = [
        ir.node("MatMul", [x, parameters[0]]),
        ir.node("ReduceMean", [table, axes]),
    ]
    nodes.append(ir.node("Add", [nodes[0].outputs[0], parameters[1]]))
    nodes.append(ir.node(activation, [nodes[2].outputs[0]]))
    nodes.append(ir.node("Add", [nodes[3].outputs[0], nodes[1].outputs[0]]))
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"n{number}"
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(Y.shape)
    graph_ir = ir.Graph([x], [y], nodes=nodes, opset_imports={"": 20}, name="graph")
    for value in (*parameters, table, axes):
        graph_ir.initializers.add(value)
    return TracedGraph(
        name, ir.Model(graph_ir, ir_version=10), {"net.w": "net.w", "net.b": "net.b"}, (X,), (Y,)
    )


def expected(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(x @ WEIGHT.astype(np.float32) + BIAS.astype(np.float32)))) + 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "net"
    folder.mkdir(parents=True)
    save_file({"b": BIAS, "unused": np.ones(3, np.float32), "w": WEIGHT}, folder / "model.safetensors")
    return folder / "model.safetensors"


def write(
    path: Path, checkpoint: Path, link: bool = False, overwrite: bool = False, **sections: object
) -> dict:
    with BundleWriter(path, overwrite=overwrite) as writer:
        writer.add_source("base", checkpoint.parents[1], name="a/b", licence="MIT")
        writer.add_weights("net", SafetensorsIndex.from_file(checkpoint), source="base", link=link)
        writer.add_graph(graph())
        writer.add_graph(graph("other", "Tanh"))
        writer.add_file("tokenizer/tokenizer.json", b"{}")
        return writer.finish(sections)


def load(bundle: Path, manifest: dict, root: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    linked = manifest["linked"].get("step.onnx", {})
    values = []
    for entry in linked.values():
        dtype = ml_dtypes.bfloat16 if entry["dtype"] == "bfloat16" else entry["dtype"]
        shape = tuple(entry["shape"])
        data = np.memmap(root / entry["file"], dtype, "r", offset=entry["offset"], shape=shape)
        if entry["dtype"] == "bfloat16":
            kind = onnx.TensorProto.BFLOAT16
            values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(data.view(np.uint16), kind))
        else:
            values.append(ort.OrtValue.ortvalue_from_numpy(data))
    options.add_external_initializers(list(linked), values)
    session = ort.InferenceSession(bundle / "step.onnx", options, providers=["CPUExecutionProvider"])
    session.held = values  # the memory that the session reads
    return session


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_copied_and_linked_bundles_give_the_same_result(tmp_path: Path, checkpoint: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    results = []
    for link in (False, True):
        bundle = tmp_path / f"bundle-{link}"
        manifest = write(bundle, checkpoint, link)
        results.append(load(bundle, manifest, checkpoint.parents[1]).run(None, {"x": x})[0])
        np.testing.assert_allclose(results[-1], expected(x), atol=1e-6)
    np.testing.assert_array_equal(*results)


def test_the_manifest_names_every_file(tmp_path: Path, checkpoint: Path) -> None:
    manifest = write(tmp_path / "bundle", checkpoint, family="F", **{"x-note": 1})
    assert manifest == json.loads((tmp_path / "bundle/manifest.json").read_text())
    files = {
        p.relative_to(tmp_path / "bundle").as_posix() for p in (tmp_path / "bundle").rglob("*") if p.is_file()
    }
    assert files == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        data = (tmp_path / "bundle" / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["format"] == 1
    assert manifest["family"] == "F"
    assert manifest["x-note"] == 1
    assert manifest["graphs"]["step"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 8]}]
    assert manifest["sources"] == {"base": {"name": "a/b", "licence": "MIT", "files": {}}}
    assert hidden(tmp_path) == []


def test_graphs_share_one_weights_file_that_safetensors_reads(tmp_path: Path, checkpoint: Path) -> None:
    manifest = write(tmp_path / "bundle", checkpoint)
    assert [f for f in manifest["files"] if f.startswith("weights/")] == ["weights/net.safetensors"]
    with safe_open(tmp_path / "bundle/weights/net.safetensors", "np") as file:
        assert set(file.keys()) == {"w", "b"}
        np.testing.assert_array_equal(file.get_tensor("w"), WEIGHT.astype(np.float32))
    for name in ("step", "other"):
        onnx.checker.check_model(str(tmp_path / f"bundle/{name}.onnx"))


def test_links_say_where_the_bytes_are(tmp_path: Path, checkpoint: Path) -> None:
    manifest = write(tmp_path / "bundle", checkpoint, link=True)
    entry = manifest["linked"]["step.onnx"]["net.w"]
    assert entry["file"] == "net/model.safetensors"
    assert (entry["source"], entry["dtype"], entry["shape"]) == ("base", "float16", [8, 4])
    data = checkpoint.read_bytes()
    assert data[entry["offset"] : entry["offset"] + entry["length"]] == WEIGHT.tobytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    identity = {"size": len(data), "header_sha256": hashlib.sha256(header).hexdigest()}
    assert manifest["sources"]["base"]["files"] == {"net/model.safetensors": identity}
    assert not (tmp_path / "bundle/weights").exists()
    with pytest.raises(Exception, match=r"External data|external data"):  # never runs on made-up weights
        ort.InferenceSession(tmp_path / "bundle/step.onnx", providers=["CPUExecutionProvider"])


def test_linked_bfloat16(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    weight = WEIGHT.astype(ml_dtypes.bfloat16)
    save_file({"w": weight, "b": BIAS.astype(np.float32)}, file)
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add_source("base", tmp_path, name="m")
        writer.add_weights("net", SafetensorsIndex.from_file(file), source="base", link=True)
        writer.add_graph(graph())
        manifest = writer.finish({})
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    want = 1 / (1 + np.exp(-(x @ weight.astype(np.float32) + BIAS.astype(np.float32)))) + 1
    np.testing.assert_allclose(
        load(tmp_path / "bundle", manifest, tmp_path).run(None, {"x": x})[0], want, atol=1e-6
    )


def test_linked_through_a_symbolic_link(tmp_path: Path, checkpoint: Path) -> None:
    """As in a hub's cache: the tree holds links to files elsewhere."""
    root = tmp_path / "snapshot"
    (root / "net").mkdir(parents=True)
    (root / "net/model.safetensors").symlink_to(checkpoint)
    manifest = write(tmp_path / "bundle", root / "net/model.safetensors", link=True)
    assert manifest["linked"]["step.onnx"]["net.w"]["file"] == "net/model.safetensors"


@pytest.mark.rtx
@pytest.mark.parametrize("link", [False, True])
def test_tensorrt_rtx_parses_from_the_bundle(tmp_path: Path, checkpoint: Path, link: bool) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    manifest = write(tmp_path / "bundle", checkpoint, link)
    if not link:
        assert rtx.parser_errors(tmp_path / "bundle/step.onnx") == []
        return
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.load_model_proto((tmp_path / "bundle/step.onnx").read_bytes())
    data = checkpoint.read_bytes()
    held = []
    for name, entry in manifest["linked"]["step.onnx"].items():
        held.append(np.frombuffer(data[entry["offset"] : entry["offset"] + entry["length"]], np.uint8))
        assert parser.load_initializer(name, held[-1].ctypes.data, held[-1].nbytes)
    assert parser.parse_model_proto()


def test_large_constants_go_to_a_file_once(tmp_path: Path, checkpoint: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add_weights("net", SafetensorsIndex.from_file(checkpoint))
        writer.add_graph(graph("step", constant_rows=20_000))
        writer.add_graph(graph("other", constant_rows=20_000))
        manifest = writer.finish({})
    assert manifest["files"]["step.onnx"]["size"] < 10_000
    assert 320_000 < manifest["files"]["weights/constants.safetensors"]["size"] < 330_000
    x = np.ones((2, 8), np.float32)
    np.testing.assert_allclose(
        load(tmp_path / "bundle", manifest).run(None, {"x": x})[0], expected(x), atol=1e-5
    )


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    for link in (False, True):
        first, second = (write(tmp_path / f"{n}{link}" / "bundle", checkpoint, link) for n in "ab")
        assert first == second


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """A sparse file of 1 GiB is converted; at no time is more than a few pieces of it in memory."""
    rows = 2**20
    header = json.dumps(
        {"w": {"dtype": "F16", "shape": [rows, 512], "data_offsets": [0, rows * 1024]}}
    ).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + rows * 1024)
    from hywu_export.bundle.weights import StoredTensor, WeightsFile

    layout = WeightsFile.lay_out(
        "w", [StoredTensor("w", "F32", (rows, 512), location=SafetensorsIndex.from_file(file)["w"])]
    )
    tracemalloc.start()
    size = 0
    for number, chunk in enumerate(layout.chunks()):
        size += len(chunk)
        if number == 8:
            break
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 128 * 2**20
    assert peak < 160 * 2**20


def test_a_parameter_that_the_checkpoint_lacks(tmp_path: Path, checkpoint: Path) -> None:
    broken = tmp_path / "other.safetensors"
    for tensors, message in (
        ({"w": WEIGHT}, "no tensor 'b'"),
        ({"w": WEIGHT.T.copy(), "b": BIAS}, r"'w' .* has shape \[4, 8\]"),
    ):
        save_file(tensors, broken)
        with pytest.raises(CheckpointError, match=message):
            write(tmp_path / "bundle", broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "other.safetensors"]


def test_a_checkpoint_that_shrinks_meanwhile(tmp_path: Path, checkpoint: Path) -> None:
    tensors = SafetensorsIndex.from_file(checkpoint)
    os.truncate(checkpoint, checkpoint.stat().st_size - 10)
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add_weights("net", tensors)
        writer.add_graph(graph())
        with pytest.raises(CheckpointError, match="ends within tensor"):
            writer.finish({})
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_an_alias_of_a_tied_parameter_is_found(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"shared": WEIGHT, "b": BIAS}, file)
    traced = graph()
    traced.aliases["net.w"] = ("net.shared",)
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add_weights("net", SafetensorsIndex.from_file(file))
        writer.add_graph(traced)
        manifest = writer.finish({})
    x = np.ones((2, 8), np.float32)
    np.testing.assert_allclose(
        load(tmp_path / "bundle", manifest).run(None, {"x": x})[0], expected(x), atol=1e-6
    )


def interrupted(path: Path, error: type[BaseException], overwrite: bool = False) -> None:
    with BundleWriter(path, overwrite=overwrite) as writer:
        writer.add_file("a.json", b"{}")
        assert hidden(path.parent)
        raise error


def test_leaving_early_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            interrupted(tmp_path / "bundle", error)
    with BundleWriter(tmp_path / "bundle") as writer:  # never finished
        writer.add_file("a.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_a_manifest_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    def refuse(manifest: dict[str, object]) -> None:
        assert manifest["format"] == 1
        raise BundleError("no")

    with BundleWriter(tmp_path / "bundle", validate=refuse) as writer, pytest.raises(BundleError, match="no"):
        writer.finish({})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "C:/a", "a\\b", "a\0b", "."]
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with BundleWriter(tmp_path / "bundle") as writer, pytest.raises(BundleError, match="is no name"):
        writer.add_file(name, b"")


def test_what_is_added_twice_or_not_at_all(tmp_path: Path, checkpoint: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add_file("a", b"")
        with pytest.raises(BundleError, match="twice"):
            writer.add_file("a", b"")
        with pytest.raises(BundleError, match="cannot be read"):
            writer.add_file("b", tmp_path / "missing")
        writer.add_graph(graph())
        with pytest.raises(BundleError, match="twice"):
            writer.add_graph(graph())
        with pytest.raises(BundleError, match="not declared"):
            writer.add_weights("net", SafetensorsIndex.from_file(checkpoint), source="base", link=True)
        with pytest.raises(BundleError, match="has no weights"):
            writer.finish({})
        writer.add_weights("net", SafetensorsIndex.from_file(checkpoint))
        with pytest.raises(BundleError, match="twice"):
            writer.add_weights("net", SafetensorsIndex.from_file(checkpoint))
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add_source("base", tmp_path / "elsewhere", name="x")
        writer.add_weights("net", SafetensorsIndex.from_file(checkpoint), source="base", link=True)
        writer.add_graph(graph())
        with pytest.raises(BundleError, match="outside its source"):
            writer.finish({})


def test_a_taken_path(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").write_text("x")
    for name, overwrite in (("file", True), ("folder", True), ("folder", False)):
        with pytest.raises(BundleError, match="exists and"):
            BundleWriter(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "folder/precious").exists()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", checkpoint)
    with pytest.raises(BundleError, match="not empty"):
        write(tmp_path / "empty", checkpoint)
    write(tmp_path / "empty", checkpoint, overwrite=True, name="new")
    assert json.loads((tmp_path / "empty/manifest.json").read_text())["name"] == "new"
    assert hidden(tmp_path) == []


def test_an_overwritten_bundle_stays_until_the_new_one_is_whole(tmp_path: Path, checkpoint: Path) -> None:
    write(tmp_path / "bundle", checkpoint, name="old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "bundle", KeyboardInterrupt, overwrite=True)
    assert json.loads((tmp_path / "bundle/manifest.json").read_text())["name"] == "old"


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_writer import write
from hywu_runtime.errors import BundleError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
try:
    write(Path(sys.argv[1]), Path(sys.argv[2]))
except BundleError as error:
    print(error)
"""


@pytest.mark.parametrize("room", [0, 1, 400, 1000])
def test_no_room_for_a_file(tmp_path: Path, checkpoint: Path, room: int) -> None:
    """The system refuses to let files grow beyond ``room`` bytes, as a full disk would."""
    arguments = [str(tmp_path / "bundle"), str(checkpoint), str(Path(__file__).parent), str(room)]
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "cannot be written: File too large" in run.stdout
    assert "Free some space" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_a_device_without_space(tmp_path: Path) -> None:
    match = "No space left on device"
    with (
        pytest.raises(BundleError, match=match) as caught,
        writing(tmp_path),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x")
    assert caught.value.expected
    assert caught.value.remedy


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HywuError, match="cannot be written"):
        BundleWriter(tmp_path / "file" / "bundle")


SLOW_WRITER = """
import sys, time
from pathlib import Path
from hywu_export.bundle import BundleWriter
with BundleWriter(Path(sys.argv[1])) as writer:
    writer.add_file("a.json", b"{}")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        writer.finish({})
        print("finished", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def slow_writer(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_export_leaves_nothing_visible_and_is_cleaned_up(tmp_path: Path, checkpoint: Path) -> None:
    process = slow_writer(tmp_path / "bundle")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "bundle").exists()
    assert len(hidden(tmp_path)) == 1
    write(tmp_path / "bundle", checkpoint)
    assert hidden(tmp_path) == []


def test_two_exports_to_one_path_do_not_disturb_each_other(tmp_path: Path, checkpoint: Path) -> None:
    first = slow_writer(tmp_path / "bundle")
    write(tmp_path / "bundle", checkpoint)  # a second export starts and ends meanwhile
    assert len(hidden(tmp_path)) == 1  # the first one's files are still there
    output, _ = first.communicate("go\n")
    assert "BundleError" in output
    assert "another process" in output
    assert (tmp_path / "bundle/step.onnx").exists()
    assert hidden(tmp_path) == []
