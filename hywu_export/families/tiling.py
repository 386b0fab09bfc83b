"""VAEs tile by tile, for large pictures in little memory: overlapping tiles, blended by ramps.

The grid is fixed when a bundle is made, and the tiles' size follows from the picture's, so that the graph
needs no loop: it holds the VAE's nodes once per tile, and its weights once. Group norms and attention see a
tile instead of the picture, and its rim lacks what lies beyond: the result differs a little from that of the
whole (docs/families.md has the measure).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from hywu_runtime.errors import InputError


@dataclass(frozen=True)
class Tiles:
    """A square grid of tiles.

    Attributes:
        count: tiles along each side, 2 or more.
        overlap: of neighbours, in latents; a side of at most this is not cut.
    """

    count: int
    overlap: int

    @classmethod
    def covering(cls, longest: int, tile: int | None, factor: int) -> Tiles | None:
        """As few tiles of at most ``tile`` pixels as cover a side of ``longest``; None where one does.

        Neighbours share a quarter of a tile. ``factor`` is pixels per latent. Without ``tile``, one does.

        Raises:
            InputError: the tile is too small to share a quarter.
        """
        if tile is None or longest <= tile:
            return None
        size = tile // factor
        overlap = size // 4
        if overlap < 1:
            raise InputError(
                f"Tiles of {tile} pixels are {size} latents", "At least 4 latents", "Choose larger tiles"
            )
        return cls(math.ceil((math.ceil(longest / factor) - overlap) / (size - overlap)), overlap)


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles, into: int, out: int) -> Tensor:
    """``run(x)`` for ``x [B, C, H, W]``, of which it sees one tile at a time.

    Along one latent, ``x`` has ``into`` elements and the result has ``out``; sides are whole latents.
    """
    rows, columns = (_cut(side // into, tiles, out) for side in x.shape[2:])
    total: Tensor | None = None
    for y in rows:
        strip = x.index_select(2, y.positions(into))
        for column in columns:
            tile = run(strip.index_select(3, column.positions(into)))
            weighted = tile * y.weight[:, None] * column.weight
            part = functional.pad(weighted, (*column.beside(out), *y.beside(out)))
            total = part if total is None else total + part
    assert total is not None  # a grid has tiles
    return total


@dataclass(frozen=True)
class _Span:
    """One tile along one side: its place in latents, and the ``weight`` of every element that it makes."""

    start: int
    length: int
    side: int
    weight: Tensor

    def positions(self, scale: int) -> Tensor:
        return self.start * scale + torch.arange(self.length * scale)

    def beside(self, scale: int) -> tuple[int, int]:
        """Elements before and after."""
        return self.start * scale, (self.side - self.start - self.length) * scale


def _cut(side: int, tiles: Tiles, out: int) -> list[_Span]:
    """The tiles along a side of ``side`` latents, which is symbolic during tracing.

    A tile's weight falls linearly towards its rim over the overlap; together they are 1 everywhere.
    """
    count, overlap = tiles.count, tiles.overlap
    length: int = torch.sym_min(  # type: ignore[no-untyped-call]
        (side + (count - 1) * overlap + count - 1) // count, side
    )
    starts = [(side - length) * i // (count - 1) for i in range(count)]
    place = torch.arange(length * out) + 0.5
    ramp = (torch.minimum(place, length * out - place) / (overlap * out)).clamp(max=1)
    spans = [_Span(start, length, side, ramp) for start in starts]
    total = torch.stack([functional.pad(ramp, span.beside(out)) for span in spans]).sum(0)
    return [replace(span, weight=ramp / total.index_select(0, span.positions(out))) for span in spans]
