"""VAEs tile by tile: what is local comes out as if there were no tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from hywu_export.families.tiling import Tiles, in_tiles
from hywu_runtime.errors import InputError


@given(longest=st.integers(64, 1024), tile=st.integers(48, 1024), factor=st.sampled_from([2, 8, 32]))
def test_a_grid_covers_the_longest_side(longest: int, tile: int, factor: int) -> None:
    if tile // factor < 4 and longest > tile:
        with pytest.raises(InputError, match="latents"):
            Tiles.covering(longest, tile, factor)
        return
    tiles = Tiles.covering(longest, tile, factor)
    if tiles is None:
        assert longest <= tile
        return
    seen: list[int] = []
    side = -(-longest // factor)

    def look(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[3])
        return part

    x = torch.linspace(-1, 1, side).expand(1, 1, 1, side)
    torch.testing.assert_close(in_tiles(look, x, tiles, 1, 1), x, rtol=0, atol=1e-6)
    assert len(seen) == tiles.count**2
    assert max(seen) * factor <= tile


@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    count=st.integers(2, 4),
    overlap=st.integers(1, 6),
    decoding=st.booleans(),
)
def test_local_functions_do_not_see_the_grid(
    height: int, width: int, count: int, overlap: int, decoding: bool
) -> None:
    """A decoder that repeats every latent, and an encoder that averages the pixels of one."""
    tiles = Tiles(count, overlap)
    rng = np.random.default_rng(height * width)
    if decoding:
        x = torch.from_numpy(rng.standard_normal((2, 3, height, width)))
        got = in_tiles(lambda part: part.repeat_interleave(4, 2).repeat_interleave(4, 3), x, tiles, 1, 4)
        expected = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    else:
        x = torch.from_numpy(rng.standard_normal((2, 3, 4 * height, 4 * width)))
        got = in_tiles(lambda part: functional.avg_pool2d(part, 4), x, tiles, 4, 1)
        expected = functional.avg_pool2d(x, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_side_of_one_overlap_is_not_cut() -> None:
    seen = []
    in_tiles(lambda part: seen.append(part.shape) or part, torch.zeros(1, 1, 6, 7), Tiles(3, 6), 1, 1)
    assert {shape[2] for shape in seen} == {6}
    assert {shape[3] for shape in seen} == {7}


def test_ramps_are_linear_over_the_overlap() -> None:
    """Tiles that differ by their number show the weights."""
    numbers = iter(range(4))
    x = torch.zeros(1, 1, 10, 10)
    made = in_tiles(lambda part: part + next(numbers) // 2, x, Tiles(2, 4), 1, 1)
    np.testing.assert_allclose(made[0, 0, :, 0], [0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1], atol=1e-6)
