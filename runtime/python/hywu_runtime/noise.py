"""Standard normal numbers that are the same in every language.

Philox 4×32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in counter mode, then
Box–Muller in float64 and one rounding to float32. ``docs/bundle.md`` gives the keys and counters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_CHUNK = 1 << 18  # blocks at a time: bounds the memory of float64 intermediates


def philox(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox 4×32 with 10 rounds.

    Args:
        counter: uint32 ``[4, n]``.
        key: two 32-bit words.
    Returns:
        uint32 ``[4, n]``.
    """
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def normal(shape: Sequence[int], seed: int, sample: int = 0, draw: int = 0) -> npt.NDArray[np.float32]:
    """Standard normal numbers of one sample.

    Args:
        shape: the sample's shape, without the batch axis; filled in row-major order.
        seed: 0 to 2**64 - 1.
        sample: the sample's place in the batch, or 0 for a sample with a seed of its own.
        draw: 0 for the initial noise, k for evaluation k = 1, 2, ….
    Returns:
        float32 of ``shape``.
    """
    length = math.prod(shape)
    result = np.empty(length, np.float32)
    blocks = (length + 3) // 4
    for start in range(0, blocks, _CHUNK):
        count = min(_CHUNK, blocks - start)
        counter = np.zeros((4, count), np.uint32)
        counter[0] = np.arange(start, start + count, dtype=np.uint64).astype(np.uint32)
        counter[1], counter[2] = draw, sample
        words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
        u0, u1, u2, u3 = (words.astype(np.float64) + 0.5) * 2.0**-32
        radius, angle = np.sqrt(-2.0 * np.log(np.stack([u0, u2]))), 2.0 * np.pi * np.stack([u1, u3])
        numbers = np.empty((count, 4), np.float64)
        numbers[:, 0::2] = (radius * np.cos(angle)).T
        numbers[:, 1::2] = (radius * np.sin(angle)).T
        piece = result[4 * start : 4 * (start + count)]
        piece[:] = numbers.reshape(-1)[: len(piece)]
    return result.reshape(tuple(shape))
