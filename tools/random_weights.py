"""Fills the holes of a synthetic checkpoint with random numbers, so that it computes like a network.

    python -m tools.sparse_checkpoints instruct-pix2pix OUT
    python -m tools.random_weights OUT [--seed 0]

Matrices and convolutions are normal with variance 1 / fan-in, which keeps activations near 1; weights of
normalisations are ones, biases zeros, embeddings small. The same seed gives the same bytes. Compilers and
calibration do other work on zeros than on numbers; what an image looks like does not matter to them.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from hywu_export.bundle.sources import SafetensorsIndex

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PIECE = 1 << 22  # numbers made at a time


def fill(path: Path, seed: int) -> None:
    """Writes numbers into every tensor of the safetensors file ``path``; memory does not grow with it."""
    for name, tensor in SafetensorsIndex.from_file(path).items():
        dtype = _DTYPES[tensor.dtype]
        data = np.memmap(path, dtype, "r+", tensor.offset, math.prod(tensor.shape))
        deviation = _deviation(name, tensor.shape)
        if deviation is None:
            data[:] = 1 if name.endswith("weight") else 0
            continue
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        for start in range(0, data.size, _PIECE):
            piece = data[start : start + _PIECE]
            made = generator.standard_normal(piece.size, np.float32) * np.float32(deviation)
            piece[:] = made.astype(dtype)


def _deviation(name: str, shape: tuple[int, ...]) -> float | None:
    """Standard deviation of a tensor's numbers; None for what is not random."""
    if len(shape) < 2:
        return None
    return 0.02 if "embedding.weight" in name else 1 / math.sqrt(math.prod(shape[1:]))


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        fill(path, seed)


if __name__ == "__main__":
    main()
