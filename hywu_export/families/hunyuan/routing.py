"""Tokens sorted by expert, in shapes that follow from the number of tokens alone.

A pair is a token and one of its experts. Pairs are sorted by expert into slots, and every expert's slots are
filled up to whole blocks, so that a block has one expert. There are at most ``pairs // block + experts``
blocks whatever the router says, and that many are always computed: nothing waits for the host.

All numbers are integers that stay exact in half precision: no sum of floats exceeds `CHUNK`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""Tokens of a block. A smaller one copies an expert's weights more often, a larger one computes more in
vain."""
PIECES = 2
"""Parts that a projection of the blocks is computed in: only one at a time holds its copies of weights."""
CHUNK = 128  # tokens that are counted by one product; BF16 holds integers up to 256


def block_size(experts: int, top_k: int, tokens: int) -> int:
    """`BLOCK` if gathering ``tokens`` by expert leaves at most half of the products of every expert on every
    token, otherwise 0: with few experts or tokens it would only move numbers."""
    return BLOCK if 2 * (tokens * top_k + experts * BLOCK) <= tokens * experts else 0


def blocks_of_a_piece(pairs: int, experts: int, block: int) -> int:
    """How many there are: together no fewer than ``pairs // block + experts``.

    Written so that torch.export sees that it cannot be 1, a size that it would treat apart.
    """
    return pairs // (block * PIECES) + (experts + 2 * PIECES - 2) // PIECES


class Groups(NamedTuple):
    """Where tokens go.

    Attributes:
        token: of every slot, int64 ``[batch, slots]``; one that no pair has is computed in vain.
        expert: of every block, int64 ``[batch, PIECES, blocks of a piece]``.
        slot: of every pair, int64 ``[batch, n, k]``.
    """

    token: Tensor
    expert: Tensor
    slot: Tensor


def group(chosen: Tensor, experts: int, block: int) -> Groups:
    """Sort the pairs of ``chosen``, int64 ``[batch, n, k]``: k different experts for every token."""
    batch, n, k = chosen.shape
    each = blocks_of_a_piece(n * k, experts, block)
    blocks = each * PIECES
    kinds = torch.arange(experts)
    rank, count = _counted((chosen.unsqueeze(-1) == kinds).to(torch.int64).sum(2))
    needed = (count.unsqueeze(-1) > torch.arange(blocks) * block).to(torch.int64).sum(-1)
    earlier = kinds.unsqueeze(1) > kinds
    first = torch.where(earlier, needed.unsqueeze(1), 0).sum(2)  # block of every expert
    slot = (rank + (first * block).unsqueeze(1)).gather(2, chosen)
    expert = (first.unsqueeze(1) <= torch.arange(blocks).unsqueeze(-1)).to(torch.int64).sum(-1) - 1
    token = torch.arange(n).unsqueeze(1).expand(-1, k).flatten().expand(batch, -1)
    empty = torch.zeros_like(slot[:, :1, 0]).expand(-1, blocks * block)
    pieces = torch.unflatten(expert, 1, (PIECES, each))
    return Groups(empty.scatter(1, slot.flatten(1), token), pieces, slot)


def _counted(hit: Tensor) -> tuple[Tensor, Tensor]:
    """Of zeros and ones ``[batch, n, experts]``: the ones before each, and of all, ``[batch, experts]``."""
    n = hit.shape[1]
    chunks = n // CHUNK + 2
    padded = F.pad(hit.to(torch.float32), (0, 0, 0, 2 * CHUNK))[:, : chunks * CHUNK]
    parts = torch.unflatten(padded, 1, (chunks, CHUNK))
    within = torch.ones(CHUNK, CHUNK).tril() @ parts
    upto = within.to(torch.int64)
    total = upto[:, :, -1]
    order = torch.arange(chunks)
    before = torch.where((order.unsqueeze(1) > order).unsqueeze(-1), total.unsqueeze(1), 0).sum(2)
    return (upto + before.unsqueeze(2)).flatten(1, 2)[:, :n] - hit, total.sum(1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[batch, m]`` of every sample of ``x`` ``[batch, n, d]``: ``[batch * m, d]``."""
    batch, n, _ = x.shape
    start = torch.arange(batch).unsqueeze(1) * n
    return x.flatten(0, 1).index_select(0, (index + start).flatten())
