"""Bundles of stages in the C++ runtime: the bytes of the Python runtime."""

from __future__ import annotations

from pathlib import Path

import native
import numpy as np
import pytest
from native import Library

from hywu_runtime import Editor


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["2", "4"])
def test_staged_edits(library: Library, staged_bundles: Path, stages: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), np.uint8)
    requests = list(zip(pictures, ["make it sepia", "blur the photo"]))
    cpp = native.Editor.load(library, staged_bundles / stages, backend="ort-cpu", threads=1)
    with Editor.load(staged_bundles / "1", threads=1) as whole:
        for scale in (7.5, 1.0):
            guidance = {"text": scale}
            expected = whole.edit_batch(requests, seed=3, steps=3, guidance=guidance, output="array")
            for got, picture in zip(cpp.edit_batch(requests, seed=3, steps=3, guidance=guidance), expected):
                np.testing.assert_array_equal(got, picture)
    cpp.close()
