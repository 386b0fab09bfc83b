from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from hywu_export.bundle.sources import DTYPE_BYTES, SafetensorsIndex
from hywu_runtime.errors import CheckpointError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((4,), np.float16),
    "empty": np.zeros((0, 5), np.int64),
    "scalar": np.array(7, np.uint8),
}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8", **more: Any) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
        **more,
    }


def read_all(index: SafetensorsIndex) -> dict[str, bytes]:
    return {name: at.file.read_bytes()[at.offset : at.offset + at.length] for name, at in index.items()}


def test_locates_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "np"})
    index = SafetensorsIndex.from_file(path)
    assert read_all(index) == {name: array.tobytes() for name, array in TENSORS.items()}
    assert {name: at.shape for name, at in index.items()} == {
        name: array.shape for name, array in TENSORS.items()
    }
    assert (index["a"].dtype, index["b"].dtype, index["empty"].dtype, index["scalar"].dtype) == (
        "F32",
        "F16",
        "I64",
        "U8",
    )
    assert all(at.length == np.prod(at.shape) * DTYPE_BYTES[at.dtype] for at in index.values())
    assert index.files == (path,)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_of_any_stem(stem: str, tmp_path: Path) -> None:
    files = {name: f"{stem}-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(TENSORS)}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in files if files[name] == file}, tmp_path / file)
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for index in (SafetensorsIndex.from_folder(tmp_path), SafetensorsIndex.from_folder(tmp_path, stem)):
        assert read_all(index) == {name: array.tobytes() for name, array in TENSORS.items()}
        assert {path.name for path in index.files} == set(files.values())


def test_two_stems_are_ambiguous(tmp_path: Path) -> None:
    for name in ("model", "model.fp16"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"exactly one set of safetensors weights: model, model\.fp16"):
        SafetensorsIndex.from_folder(tmp_path)
    assert SafetensorsIndex.from_folder(tmp_path, "model.fp16").keys() == TENSORS.keys()


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights: none"):
        SafetensorsIndex.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights\. model\.safetensors or"):
        SafetensorsIndex.from_folder(tmp_path, "model")
    with pytest.raises(CheckpointError, match="is not a folder"):
        SafetensorsIndex.from_folder(tmp_path / "no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsIndex.from_file(tmp_path)  # a folder, where a file was expected


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "header takes 0 bytes"),
        (b"{}", b"1", "has 11 bytes. 10 bytes"),
        (b"[]", b"", "JSON list"),
        (b"{,}", b"", "not valid JSON"),
        (b"\xff\xff", b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "'a' occurs twice"),
        ({"a": 3}, b"", "'a' has a header entry of another form"),
        ({"a": entry(0, 1, more=1)}, b"1", "'a' has a header entry of another form"),
        ({"a": entry(0, 1, dtype="F5")}, b"1", "'a' has the dtype 'F5'"),
        ({"a": entry(0, 1, dtype=["U8"])}, b"1", r"'a' has the dtype \['U8'\]"),
        ({"a": entry(0, 1, shape=[-1])}, b"1", r"'a' has the shape \[-1\]"),
        ({"a": entry(0, 1, shape=[1.0])}, b"1", r"'a' has the shape \[1.0\]"),
        ({"a": entry(0, 1, shape=[True])}, b"1", r"'a' has the shape \[True\]"),
        ({"a": entry(0, 1, shape=[1] * 65)}, b"1", "'a' has the shape"),
        ({"a": entry(0, 1, shape=[1 << 63])}, b"1", "'a' has the shape"),
        ({"a": entry(0, 1, shape="1")}, b"1", "'a' has the shape '1'"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1", r"the offsets \[0\]"),
        ({"a": entry(0, 1, dtype="F32", shape=[1])}, b"1", "'a' takes 1 bytes. 4 bytes for F32"),
        ({"a": entry(2, 1, shape=[1])}, b"12", "'a' takes -1 bytes"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", "'b' overlaps another tensor"),
        ({"a": entry(0, 2), "b": entry(0, 2)}, b"12", "'b' overlaps another tensor"),
        ({"a": entry(0, 1), "b": entry(2, 3)}, b"123", "'b' does not begin where another ends"),
        ({"a": entry(0, 4)}, b"123", "bytes, by its header"),
        ({"a": entry(0, 2)}, b"123", "bytes, by its header"),
    ],
)
def test_refuses_a_damaged_file(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsIndex.from_file(path)
    assert str(path) in str(caught.value)


def test_refuses_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (
        b"",
        b"1234567",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="says that its header takes"):
            SafetensorsIndex.from_file(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_either_refused_or_stays_inside_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        index = SafetensorsIndex.from_file(path)
    except CheckpointError:
        return
    assert all(8 <= at.offset <= at.offset + at.length <= path.stat().st_size for at in index.values())


@pytest.mark.parametrize(
    "name",
    [
        "../m.safetensors",
        "/m.safetensors",
        "d/m.safetensors",
        "d\\m.safetensors",
        "C:m.safetensors",
        "m.bin",
        "",
        3,
        None,
    ],
)
def test_an_index_names_plain_files(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="'a' is said to be in"):
        SafetensorsIndex.from_folder(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a"])
def test_an_index_has_a_weight_map(weight_map: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        SafetensorsIndex.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("listed", "message"), [("a b z", "lacks the tensor 'z'"), ("a", "unlisted tensor 'b'")]
)
def test_an_index_and_its_shards_agree(listed: str, message: str, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    save_file({name: TENSORS[name] for name in "ab"}, tmp_path / shard)
    index = {"weight_map": dict.fromkeys(listed.split(), shard)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsIndex.from_folder(tmp_path)
