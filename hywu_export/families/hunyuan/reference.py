"""An edit as the published pipeline makes it: every step runs the whole sequence, without cache or padding.

It shares the network with the graphs and nothing else: tokens, positions and masks are made here one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hywu_export.families.base import ReferenceEdit
from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.model import HunyuanImage3, zero_timestep
from hywu_export.families.hunyuan.sequence import Tokens, buckets
from hywu_export.families.hunyuan.vision import Patches
from hywu_export.families.pixels import from_pixels, to_pixels
from hywu_export.schedules import make_scheduler
from hywu_export.tracing.loading import with_weights

if TYPE_CHECKING:
    from hywu_export.families.hunyuan_image3 import HunyuanImage3Instruct


@dataclass(frozen=True)
class Photo:
    """A reference picture: latents ``[1, C, h, w]``, patches ``[1, count, features]`` and their grid."""

    latents: Tensor
    patches: Tensor
    grid: tuple[int, int]


@dataclass
class TokenSequence:
    """Embeddings, a position per token, and which tokens are pictures: start, end, in which all see all."""

    embeddings: list[Tensor]
    positions: list[tuple[int, int]]
    slices: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return len(self.positions)

    def text(self, embeddings: Tensor) -> None:
        """Append tokens ``[n, hidden]`` whose positions are their indices."""
        self.positions += [(i, i) for i in range(self.length, self.length + len(embeddings))]
        self.embeddings.append(embeddings)

    def picture(self, embeddings: Tensor, height: int, width: int) -> tuple[int, int]:
        """Append tokens ``[n, hidden]``, of which the first ``height * width`` are a grid; gives the
        slice."""
        start, area = self.length, height * width
        self.positions += [
            (start + (area - height) // 2 + row, start + (area - width) // 2 + column)
            for row in range(height)
            for column in range(width)
        ]
        self.positions += [(i, i) for i in range(start + area, start + len(embeddings))]
        self.embeddings.append(embeddings)
        return start, self.length

    def mask(self) -> Tensor:
        """Boolean ``[1, 1, n, n]``."""
        allowed = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        for low, high in self.slices:
            allowed[low:high, low:high] = True
        return allowed[None, None]


def prompt_sequence(
    network: HunyuanImage3, tokens: Tokens, text: Sequence[int], photo: Photo
) -> TokenSequence:
    """Everything before the ``<img_ratio>`` of the picture that is made. ``text``: ids of prompt, role and
    thoughts."""
    wte = network.model.wte
    height, width = photo.latents.shape[2:]
    ratio = nearest_ratio(tokens, network.config, height, width)
    sequence = TokenSequence([], [], [])
    sequence.text(wte(torch.tensor([*tokens.prefix, tokens.boi, tokens.size, ratio])))
    time, latents = network.embed_latents(photo.latents, zero_timestep())
    sequence.text(time[0])
    first = sequence.picture(latents[0], height, width)
    sequence.text(wte(torch.tensor([tokens.separator])))
    second = sequence.picture(network.see(photo.patches, torch.tensor(photo.grid))[0], *photo.grid)
    joint = network.config.joint_attention
    sequence.slices += [(first[0], second[1])] if joint else [first, second]
    sequence.text(wte(torch.tensor([tokens.eoi, *text, *tokens.tail])))
    return sequence


def nearest_ratio(tokens: Tokens, config: HunyuanConfig, height: int, width: int) -> int:
    """The ``<img_ratio>`` token of a size."""
    known = [h / w for h, w in buckets(config.base_size)]
    return tokens.ratios[min(range(len(known)), key=lambda i: abs(known[i] - height / width))]


def hidden_states(network: HunyuanImage3, sequence: TokenSequence) -> Tensor:
    """The last layer's output ``[n, hidden]``."""
    rotary = network.rotary(torch.tensor(sequence.positions)[None])
    output: Tensor = network.model(torch.cat(sequence.embeddings)[None], rotary, sequence.mask())[0]
    return output[0]


def velocity(
    network: HunyuanImage3, tokens: Tokens, text: Sequence[int], photo: Photo, latents: Tensor, time: Tensor
) -> Tensor:
    """What one guidance row predicts for ``latents`` ``[1, C, h, w]`` at the timestep ``time`` ``[1]``."""
    height, width = latents.shape[2:]
    sequence = prompt_sequence(network, tokens, text, photo)
    ratio = nearest_ratio(tokens, network.config, height, width)
    sequence.text(network.model.wte(torch.tensor([ratio])))
    token, picture = network.embed_latents(latents, time)
    sequence.text(token[0])
    made = sequence.picture(picture[0], height, width)
    sequence.slices.append(made)
    hidden = hidden_states(network, sequence)[made[0] : made[1]]
    return network.velocity(hidden[None], time, height, width)


def texts(tokens: Tokens, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Prompt and thoughts with the assistant's role between, and the same with ``<cfg>`` in their place."""
    cut = next((i for i, token in enumerate(ids) if token in tokens.thoughts), len(ids))
    conditional = [*ids[:cut], *tokens.assistant, *ids[cut:]]
    unconditional = [tokens.cfg] * cut + [*tokens.assistant] + [tokens.cfg] * (len(ids) - cut)
    return conditional, unconditional


class _Component(nn.Module):
    """Parameters under the names that checkpoints are asked for."""

    def __init__(self, transformer: HunyuanImage3):
        super().__init__()
        self.transformer = transformer


def edit(family: HunyuanImage3Instruct, request: ReferenceEdit) -> npt.NDArray[np.uint8]:
    """The picture of `Family.reference_edit`."""
    from tokenizers import Tokenizer

    network, tokens = family.transformer, family.tokens
    ids = Tokenizer.from_file(str(family.folder / "tokenizer.json")).encode(
        request.prompt, add_special_tokens=False
    ).ids  # fmt: skip
    conditional, unconditional = texts(tokens, ids)
    default, settings = family.scheduler
    sampler: Any = default if request.sampler == family.sampler else request.sampler
    scheduler: Any = make_scheduler(sampler, settings)
    scheduler.set_timesteps(request.steps)
    generator = torch.Generator().manual_seed(request.seed)
    scale = request.guidance["text"]
    weights = {"transformer": family.components["transformer"].tensors}
    with with_weights(_Component(network), weights), torch.no_grad():
        pixels = torch.from_numpy(request.photo)[None]
        reader = Patches(network.config.vision, family.multiple, max(request.photo.shape[:2]))
        patches, grid = reader(pixels)
        photo = Photo(network.vae.encode(from_pixels(pixels)), patches, (int(grid[0]), int(grid[1])))
        latents = torch.from_numpy(request.latents)
        for time in scheduler.timesteps:
            rows = [conditional, unconditional] if scale > 1 else [conditional]
            made = [velocity(network, tokens, row, photo, latents, time[None]) for row in rows]
            guided = made[0] if scale <= 1 else made[1] + scale * (made[0] - made[1])
            latents = scheduler.step(guided, time, latents, generator=generator, return_dict=False)[0]
        picture: npt.NDArray[np.uint8] = to_pixels(network.vae.decode(latents))[0].numpy()
    return picture
