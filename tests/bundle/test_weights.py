from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load

from hywu_export.bundle import weights
from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.bundle.weights import NUMPY_DTYPES, StoredTensor, WeightsFile, file_identity, read_tensor
from hywu_runtime.errors import CheckpointError

FLOATS = ("F32", "F16", "BF16")
TENSORS = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(\.[a-z0-9]{1,8}){0,2}", fullmatch=True),
    st.tuples(
        st.lists(st.integers(0, 7), max_size=3).map(tuple), st.sampled_from(FLOATS), st.sampled_from(FLOATS)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS, st.sampled_from([2, 6, 1024]))
def test_a_converted_file_is_what_safetensors_reads(
    tmp_path: Path, tensors: dict[str, tuple[tuple[int, ...], str, str]], piece: int
) -> None:
    random = np.random.default_rng(0)
    given_tensors = {
        name: random.standard_normal(shape).astype(NUMPY_DTYPES[stored])
        for name, (shape, stored, _) in tensors.items()
    }
    save_file(given_tensors, tmp_path / "m.safetensors")
    index = SafetensorsIndex.from_file(tmp_path / "m.safetensors")
    file = WeightsFile.lay_out(
        "w", [StoredTensor(name, wanted, shape, index[name]) for name, (shape, _, wanted) in tensors.items()]
    )
    with patch.object(weights, "CHUNK_BYTES", piece * 4):
        data = b"".join(file.chunks())
    got = load(data)
    assert got.keys() == tensors.keys()
    for name, (_, _, wanted) in tensors.items():
        expected = given_tensors[name].astype(NUMPY_DTYPES[wanted])
        np.testing.assert_array_equal(got[name].float().numpy(), expected.astype(np.float32))
        start = file.offsets[name]
        assert data[start : start + expected.nbytes] == expected.tobytes()


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    values = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    save_file({"w": values}, tmp_path / "m.safetensors")
    location = SafetensorsIndex.from_file(tmp_path / "m.safetensors")["w"]
    data = b"".join(read_tensor("w", location, "BF16"))
    np.testing.assert_array_equal(np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float32), values)


def test_values_beyond_the_range_of_the_dtype(tmp_path: Path) -> None:
    save_file({"w": np.array([1.0, 1e6], np.float32)}, tmp_path / "m.safetensors")
    location = SafetensorsIndex.from_file(tmp_path / "m.safetensors")["w"]
    with pytest.raises(CheckpointError, match="beyond the range of float16"):
        list(read_tensor("w", location, "F16"))


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    location = SafetensorsIndex.from_file(tmp_path / "m.safetensors")["w"]
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_tensor("w", location, "F32"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        file_identity(tmp_path / "m.safetensors")
