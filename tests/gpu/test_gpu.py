"""On a GPU: TensorRT where it can be imported, ONNX Runtime's CUDA in any case, against ONNX Runtime's CPU.

TensorRT-RTX does not run on compute capability 9.0 (H100, H200) and some others: there its test is skipped,
and says so.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hywu_runtime import Editor, Manifest
from hywu_runtime.backends import available_backends

pytestmark = pytest.mark.gpu

PROMPTS = ("make it sepia", "blur the photo", "a cat")
LEAST_DB = {"ort-cuda": 40.0, "tensorrt": 35.0, "tensorrt-rtx": 35.0}  # TF32 against FP32


def need(backend: str) -> None:
    """Skips a test where the backend is not there, with the reason that `hywu doctor` gives."""
    reason = available_backends()[backend]
    if reason is not None:
        pytest.skip(f"{backend} was not tested: {reason}")


def photo(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (8, 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def edits(editor: Editor) -> list[np.ndarray]:
    """Requests one after another: other photos, instructions, steps, strengths, and the first one again."""
    wishes: list[dict[str, Any]] = [
        {"steps": 4}, {"steps": 2, "delta_strength": 0.5}, {"steps": 7, "seed": 3}, {"steps": 4},
    ]  # fmt: skip
    pictures = [
        editor.edit(photo(i % 3), PROMPTS[i % 3], size=64, sampler="dpmpp_2m", output="array", **options)
        for i, options in enumerate(wishes)
    ]
    assert all(isinstance(picture, np.ndarray) for picture in pictures)
    return [np.asarray(picture) for picture in pictures]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean(np.square(a.astype(float) - b))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def check_against_cpu(bundle: Path, backend: str) -> None:
    with Editor.load(bundle, "ort-cpu") as cpu, Editor.load(bundle, backend) as gpu:
        expected, got = edits(cpu), edits(gpu)
        assert gpu.backend.name == backend
        for a, b in zip(got, expected):
            assert psnr(a, b) >= LEAST_DB[backend]
        np.testing.assert_array_equal(edits(gpu)[0], got[0])  # nothing is left of what ran between
        pairs = [(photo(i), PROMPTS[i]) for i in range(3)]
        batch = gpu.edit_batch(pairs, steps=3, seed=[0, 1, 2], size=64, output="array")
        own = cpu.edit_batch(pairs, steps=3, seed=[0, 1, 2], size=64, output="array")
        for a, b in zip(batch, own):
            assert psnr(np.asarray(a), np.asarray(b)) >= LEAST_DB[backend]


def test_onnxruntime_cuda(bundle: Path) -> None:
    need("ort-cuda")
    check_against_cpu(bundle, "ort-cuda")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt(bundle: Path, tmp_path: Path, backend: str) -> None:
    """Engines are built here, for this GPU, and one captured graph serves all requests."""
    need(backend)
    from hywu_runtime.backends import cuda

    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    build(copy, backend)
    assert Manifest.read(copy).engines
    captures = []
    capture = cuda.Stream.capture

    def counting(self: cuda.Stream, work: Any) -> Any:
        captures.append(1)
        return capture(self, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Stream, "capture", counting)
        with Editor.load(copy, backend) as editor:
            edits(editor)
            edits(editor)
    assert len(captures) == 1
    check_against_cpu(copy, backend)


def build(bundle: Path, backend: str) -> None:
    from click.testing import CliRunner

    from hywu_export.cli import hywu

    arguments = ["build", str(bundle), "--backend", backend, "--shapes", "64x64", "--batch", "1:1:3"]
    if backend == "tensorrt-rtx":
        from hywu_runtime.backends import cuda

        arguments += ["--compute-capability", cuda.find_gpu().capability.replace(".", "")]
    result = CliRunner().invoke(hywu, arguments)
    assert result.exit_code == 0, result.output
