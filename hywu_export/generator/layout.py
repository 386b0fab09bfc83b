"""How the generator's tokens are handed out to the tensors of a base layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .config import GeneratorConfig, PlainTarget, expand


@dataclass(frozen=True)
class Slot:
    """One delta tensor of a base layer and the tokens that make it.

    Tokens ``offset … offset + tokens`` count from the first token of the slot's kind. Their numbers in
    row-major order (token, rank row, channel) are the tensor's; what is left of the last token is padding.
    """

    entry: str
    kind: Literal["A", "B"]
    shape: tuple[int, ...]
    offset: int
    tokens: int

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    def key(self, prefix: str, layer: int) -> str:
        """Name of the tensor in base layer ``layer``."""
        return f"{prefix}{layer}.{self.entry}.lora_{self.kind}"


class TokenLayout:
    """Slots of one base layer, all A and then all B, and the token counts that follow from them.

    Attributes:
        slots: in token order.
        t_a, t_b: tokens for A, for B.
        t: ``t_a + t_b``.
        w: tokens of the network per token of the layout, ``rank / dim_accumulation``.
        hw: tokens of the network per base layer, ``t * w``.
        area: numbers that one token holds, ``rank * token_dim``.
    """

    def __init__(self, config: GeneratorConfig):
        self.area = config.rank * config.token_dim
        self.slots = (*self._place(config, "A"), *self._place(config, "B"))
        self.t_a = sum(slot.tokens for slot in self.slots if slot.kind == "A")
        self.t_b = sum(slot.tokens for slot in self.slots if slot.kind == "B")
        self.t = self.t_a + self.t_b
        self.w = config.rank // config.dim_accumulation
        self.hw = self.t * self.w

    def _place(self, config: GeneratorConfig, kind: Literal["A", "B"]) -> list[Slot]:
        def position(entry: str) -> int:
            # The published order: by the first mapping name that the tensor's name contains. It is the order
            # of the mapping itself, except where one mapping name contains another.
            key = f"{config.prefix}0.{entry}.lora_{kind}"
            return next(index for index, name in enumerate(config.pg_mapping) if name in key)

        slots: list[Slot] = []
        offset = 0
        for entry, target, experts in sorted(expand(config.pg_mapping), key=lambda item: position(item[0])):
            shape = _shape(kind, target, experts, config.rank)
            tokens = math.ceil(math.prod(shape) / self.area)
            slots.append(Slot(entry, kind, shape, offset, tokens))
            offset += tokens
        return slots


def _shape(kind: str, target: PlainTarget, experts: int | None, rank: int) -> tuple[int, ...]:
    matrix = (rank, target.in_features) if kind == "A" else (target.out_features, rank)
    return matrix if experts is None else (experts, *matrix)
