"""Smoothing: outliers of an activation's channels move into the weight, which is quantized per channel and
bears them.

Xiao et al., "SmoothQuant" (ICML 2023), equation 4: channel j of the activation is divided by

    s_j = max|x_j| ** α / max|w_j| ** (1 - α)

and row j of the weight multiplied by it. Only the quantized path sees this: the delta branch reads the
activation as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_LARGEST = 2.0**12  # of a factor, up or down: beyond, FP16 would lose the activation's small channels


def input_channel_maxima(weight: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """The largest absolute weight of every input channel, ``[K]``.

    Args:
        weight: a matrix, or a convolution's ``[N, K, …]``.
        axis: of the output channels: 0 or 1.
    """
    others = tuple(i for i in range(weight.ndim) if i != 1 - axis)
    return np.asarray(np.abs(weight).max(axis=others), np.float32)


def factors(
    activation: npt.NDArray[np.float32], weights: Sequence[npt.NDArray[np.float32]], alpha: float
) -> npt.NDArray[np.float32]:
    """The factors of an activation that one layer or several read.

    Args:
        activation: the largest absolute value of every channel, ``[K]``.
        weights: for each layer, the largest absolute weight of every input channel, ``[K]``.
        alpha: 0 to 1: how much of the difficulty moves to the weight.
    Returns:
        float32 ``[K]``, positive; 1 for a channel that is zero. Their geometric mean is 1.
    """
    weight = np.max(weights, axis=0).astype(np.float64)
    used = (activation > 0) & (weight > 0)
    result = np.ones(activation.shape, np.float64)
    result[used] = activation[used].astype(np.float64) ** alpha / weight[used] ** (1 - alpha)
    if used.any():
        result[used] /= np.exp(np.log(result[used]).mean())
    return np.clip(result, 1 / _LARGEST, _LARGEST).astype(np.float32)
