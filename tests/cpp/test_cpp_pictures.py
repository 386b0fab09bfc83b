"""Photos of a request in the C++ runtime: the pixels of the Python runtime, and of Pillow."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
import toy_pictures
from hypothesis import given
from hypothesis import strategies as st
from native import Library, NativeError
from PIL import Image

from hywu_runtime import Editor
from hywu_runtime.images import resized_sizes
from hywu_runtime.manifest import Resize


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shown", toy_pictures.TENSORS)
def test_what_tensors_show(library: Library, shown: str, tmp_path: Path) -> None:
    toy_pictures.write_bundle(tmp_path / "bundle", shown)
    with Editor.load(tmp_path / "bundle", "ort-cpu") as python:
        cpp = native.Editor.load(library, tmp_path / "bundle", backend="ort-cpu")
        assert cpp.limits().photo_count == 2
        first, second = [photo(30, 60), photo(100, 50, 1)], [photo(81, 90, 2), photo(20, 93, 3)]
        for size in ((0, 0), (32, 48)):
            given: dict[str, Any] = {} if size == (0, 0) else {"size": size}
            expected = python.edit_batch([(first, ""), (second, "")], output="array", **given)
            for ours, theirs in zip(cpp.edit_batch([(first, ""), (second, "")], size=size), expected):
                np.testing.assert_array_equal(ours, theirs)
        for photos in (photo(8, 8), [photo(8, 8)] * 3):
            with pytest.raises(NativeError, match="takes 2 for each"):
                cpp.edit(photos, "")
        cpp.warm_up()
        python.warm_up()


@pytest.mark.parametrize("sizes", [(64, 48, 70, 42), (64, 48, 28, 28), (33, 90, 99, 21), (50, 40, 50, 56)])
def test_bicubic_is_pillows(executable: Callable[[str], Path], sizes: tuple[int, ...]) -> None:
    width, height, new_width, new_height = sizes
    array = photo(width, height)
    expected = Image.fromarray(array).resize((new_width, new_height), Image.Resampling.BICUBIC)
    made = subprocess.run(
        [executable("hywu_image_pixels"), "resize", *map(str, sizes), "bicubic"],
        input=array.tobytes(),
        capture_output=True,
        check=True,
    ).stdout
    assert made == np.asarray(expected).tobytes()


@given(st.data())
def test_sizes_are_pythons(executable: Callable[[str], Path], data: st.DataObject) -> None:
    sides = st.integers(1, 4000)
    areas = st.none() | st.integers(1, 4_000_000)
    width, height, multiple = data.draw(sides), data.draw(sides), data.draw(st.integers(1, 64))
    area, least, most = data.draw(areas), data.draw(areas), data.draw(areas)
    step = Resize("bicubic", multiple, area, least, most)
    numbers = [width, height, multiple, *(value or 0 for value in (area, least, most))]
    made = subprocess.run(
        [executable("hywu_image_pixels"), "sizes", *map(str, numbers)], capture_output=True, check=True
    ).stdout
    assert tuple(map(int, made.split())) == resized_sizes(width, height, [step])[0]
